"""Small problems that take the CUDA kernels through every launch and branch, for the modes that run them slowly."""

import contextlib
import warnings
from types import SimpleNamespace

import torch
from harness import METRICS, normal
from multiscale_cases import MODES, SCALES, case, decoding
from replay import Call, Door, record
from replay.problems import gradients, rows, table

from emulator.kernels import OPS, SEARCHING, certified
from tokenflow_ext import ops
from tokenflow_ext.ops import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def search() -> None:
    for metric in METRICS:
        for n, k, width in ((1, 1, 1), (33, 31, 8), (5, 700, 40), (140, 130, 5), (0, 4, 3), (20, 40, 257)):
            x, codebook = rows(n, width, seed=k, dtype=torch.float32), table(k, width, seed=n + 1)
            ops.nearest_code(x, codebook, metric=metric, return_scores=True)
            if k > 100:
                ops.nearest_code(x, codebook, metric=metric, topk=7, window=(3, k - 2), return_scores=True)
    for n, k, width in ((70, 500, 160), (3, 140, 450)):  # rows too wide for a block's memory, in tiles of both sizes
        ops.nearest_code(rows(n, width, seed=3, dtype=torch.float32), table(k, width, seed=4))
    # No score is below +inf, in several ranges of codes.
    ops.nearest_code(rows(3, 4, seed=5, dtype=torch.float32), torch.full((300, 4), torch.nan), topk=2)
    for dtype in FLOATS:
        x, codebook = rows(37, 2, 9, seed=1, dtype=dtype), table(2, 131, 9, seed=2)
        ops.nearest_code(x, codebook)
        ops.nearest_code(x[1:], codebook, topk=3)
        ops.shared_nearest_code(
            [x[:, 0], x[:, 1, :5]], [codebook[0], codebook[1, :, :5].contiguous()], weights=(1, 0.3)
        )


def certifying() -> None:
    """For the scan in bfloat16: several ranges and steps, tiles of both heights, rows it cannot narrow down, long tables."""
    for metric in METRICS:
        for n, k, width in ((33, 1400, 33), (140, 300, 40), (70, 129, 400)):
            x, codebook = rows(n, width, seed=k, dtype=torch.float32), table(k, width, seed=n + 1)
            ops.nearest_code(x, codebook, metric=metric, return_scores=True)
    for n, k, width, groups in ((150, 900, 12, 2), (9, 1500, 5, 1)):  # codes that nothing tells apart
        x, codebook = normal(n, groups, width, seed=3), normal(groups, 1, width, seed=4).repeat(1, k, 1)
        codebook[:, k - 3 :] += 1e-5
        ops.nearest_code(x, codebook, metric="l2", return_scores=True)
        ops.nearest_code(x[:3].nan_to_num() + codebook[0, 0], codebook, return_scores=True)


def probing(calls: list[Call]) -> None:
    """The op that the CPU does not have."""
    signature = {"mma_probe": [*(("View", name) for name in "abcd"), ("int", "threads")]}
    door = Door(SimpleNamespace(mma_probe=lambda *arguments: (0, 0)), calls, signature)
    for n in (1, 6):
        a, b, c, d = (normal(n, 32, width, seed=width) for width in (8, 4, 4, 4))
        door.mma_probe(a.bfloat16(), b.bfloat16(), c, d, 1)


def quantizing() -> None:
    for metric in METRICS:
        for n, groups, k, width in ((1, 1, 1, 1), (37, 2, 71, 9), (140, 1, 300, 8)):
            x, codebook = rows(n, groups, width, seed=4, dtype=torch.float32), table(groups, k, width, seed=5)
            x.requires_grad_(), codebook.requires_grad_()
            gradients(ops.quantize(x, codebook, metric=metric), [x, codebook], seed=6)
    for dtype in FLOATS:
        xs = [rows(70, w, seed=7 + w, dtype=dtype).requires_grad_() for w in (6, 3)]
        tables = [table(99, w, seed=8 + w).requires_grad_() for w in (6, 3)]
        out = ops.shared_quantize(xs, tables, weights=(1, 0.3))
        gradients([*out.quantized, out.loss], xs + tables, seed=9)


def statistics() -> None:
    for dtype in FLOATS:
        x, ids = rows(300, 9, seed=10, dtype=dtype), torch.arange(300) * 7919 % 61
        ops.normalize_rows(x)
        gradients([ops.normalize_rows(x.requires_grad_())], [x], seed=3)
        counts, sums = ops.code_statistics(x.detach(), ids, 64)
        for metric, mean in (("cosine", False), ("l2", False), ("cosine", True)):
            state = table(64, 9, seed=11), torch.ones(64), sums.nan_to_num().clone()
            ops.ema_update_(*state, counts, sums, decay=0.9, metric=metric, normalize_mean=mean)
        codebook = table(2, 61, 5, seed=12, dtype=dtype).requires_grad_()
        gradients([ops.lookup(torch.stack([ids, ids.flip(0)], -1), codebook)], [codebook], seed=13)
        ops.lookup(ids, table(61, 16, seed=14, dtype=dtype))  # codes of whole 16 bytes
        for outside in (lambda i: ops.lookup(i, codebook[0]), lambda i: ops.code_statistics(x.detach(), i, 61)):
            with contextlib.suppress(ValueError):
                outside(ids % 70 - 4)
        _native._C.code_statistics(x.detach()[:, None], ids[:, None], torch.empty(1, 64), None, 1)  # counts alone
    # More codes than a digit of the sort has, more rows than a block sorts, one code with most of them.
    ids = torch.where(torch.arange(2500) % 3 == 0, torch.arange(2500) % 700, 5)
    ops.code_statistics(normal(2500, 2, seed=14), ids, 700)


