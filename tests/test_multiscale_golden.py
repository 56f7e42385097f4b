"""The published multi-scale residual loop's numbers against the multi-scale ops."""

import pytest
import torch
from golden_values import Case, case_names
from test_golden import BACKENDS, table_gradient

from tokenflow_ext import ops

MULTISCALE = "tokenflow_multiscale"
CASES = case_names(MULTISCALE)
CHAINS = [
    (c, r)
    for c in CASES
    for r in (None, 0, 2, 3)
    if ("chain" if r is None else f"chain_refine_{r}") in Case(MULTISCALE, c)
]


def tables(case: Case) -> list[torch.Tensor]:
    return [case["sem_table"].requires_grad_(), case["pix_table"].requires_grad_()]


def quantize_case(case: Case, backend: str):
    """The case's leaves and the result of the residual loop on them."""
    h, codebooks = case["h"].requires_grad_(), tables(case)
    result = ops.multiscale_quantize(
        h, codebooks, scales=case.options["scales_used"], weights=case.options["weights"],
        commitment_weight=case.options["beta"], backend=backend,
    )  # fmt: skip
    return h, codebooks, result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_indices_scale_by_scale(name, backend):
    """Every scale is searched from the residual that the stored codes of the scales before leave."""
    case = Case(MULTISCALE, name)
    codebooks = tables(case)
    rows = ops.multiscale_rows(case["h"], case["idx"], codebooks, scales=case.options["scales_used"], backend=backend)
    parts = rows.split(case.options["table_dims"], dim=-1)
    case.check_indices(ops.shared_nearest_code(parts, codebooks, weights=case.options["weights"], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_loop_values(name, backend):
    case = Case(MULTISCALE, name)
    _, _, result = quantize_case(case, backend)
    assert case.check_indices(result.indices) == 0
    case.check("f_hat", result.quantized, case["f_hat"])
    assert abs(result.loss.item() - case.scalars["vq_loss"] - case.scalars["commit_loss"]) <= case.limit("value")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_loop_gradients(name, backend):
    case = Case(MULTISCALE, name)
    h, codebooks, result = quantize_case(case, backend)
    leaves = [h, *codebooks]
    out = torch.autograd.grad((result.quantized * case["upstream"]).sum(), leaves, retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in out[1:])
    case.check("gradient", out[0], case["grad_h_out"])
    from_loss = torch.autograd.grad(result.loss, leaves)
    case.check("gradient", from_loss[0], case["grad_h_loss"])
    case.check("gradient", torch.cat(from_loss[1:], dim=1), table_gradient(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_decode(name, backend):
    """The codes alone rebuild the map, and every whole-scale prefix its coarser version."""
    case = Case(MULTISCALE, name)
    scales = case.options["scales_used"]

    def decode(indices):
        return ops.multiscale_decode(
            indices, tables(case), scales=scales, size=tuple(case["h"].shape[2:]), backend=backend
        )

    case.check("f_hat", decode(case["idx"]), case["f_hat_from_idx" if "f_hat_from_idx" in case else "f_hat"])
    length = 0
    for p, s in enumerate(scales):
        length += s * s
        prefix = decode(case["idx"][:, :length])
        if "f_hat_prefix" in case:
            case.check("f_hat", prefix, case["f_hat_prefix"][p])
        if "f_hat_prefix_norms" in case:
            case.check("f_hat", prefix.flatten(1).norm(dim=1) / prefix[0].numel() ** 0.5,
                       case["f_hat_prefix_norms"][p] / prefix[0].numel() ** 0.5)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, position", CHAINS)
def test_chain(name, position, backend):
    """The language model's inputs; refining 0-based position r + 1 is refining scale r + 2."""
    case = Case(MULTISCALE, name)
    rows = ops.multiscale_inputs(
        case["idx"], tables(case), scales=case.options["scales_used"], size=tuple(case["h"].shape[2:]), rule="chain",
        refine=None if position is None else position + 2, backend=backend,
    )  # fmt: skip
    case.check("chain", rows, case["chain" if position is None else f"chain_refine_{position}"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_scale_in_the_full_list(backend):
    """-1 for every code of the dropped scale decodes and pools like the list without that scale."""
    case = Case(MULTISCALE, "dropped_scale")
    scales, used = case.options["scales"], case.options["scales_used"]
    pieces = dict(zip(used, case["idx"].split([s * s for s in used], dim=1)))
    full = torch.cat([pieces.get(s, torch.full((len(case["h"]), s * s), -1)) for s in scales], dim=1)
    decoded = ops.multiscale_decode(full, tables(case), scales=scales, size=8, backend=backend)
    case.check("f_hat", decoded, case["f_hat"])
    rows = ops.multiscale_rows(case["h"], full, tables(case), scales=scales, backend=backend)
    expected = ops.multiscale_rows(case["h"], case["idx"], tables(case), scales=used, backend=backend)
    assert torch.equal(rows[full >= 0], expected.flatten(0, 1))
