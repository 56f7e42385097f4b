"""VAR's published residual quantizer against the same ops: loss on accumulated maps, phi, raw codes, next-scale inputs."""

import pytest
import torch
from golden_values import Case, case_names
from test_golden import BACKENDS

from tokenflow_ext import ops

VAR = "var_quantizer"
CASES = case_names(VAR)


def options(case: Case) -> tuple[list[torch.Tensor], dict, dict[str, int]]:
    """Codebook and phi as leaves, the keywords of the ops, and the row of phi of every published parameter name."""
    codebook = case["codebook"].requires_grad_()
    metric = "cosine" if case.options["metric"].startswith("cosine") else "l2"
    common = {"scales": case.options["scales"], "metric": metric, "normalize_codes": False}
    if case.options["phi_ratio"] == 0:
        return [codebook], common, {}
    rows = {name: p for p, name in enumerate(sorted(set(case.options["phi_of_scale"])))}
    weight = torch.stack([case[f"phi/{name}.weight"] for name in rows]).requires_grad_()
    bias = torch.stack([case[f"phi/{name}.bias"] for name in rows]).requires_grad_()
    phi = (weight, bias, case.options["phi_ratio"], [rows[name] for name in case.options["phi_of_scale"]])
    return [codebook, weight, bias], {**common, "phi": phi}, rows


def codebook_gradient(case: Case, codebook: torch.Tensor) -> torch.Tensor:
    if "grad_codebook" in case:
        return case["grad_codebook"]
    return torch.zeros_like(codebook).index_copy(0, case["grad_codebook_rows"], case["grad_codebook_vals"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_loop(name, backend):
    case = Case(VAR, name)
    leaves, common, rows = options(case)
    f = case["f"].requires_grad_()
    weights = {"commitment_weight": case.options["beta"], "loss_on": "accumulated"}
    result = ops.multiscale_quantize(f, leaves[:1], **common, **weights, backend=backend)
    assert case.check_indices(result.indices) == 0
    case.check("f_hat", result.quantized, case["f_hat"])
    case.check("f_hat", result.quantized, case["out"])
    assert abs(result.loss.item() - case.scalars["loss"]) <= case.limit("f_hat")
    (passed,) = torch.autograd.grad((result.quantized * case["upstream"]).sum(), f, retain_graph=True)
    case.check("gradient", passed, case["grad_f_out"])
    grad_f, grad_codebook, *grad_phi = torch.autograd.grad(result.loss, [f, *leaves])
    case.check("gradient", grad_f, case["grad_f_loss"])
    case.check("gradient", grad_codebook, codebook_gradient(case, leaves[0]))
    for key, p in rows.items():
        case.check("gradient", grad_phi[0][p], case[f"grad_phi/{key}.weight"])
        case.check("gradient", grad_phi[1][p], case[f"grad_phi/{key}.bias"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_decode_and_inputs(name, backend):
    case = Case(VAR, name)
    leaves, common, _ = options(case)
    place = {"size": tuple(case["f"].shape[2:]), "backend": backend}
    case.check("f_hat", ops.multiscale_decode(case["idx"], leaves[:1], **common, **place), case["f_hat_decoded"])
    length = 0
    for p, s in enumerate(common["scales"]):
        length += s * s
        if "f_hat_per_scale" in case:
            prefix = ops.multiscale_decode(case["idx"][:, :length], leaves[:1], **common, **place)
            case.check("f_hat", prefix, case["f_hat_per_scale"][p])
    rows = ops.multiscale_inputs(case["idx"], leaves[:1], **common, **place, rule="accumulate")
    case.check("f_hat", rows, case["teacher_input"])
