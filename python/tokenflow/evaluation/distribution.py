"""How far reconstructions as a whole are from the originals: Frechet distance and kernel distance of features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenflow.evaluation.measure import Measure, Seen, rounded

BLOCK = 1000


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features x [n, D] and y [m, D], in float64:

        |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

    With S = A^T A, A the centred features over sqrt(n - 1) or the triangular factor of their QR decomposition, the last trace is
    the sum of the singular values of A_x A_y^T. No covariance is squared or rooted, so that fewer pictures than dimensions do
    no harm to the arithmetic; the estimate itself is biased upward with few pictures.

    Raises:
        ValueError: fewer than two rows, other shapes, or values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> round(frechet(x, x + 3), 9), round(frechet(x, 2 * x), 9)
        (18.0, 4.666666667)
    """
    x, y = _checked("frechet", x, y)
    factors = []
    for rows in (x, y):
        factor = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
        factors.append(torch.linalg.qr(factor, mode="r").R if len(rows) > rows.shape[1] else factor)
    a, b = factors
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + traces))


def kid(x: Tensor, y: Tensor, *, block: int = BLOCK) -> tuple[float, float | None]:
    """Unbiased squared MMD of features x and y [n, D] under k(a, b) = (a . b / D + 1)^3, in float64, and its standard error:

        1 / (n (n - 1)) sum over i != j of  k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    The mean over disjoint random blocks of about `block` pictures; the error is that of this mean, None for one block. A
    picture is never compared with its own reconstruction (i = j), because those two are not independent.

    Raises:
        ValueError: fewer than two rows, other shapes, or values that are not finite.

    Source: Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.
    """
    x, y = _checked("kid", x, y)
    if len(x) != len(y):
        raise ValueError(f"kid: y: wanted as many rows as x, {len(x)}, got {len(y)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    values = torch.stack([_mmd(x[rows], y[rows]) for rows in order.tensor_split(max(1, len(x) // block))])
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    table = kernel(x, x) + kernel(y, y) - kernel(x, y) - kernel(y, x)
    return (table.sum() - table.diagonal().sum()) / (len(x) * (len(x) - 1))


def _checked(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"{name}: x: wanted [n, D] and [m, D] with n, m > 1, got {list(x.shape)} and {list(y.shape)}")
    x, y = x.double(), y.double()
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"{name}: x: wanted finite features, got others")
    return x, y


class DistributionMeter:
    """A distance between the features of all originals and of all reconstructions, both rounded to 8 bits.

    Args:
        name: of the number.
        features: uint8 images [n, 3, H, W] -> [n, D].
        protocol: how features are made.
        kernel: kernel distance instead of Frechet's.
    """

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], protocol: str, *, kernel: bool = False) -> None:
        self.name, self.features, self.protocol, self.kernel = name, features, protocol, kernel
        self.found: tuple[list[Tensor], list[Tensor]] = ([], [])

    def update(self, seen: Seen) -> None:
        for kept, images in zip(self.found, (seen.originals, seen.images), strict=True):
            kept.append(self.features(rounded(images)).float().cpu())

    def measures(self) -> list[Measure]:
        originals, images = (torch.cat(kept) for kept in self.found)
        n, d = originals.shape
        if n < 2:
            return []
        if self.kernel:
            value, error = kid(originals, images)
            return [Measure(self.name, value, f"{self.protocol}, blocks of {min(n, BLOCK)}", digits=5, error=error)]
        few = f", {n} pictures for {d} dimensions: biased upward" if n < 10 * d else ""
        return [Measure(self.name, frechet(originals, images), f"{self.protocol}{few}", digits=3)]
