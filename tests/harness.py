"""What the op tests share: certified near-ties, the canonical score bit for bit, twins in float64, opcheck and compile.

Searches in different arithmetic may disagree on a row only where the two codes' exact scores differ by less than the
rounding of the scores themselves; such rows are counted and printed, every other difference fails.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenflow_ext
from tokenflow_ext import ops, reference

METRICS = ("cosine", "l2", "dot")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals of a seed, the same whatever ran before."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def search_type(*tensors: torch.Tensor) -> torch.dtype:
    """The type that api.md searches in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def exact_scores(xs, codebooks, ids, metric: str, weights=None) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 scores [N] of the pairs (row n, code ids[n]) and, per pair, sum |terms| [N].

    Args:
        xs: T tensors [N, D_t].
        codebooks: T tables [K, D_t].
        ids: [N].
        metric: "cosine", "l2" or "dot".
        weights: T numbers, 1 each by default.
    """
    score, size = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    for x, codebook, weight in zip(xs, codebooks, weights or [1.0] * len(xs)):
        y, q = x.double(), codebook.double()[ids]
        if metric == "cosine":
            y, q = (v / v.norm(dim=-1, keepdim=True).clamp_min(1e-12) for v in (y, q))
        products = weight * y * q
        start = weight * 0.5 * q.square().sum(-1) if metric == "l2" else 0.0
        score, size = score + start - products.sum(-1), size + start + products.abs().sum(-1)
    return score, size


def near_ties(actual, expected, xs, codebooks, metric: str, weights=None) -> int:
    """How many of the ids [N] differ; fails where a difference is more than rounding.

    A score of C terms in fused multiply-adds, with unit rows and codes rounded beforehand, is within
    2 (C + 4) u sum|terms| of the exact one.
    """
    xs = [x.detach().reshape(-1, x.shape[-1]) for x in xs]
    codebooks = [c.detach() for c in codebooks]
    actual, expected = actual.reshape(-1), expected.reshape(-1)
    assert actual.shape == expected.shape == xs[0].shape[:1]
    rows = (actual != expected).nonzero()[:, 0]
    unit = UNIT_ROUNDOFF[search_type(*xs, *codebooks)]
    channels = sum(x.shape[-1] for x in xs)
    picked = [x[rows] for x in xs]
    a, a_size = exact_scores(picked, codebooks, actual[rows], metric, weights)
    b, b_size = exact_scores(picked, codebooks, expected[rows], metric, weights)
    bound = 2 * (channels + 4) * unit * (a_size + b_size)
    wrong = int((~((a - b).abs() <= bound)).sum())
    assert wrong == 0, (
        f"{wrong} of {len(actual)} ids differ without a near-tie, largest gap {float((a - b).abs().max()):.3g}"
    )
    print(f"{len(actual)} ids, {len(rows)} certified near-ties")
    return len(rows)


def group_near_ties(actual, expected, x, codebook, metric: str) -> int:
    """`near_ties` for x [..., D] with codebook [K, D], or x [..., G, D] with [G, K, D]."""
    if codebook.dim() == 2:
        return near_ties(actual, expected, [x], [codebook], metric)
    return sum(near_ties(actual[..., g], expected[..., g], [x[..., g, :]], [c], metric) for g, c in enumerate(codebook))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """round(a b + c) in float32, once: the float64 sum is rounded to odd before it is rounded to float32."""
    product = a.astype(np.float64) * b.astype(np.float64)
    product, c = np.broadcast_arrays(product, c.astype(np.float64))
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64).copy()
    bits -= (error != 0) & ((error > 0) != (total > 0))
    bits |= error != 0
    return bits.view(np.float64).astype(np.float32)


def canonical_unit(x: np.ndarray) -> np.ndarray:
    """y = x / max(sqrt(|x|^2), 1e-12) of rows [N, D] in the canonical order of operations."""
    square = np.zeros(len(x), np.float32)
    for d in range(x.shape[1]):
        square = fma(x[:, d], x[:, d], square)
    return x / np.maximum(np.sqrt(square), np.float32(1e-12))[:, None]


def canonical_scores(xs, codebooks, metric: str, weights=None) -> np.ndarray:
    """The float32 scores [N, K] that every backend has to give, bit for bit (api.md, "Canonical score")."""
    xs, codebooks = [x.float().numpy() for x in xs], [c.float().numpy() for c in codebooks]
    weights = [np.float32(w) for w in weights or [1.0] * len(xs)]
    score = np.zeros((len(xs[0]), len(codebooks[0])), np.float32)
    if metric == "cosine":
        xs, codebooks = [canonical_unit(x) for x in xs], [canonical_unit(c) for c in codebooks]
    if metric == "l2":
        for codebook, weight in zip(codebooks, weights):
            square = np.zeros(len(codebook), np.float32)
            for d in range(codebook.shape[1]):
                square = fma(codebook[:, d], codebook[:, d], square)
            score += weight * (np.float32(0.5) * square)
    for x, codebook, weight in zip(xs, codebooks, weights):
        for d in range(x.shape[1]):
            score = fma(-(weight * x[:, d])[:, None], codebook[None, :, d], score)
    return score


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "", size: float = 1e-30
) -> None:
    """max|actual - expected| <= tolerance max(|expected|, size), with NaN in the same places."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    actual, expected = actual.nan_to_num(), expected.nan_to_num()
    if actual.numel():
        error, size = float((actual - expected).abs().max()), max(size, float(expected.abs().max()))
        assert error <= tolerance * size, f"{what}: error {error:.3g} of {size:.3g}"


