"""Agreement before speed: ids equal or certified near-ties, a sample of them against float64, values close."""

import torch

SAMPLE = 256  # rows of every comparison that are searched again in float64
UNIT = 2.0**-24  # half a unit in the last place of 1, float32


def assert_same_ids(actual, expected, xs, codebooks, metric: str, weights=None) -> torch.Tensor:
    """Rows [N] whose ids are equal; the others have to be certified near-ties and are counted.

    A near-tie is a gap of the two codes' float64 distances under the float32 rounding of the expanded squares
    |x|^2 + |c|^2 - 2 x.c that the rivals compute. A sample of `actual`, the native ids, is also held against all
    codes in float64.

    Args:
        actual: ids [N].
        expected: ids [N].
        xs: T tensors [N, D_t].
        codebooks: T tables [K, D_t].
        metric: "cosine", "l2" or "dot".
        weights: T numbers, 1 each by default.
    """
    weights = weights or [1.0] * len(xs)
    assert_nearest(actual, xs, codebooks, metric, weights)
    equal = actual == expected
    rows = (~equal).nonzero()[:, 0]
    gap, size = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.float64)
    for x, codebook, weight in zip(xs, codebooks, weights):
        x, a, b = _searched(metric, x[rows], codebook[actual[rows]], codebook[expected[rows]])
        if metric != "dot":
            gap += weight * (a.square() - b.square()).sum(-1)
        gap -= 2 * weight * (x * (a - b)).sum(-1)
        size += weight * (x.square() + a.square() + b.square()).sum(-1) * (x.shape[1] + 8)
    assert (gap.abs() <= 4 * UNIT * size).all(), f"{len(rows)} ids differ, not all of them near-ties"
    print(f"  {len(equal)} ids agree but for {len(rows)} certified near-ties")
    return equal


def assert_nearest(ids, xs, codebooks, metric: str, weights) -> None:
    """On a sample of rows the id is the float64 answer, or its score lies within the float32 bound of it.

    The canonical score is a chain of D fused multiply-adds after the norm's: at most D + 4 roundings of numbers no
    larger than 0.5 |c|^2 + sum |x_d c_d|, on either side of the comparison.
    """
    rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    scores, bound = 0.0, 0.0
    channels = sum(x.shape[1] for x in xs)
    for x, codebook, weight in zip(xs, codebooks, weights):
        x, codes = _searched(metric, x[rows], codebook)
        half = 0.5 * codes.square().sum(-1) if metric == "l2" else torch.zeros(len(codes), dtype=torch.float64)
        scores = scores + weight * (half - x @ codes.T)
        bound = bound + weight * (half + x.norm(dim=-1, keepdim=True) * codes.norm(dim=-1))
    best = scores.min(-1).indices
    chosen = ids[rows]
    at = torch.arange(len(rows))
    gap = scores[at, chosen] - scores[at, best]
    allowed = (channels + 4) * UNIT * (bound[at, chosen] + bound[at, best])
    if metric == "cosine":
        allowed = 2 * allowed  # unit rows and codes carry roundings of their own: norm, root, division
    assert (gap <= allowed).all(), f"{int((gap > allowed).sum())} of {len(rows)} ids lie beyond the float32 bound"
    print(
        f"  {int((chosen == best).sum())} of {len(rows)} sampled ids are float64's, the others within the float32 bound"
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """max|actual - expected| <= tolerance max|expected|."""
    actual, expected = actual.detach(), expected.detach()
    error, size = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= tolerance * size, f"error {error:.3g} of {size:.3g}"


def _searched(metric: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Rows or codes in float64, unit for cosine."""
    tensors = [t.double() for t in tensors]
    return [t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in tensors] if metric == "cosine" else tensors