def softmaxes() -> None:
    for metric in METRICS:
        x, codebook = rows(37, 2, 9, seed=20, dtype=torch.float32), table(2, 131, 9, seed=21)
        x.requires_grad_(), codebook.requires_grad_()
        gradients(ops.entropy_loss(x, codebook, metric=metric, temperature=0.3), [x, codebook], seed=22)
    # Ranges of codes, ranges of rows, and more channels than are added at once; eight channels are one copy.
    for n, k, width in ((20, 600, 8), (600, 33, 3), (70, 140, 72)):
        inputs = [rows(n, 1, width, seed=27, dtype=torch.float32), table(1, k, width, seed=28)]
        inputs = [t.requires_grad_() for t in inputs]
        gradients(ops.entropy_loss(*inputs, metric="dot", temperature=3.0), inputs, seed=29)
    for n, k, width, out in ((40, 131, 9, 5), (70, 140, 72, 3), (20, 600, 3, 70)):
        inputs = [rows(n, width, seed=23, dtype=torch.float32), table(k, width, seed=24), table(k, out, seed=25)]
        inputs = [t.requires_grad_() for t in inputs]
        gradients(ops.soft_quantize(*inputs), inputs, seed=26)


def multiscale() -> None:
    for grid, mode in [*(("oblong", mode) for mode in MODES), *((grid, "phi") for grid in SCALES if grid != "oblong")]:
        dtype = torch.bfloat16 if mode == "cosine" else torch.float32
        features, codebooks, options = case(grid, mode, dtype, batch=2)
        codebooks = [codebook.float() for codebook in codebooks]
        if grid == "oblong":
            features[0, 1, 2, 3], codebooks[0][5] = float("nan"), codebooks[0][2]
        leaves = [t.requires_grad_() for t in (features, *codebooks)]
        if "phi" in options:
            leaves += [options["phi"][0].requires_grad_(), options["phi"][1].requires_grad_()]
        out = ops.multiscale_quantize(features, codebooks, **options)
        gradients(out, leaves, seed=14)
        ids, how = out.indices, decoding(options, features.shape[2:])
        gradients([ops.multiscale_rows(features, ids, codebooks, **options)], [features], seed=15)
        gradients([ops.multiscale_decode(ids, codebooks, **how)], leaves[1:], seed=16)
        gradients([ops.multiscale_inputs(ids, codebooks, rule="accumulate", **how)], leaves[1:], seed=17)
        if "phi" not in options and len(options["scales"]) > 1:
            gradients([ops.multiscale_inputs(ids, codebooks, rule="chain", **how)], codebooks, seed=18)
    # A slice of more numbers than a block has threads, whose columns do not fill a block.
    features, codebooks, options = case("oblong", "cosine", batch=2)
    features, options = normal(2, features.shape[1], 13, 11, seed=20), {**options, "scales": [(2, 3), (5, 4), (13, 11)]}
    leaves = [t.requires_grad_() for t in (features, *codebooks)]
    out = ops.multiscale_quantize(features, codebooks, **options)
    gradients(out, leaves, seed=21)
    gradients([ops.multiscale_rows(features, out.indices, codebooks, **options)], [features], seed=22)
    for function, rules in (
        (ops.multiscale_decode, [{}]),
        (ops.multiscale_inputs, [{"rule": "accumulate"}, {"rule": "chain"}]),
    ):
        for rule in rules:
            made = function(out.indices, codebooks, **decoding(options, (13, 11)), **rule)
            gradients([made], codebooks, seed=23)
    # Scales without ids, and ids outside the table, which the CPU refuses.
    ids = torch.randint(37, (3, 39), generator=torch.Generator().manual_seed(19))
    ids[0, 1:5], ids[1, 0], ids[2, 20:30] = -1, -1, 99
    for mode in ("cosine", "phi"):
        _, codebooks, options = case("square", mode)
        how = decoding(options, (5, 5))
        for function, rule in ((ops.multiscale_decode, {}), (ops.multiscale_inputs, {"rule": "accumulate"})):
            with contextlib.suppress(ValueError):
                function(ids, codebooks, **how, **rule)
        with contextlib.suppress(ValueError):
            ops.multiscale_rows(normal(3, 8, 5, 5, seed=24), ids, codebooks, **options)
    with contextlib.suppress(ValueError):
        ops.multiscale_inputs(ids, codebooks, rule="chain", scales=options["scales"], size=5)


PARTS = (search, certifying, quantizing, statistics, softmaxes, multiscale)


def recorded(*parts) -> list[Call]:
    """The calls of all problems, or of some, of ops that have kernels, short ones first; searches also as certified ones."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    try:
        with warnings.catch_warnings(), record() as calls:
            warnings.simplefilter("ignore")
            if not parts:
                probing(calls)
            for part in parts or PARTS:
                part()
    finally:
        torch.use_deterministic_algorithms(False)
    silent = set(OPS) - {call.op for call in calls} if not parts else ()
    assert not silent, f"ops that no problem calls: {sorted(silent)}"
    calls = [call for call in calls if call.op in OPS]
    calls += [certified(call) for call in calls if call.op in SEARCHING]
    return sorted(calls, key=lambda call: sum(map(len, call.before)))