def assert_gradients(actual, expected, tolerance: float, size: float = 0.0) -> None:
    """`assert_near` for every gradient, where one that cancels may be off by a share of the largest, or of `size`."""
    size = max([float(b.abs().max()) for b in expected if b.numel()] + [size])
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_near(a, b, tolerance, f"gradient {i}", size)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that equal means every bit, -0 and NaN included."""
    return tensor.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Detached copies that require grad."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def frozen_quantize(xs, codebooks, ids, metric: str, commitment_weight=0.25, codebook_weight=1.0, at=None):
    """The surrogate of shared_quantize whose ids and stop-gradient values are constants: (quantized [N, C], loss).

    Args:
        xs: T tensors [N, D_t].
        codebooks: T tables [K, D_t].
        ids: [N].
        metric: "cosine" normalises rows and codes per table.
        commitment_weight: of the term that moves xs.
        codebook_weight: of the term that moves the codebooks.
        at: (xs, codebooks) where the stop-gradient values are taken; the arguments themselves by default.
    """

    def searched(xs, codebooks):
        rows, codes = list(xs), [c[ids] for c in codebooks]
        if metric == "cosine":
            rows, codes = (
                [torch.nn.functional.normalize(v, dim=-1, eps=1e-12) for v in part] for part in (rows, codes)
            )
        return torch.cat(rows, -1), torch.cat(codes, -1)

    y, q = searched(xs, codebooks)
    y0, q0 = searched(*(at or (xs, codebooks)))
    y0, q0 = y0.detach(), q0.detach()
    loss = codebook_weight * (q - y0).square().mean() + commitment_weight * (q0 - y).square().mean()
    return q0 + (y - y0), loss


def opcheck(name: str, *args) -> None:
    """torch.library.opcheck of torch.ops.tokenflow_ext.<name>: schema, autograd, fake tensors, AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.tokenflow_ext, name).default, args)


def compiled(function, backend: str = "aot_eager"):
    """`function` as one graph."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def assert_sentence(error: type[Exception], op: str, argument: str, call, *args, **kwargs) -> None:
    """`call` raises exactly that error with "op: argument: wanted ..., got ..."; the argument may name its element."""
    with pytest.raises(Exception) as caught:
        call(*args, **kwargs)
    assert caught.type is error, f"{caught.type}: {caught.value}"
    assert re.match(rf"{op}: {re.escape(argument)}(\[\d+\])?: wanted .*got ", str(caught.value)), caught.value


def with_threads(counts: Sequence[int], call) -> list:
    """call() under each thread count."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def twin(name: str):
    """The native op and its twin."""
    return getattr(ops, name), getattr(reference, name)


def python(script: str, *, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that imports the same package; from its folder, as `-c` puts the current one first."""
    package = Path(tokenflow_ext.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), **environment}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, cwd=cwd or package, capture_output=True, text=True, timeout=300)
