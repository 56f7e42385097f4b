"""A bfloat16 or float16 model gets exactly the tokens of float32 arithmetic on its features, unlike a search in that type.

Each test prints the share of tokens that the same search changes when it is done in the half type throughout, as it is
inside a model that was simply cast: restated here in plain PyTorch.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import METRICS, near_ties, normal, same_bits

from tokenflow_ext import ops, reference
from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer

HALF = [torch.bfloat16, torch.float16]
SCALES = (1, 2, 4, 6, 8, 10, 12, 14, 16)


def search_in_type(xs, codebooks, metric):
    """argmin over codes with every step in the rows' own type: expanded squares, as cast models compute them."""
    distance = 0
    for x, codebook in zip(xs, codebooks):
        c = codebook.to(x.dtype)
        if metric == "cosine":
            x, c = F.normalize(x, dim=-1), F.normalize(c, dim=-1)
        if metric == "dot":
            distance = distance - x @ c.T
        else:
            distance = distance + (x.square().sum(-1, keepdim=True) + c.square().sum(-1) - 2 * x @ c.T)
    return distance.argmin(-1)


def loop_in_type(features, codebooks, widths):
    """TokenFlow's residual loop on [B, C, H, W] with every step in the type of the features: ids [B, L]."""
    size, residual, ids = features.shape[-2:], features, []
    codes = torch.cat([F.normalize(c.to(features.dtype), dim=-1) for c in codebooks], dim=-1)
    for s in SCALES:
        rows = F.interpolate(residual, (s, s), mode="area").flatten(2).transpose(1, 2)
        found = search_in_type(rows.flatten(0, 1).split(widths, -1), codebooks, "cosine").reshape(len(features), -1)
        chosen = codes[found].transpose(1, 2).unflatten(2, (s, s))
        residual = residual - F.interpolate(chosen, size, mode="bicubic", align_corners=False)
        ids.append(found)
    return torch.cat(ids, dim=1)


def report(capsys, name, changed, in_type, total):
    with capsys.disabled():
        print(
            f"\n  {name}: {changed} of {total} ids changed; the search in that type changes {in_type} ({in_type / total:.1%})"
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_single_scale(dtype, metric, capsys):
    torch.manual_seed(3)
    quantizer = VectorQuantizer(8, 4096, metric=metric)
    features = normal(2048, 8, seed=1, dtype=dtype)
    expected = quantizer.encode(features.float())
    (table,) = quantizer.codebooks()
    in_type = int((search_in_type([features], [table], metric) != expected).sum())
    half = quantizer.to(dtype)
    changed = int((half(features).indices != expected).sum())
    report(capsys, f"{metric}, {dtype}", changed, in_type, 2048)
    assert changed == 0 and torch.equal(half.encode(features), expected)
    near_ties(
        expected,
        reference.nearest_code(features.double(), table.detach().double(), metric=metric),
        [features],
        [table],
        metric,
    )
    assert in_type > 0, "the comparison shows nothing if the half type changes nothing"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nine_scales(dtype, capsys):
    torch.manual_seed(3)
    widths = (32, 8)
    quantizer = MultiScaleQuantizer(SharedIndexQuantizer(widths, 4096), SCALES).eval()
    features = normal(4, 40, 16, 16, seed=1, dtype=dtype)
    expected = quantizer(features.float())
    tables = quantizer.codebooks()
    in_type = int((loop_in_type(features, tables, widths) != expected.indices).sum())
    out = quantizer.to(dtype)(features)
    changed = int((out.indices != expected.indices).sum())
    report(capsys, f"nine scales, {dtype}", changed, in_type, expected.indices.numel())
    assert changed == 0 and same_bits(out.quantized, expected.quantized.to(dtype))
    rows = (
        ops.multiscale_rows(features.double(), out.indices, [t.double() for t in tables], scales=SCALES)
        .flatten(0, 1)
        .split(widths, -1)
    )
    exact = reference.shared_nearest_code(rows, [t.detach().double() for t in tables])
    near_ties(out.indices, exact, [r.float() for r in rows], [t.float() for t in tables], "cosine")
    assert in_type > 0, "the comparison shows nothing if the half type changes nothing"


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_changes_no_token(backend):
    x, codebook = normal(500, 32, seed=1), normal(4096, 32, seed=2)
    parts, tables = x.split((24, 8), -1), codebook.split((24, 8), -1)
    features, scales = normal(2, 32, 8, 8, seed=3), (1, 2, 4, 8)
    calls = [
        lambda: ops.nearest_code(x, codebook, metric="cosine", backend=backend),
        lambda: ops.quantize(x, codebook, backend=backend),
        lambda: ops.shared_quantize(parts, tables, backend=backend),
        lambda: ops.multiscale_quantize(features, tables, scales=scales, backend=backend),
        lambda: ops.code_statistics(x, torch.arange(500), 500, backend=backend),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = torch.utils._pytree.tree_leaves(call())
        for a, b in zip(cast, torch.utils._pytree.tree_leaves(call()), strict=True):
            assert same_bits(a, b)
