"""The published dual-table quantizer's numbers against `shared_quantize`, and the rule of the generated inputs."""

import golden_values
import numpy as np
import pytest
import torch
from golden_values import Case, case_names

from tokenflow_ext import ops

QUANTIZER = "tokenflow_quantizer"
BACKENDS = ("native", "reference")


@pytest.mark.parametrize(
    "check", golden_values.manifest("rule_check")["checks"], ids=lambda c: c.get("key") or c["name"]
)
def test_rule_of_generated_tensors(check):
    extra = (check["low"], check["high"]) if check["function"] == "integers" else ()
    name = check.get("key") or check["name"]
    array = getattr(golden_values, check["function"])(name, check["shape"], check["salt"], *extra)
    flat = array.reshape(-1)
    np.testing.assert_allclose(flat[: len(check["first"])], check["first"], rtol=1.2e-7)
    if "sum" in check:
        np.testing.assert_allclose(flat[-1], check["last"], rtol=1.2e-7)
        np.testing.assert_allclose(flat.sum(dtype=np.float64), check["sum"], rtol=1e-6)


def quantize_case(case: Case, backend: str):
    """The case's inputs as leaves, and what `shared_quantize` makes of them."""
    z = case["z"].requires_grad_()
    tables = [case["sem_table"].requires_grad_(), case["pix_table"].requires_grad_()]
    rows = z.movedim(1, -1).split(case.options["table_dims"], dim=-1)
    result = ops.shared_quantize(
        rows,
        tables,
        metric="cosine",
        weights=case.options["weights"],
        commitment_weight=case.options["beta"],
        backend=backend,
    )
    return z, tables, torch.cat(result.quantized, dim=-1), result.indices, result.loss


def table_gradient(case: Case) -> torch.Tensor:
    """The expected gradient [K, C], tables side by side, from its dense or its row-sparse form."""
    if "grad_sem_loss" in case:
        return torch.cat([case["grad_sem_loss"], case["grad_pix_loss"]], dim=1)
    dense = torch.zeros(case.options["codebook_size"], sum(case.options["table_dims"]))
    dense[case["grad_rows_loss"]] = case["grad_vals_loss"]
    return dense


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", case_names(QUANTIZER))
def test_shared_quantize_values(name, backend):
    case = Case(QUANTIZER, name)
    _, _, quantized, indices, loss = quantize_case(case, backend)
    near_ties = case.check_indices(indices)
    if name == "duplicate_codes":
        assert near_ties == 0 and int(indices.max()) < case.options["codebook_size"] // 2
    case.check("value", quantized, case["code"])
    case.check("value", quantized.movedim(-1, 1), case["out"])
    expected = case.scalars["vq_loss"] + case.scalars["commit_loss"]
    assert abs(loss.item() - expected) <= case.limit("value")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", case_names(QUANTIZER))
def test_shared_quantize_gradients(name, backend):
    case = Case(QUANTIZER, name)
    z, tables, quantized, _, loss = quantize_case(case, backend)
    out = torch.autograd.grad(
        (quantized.movedim(-1, 1) * case["upstream"]).sum(), [z, *tables], retain_graph=True, allow_unused=True
    )
    assert all(g is None or not g.any() for g in out[1:])
    from_loss = torch.autograd.grad(loss, [z, *tables])
    case.check("gradient", torch.cat(from_loss[1:], dim=1), table_gradient(case))
    for actual, expected in ((out[0], case["grad_z_out"]), (from_loss[0], case["grad_z_loss"])):
        if name == "scaled_rows":
            # Tokens differ by 1e12 in scale: each is held to its own largest entry.
            share = (actual - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
            assert float(share.max()) <= 5e-5
        else:
            case.check("gradient", actual, expected)
