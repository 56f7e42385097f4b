"""Problems that call every op of the core where it is hardest: rare numbers, ties, odd widths, every type and option."""

import warnings

import torch
from harness import FLOATS, METRICS, normal
from multiscale_cases import MODES, SCALES, case, decoding

from replay import Call, record, signatures
from tokenflow_ext import ops


def rows(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Normals with what is rare: NaN, infinities, zeros of both signs, denormals, values near overflow."""
    x = normal(*shape, seed=seed, dtype=dtype)
    flat = x.view(-1, shape[-1])
    for n, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        if 3 * n < len(flat):
            flat[3 * n, n % shape[-1]] = value
    if len(flat) > 24:
        flat[17], flat[18], flat[19], flat[20] = 0, -0.0, flat[19] * 2.0**-140, flat[20] * torch.finfo(dtype).tiny
        flat[21] *= torch.finfo(dtype).max / 64
    return x


def table(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Codes with copies, so that scores tie, a zero code, a denormal one and one that is not a number."""
    codes = normal(*shape, seed=seed, dtype=dtype)
    flat = codes.view(-1, *shape[-2:])
    if shape[-2] > 30:
        flat[:, 20:25], flat[:, 26], flat[:, 27] = flat[:, 3:8].clone(), 0, flat[:, 27] * torch.finfo(dtype).tiny
        flat[:, 28, 0] = float("nan")
        flat[:, -1] = flat[:, 0]
    return codes


def gradients(outputs, inputs, seed: int):
    """The backward of float outputs, with upstream gradients of that seed."""
    outputs = [o for o in outputs if o.is_floating_point()]
    upstream = [normal(*o.shape, seed=seed + i, dtype=o.dtype) for i, o in enumerate(outputs)]
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)


def search(dtype: torch.dtype) -> None:
    for metric in METRICS:
        for n, k, width in (
            (1, 1, 1),
            (5, 31, 3),
            (67, 4097, 8),
            (30, 4097, 40),
            (70, 171, 33),
            (300, 1500, 40),
            (0, 4, 3),
        ):
            x, codebook = rows(n, width, seed=k, dtype=dtype), table(k, width, seed=n + 1)
            ops.nearest_code(x, codebook, metric=metric, return_scores=True)
            if k > 100:
                ops.nearest_code(x, codebook, metric=metric, topk=70, window=(3, k - 2), return_scores=True)
    x, codebook = rows(67, 2, 9, seed=1, dtype=dtype), table(2, 131, 9, seed=2)
    ops.nearest_code(x, codebook, return_scores=True)
    ops.shared_nearest_code([x[:, 0], x[:, 1, :5]], [codebook[0], codebook[1, :, :5].contiguous()], weights=(1, 0.3))
    ops.normalize_rows(x)
    gradients([ops.normalize_rows(x.requires_grad_())], [x], seed=3)


def quantizing(dtype: torch.dtype) -> None:
    for metric in METRICS:
        for n, groups, k, width in ((1, 1, 1, 1), (67, 2, 171, 9), (300, 1, 4097, 8), (900, 1, 600, 6)):
            x, codebook = rows(n, groups, width, seed=4, dtype=dtype), table(groups, k, width, seed=5)
            x.requires_grad_(), codebook.requires_grad_()
            gradients(ops.quantize(x, codebook, metric=metric), [x, codebook], seed=6)
    xs = [rows(70, w, seed=7 + w, dtype=dtype).requires_grad_() for w in (6, 3)]
    tables = [table(99, w, seed=8 + w).requires_grad_() for w in (6, 3)]
    out = ops.shared_quantize(xs, tables, weights=(1, 0.3))
    gradients([*out.quantized, out.loss], xs + tables, seed=9)


def statistics(dtype: torch.dtype) -> None:
    x, ids = rows(500, 33, seed=10, dtype=dtype), torch.arange(500) * 7919 % 61
    counts, sums = ops.code_statistics(x, ids, 64)
    for metric, mean in (("cosine", False), ("l2", False), ("cosine", True)):
        state = table(64, 33, seed=11, dtype=sums.dtype), torch.ones(64, dtype=sums.dtype), sums.nan_to_num().clone()
        ops.ema_update_(*state, counts, sums, decay=0.9, metric=metric, normalize_mean=mean)
    codebook = table(2, 61, 5, seed=12, dtype=dtype).requires_grad_()
    gradients([ops.lookup(torch.stack([ids, ids.flip(0)], -1), codebook)], [codebook], seed=13)


def softmaxes(dtype: torch.dtype) -> None:
    for metric in METRICS:
        x, codebook = rows(67, 2, 9, seed=20, dtype=dtype), table(2, 131, 9, seed=21)
        x.requires_grad_(), codebook.requires_grad_()
        gradients(ops.entropy_loss(x, codebook, metric=metric, temperature=0.3), [x, codebook], seed=22)
    inputs = [rows(40, 9, seed=23, dtype=dtype), table(131, 9, seed=24), table(131, 5, seed=25)]
    inputs = [t.requires_grad_() for t in inputs]
    gradients(ops.soft_quantize(*inputs), inputs, seed=26)


def multiscale(dtype: torch.dtype) -> None:
    for grid in SCALES:
        for mode in MODES:
            features, codebooks, options = case(grid, mode, dtype)
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


def problems() -> list[Call]:
    """The recorded calls of all problems in all types, at least one an op, with scratch for three threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with warnings.catch_warnings(), record() as calls:
            warnings.simplefilter("ignore", RuntimeWarning)
            for dtype in FLOATS:
                for part in (search, quantizing, statistics, softmaxes, multiscale):
                    part(dtype)
    finally:
        torch.set_num_threads(threads)
    silent = set(signatures()) - {call.op for call in calls}
    assert not silent, f"ops that no problem calls: {sorted(silent)}"
    return calls
