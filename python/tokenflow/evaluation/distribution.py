"""How far reconstructions as a whole are from the originals: Frechet distance and kernel distance of features."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from tokenflow.evaluation.measure import Measure, Seen, rounded

BLOCK = 1000
KEPT = 50 * BLOCK


class Gaussian:
    """Mean and covariance of rows [n, D] that come batch by batch, in float64; memory of O(D^2), whatever n is.

        m <- m + k / (n + k) (m' - m)
        A <- R of the QR decomposition of [A; X' - m'; (n k / (n + k))^(1/2) (m' - m)]        covariance = A^T A / (n - 1)

    for k new rows X' of mean m': Chan's update on a factor of the scatter in place of the scatter itself, so that the result is
    that of two passes over all rows. Up to D rows wait for each other, and n <= D rows are their own factor.

    Args:
        dim: D.

    Raises:
        ValueError: rows of another shape, or values that are not finite.

    Example:
        >>> g = Gaussian(2)
        >>> for row in ([0.0, 0.0], [2.0, 0.0], [1.0, 3.0]):
        ...     g.update(torch.tensor([row]))
        >>> g.mean().tolist(), (g.factor().T @ g.factor()).round(decimals=9).tolist()
        ([1.0, 1.0], [[1.0, 0.0], [0.0, 3.0]])

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(self, dim: int) -> None:
        self.count, self.waiting = 0, 0
        self._mean, self._scatter = torch.zeros(dim, dtype=torch.float64), torch.zeros(0, dim, dtype=torch.float64)
        self._rows: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Take rows [k, D] in."""
        dim = len(self._mean)
        if rows.dim() != 2 or rows.shape[1] != dim or not rows.isfinite().all():
            raise ValueError(f"Gaussian: rows: wanted finite values [k, {dim}], got {list(rows.shape)}")
        self._rows.append(rows.to("cpu", torch.float64, copy=True))
        self.count, self.waiting = self.count + len(rows), self.waiting + len(rows)
        if self.waiting >= dim:
            self._fold()

    def mean(self) -> Tensor:
        """The mean [D]."""
        self._fold()
        return self._mean

    def factor(self) -> Tensor:
        """A [r, D], r <= D, with A^T A the covariance of the at least two rows."""
        self._fold()
        return self._scatter / (self.count - 1) ** 0.5

    def _fold(self) -> None:
        if not self.waiting:
            return
        rows = torch.cat(self._rows)
        new, before = rows.mean(0), self.count - len(rows)
        parts = [self._scatter, rows - new]
        if before:
            parts.append((before * len(rows) / self.count) ** 0.5 * (new - self._mean)[None])
        scatter = torch.cat(parts)
        self._scatter = torch.linalg.qr(scatter, mode="r").R if len(scatter) > scatter.shape[1] else scatter
        self._mean = self._mean + (new - self._mean) * (len(rows) / self.count)
        self._rows, self.waiting = [], 0


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to features x [n, D] and y [m, D], see `frechet_of`.

    Raises:
        ValueError: fewer than two rows, other shapes, or values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> round(frechet(x, x + 3), 9), round(frechet(x, 2 * x), 9)
        (18.0, 4.666666667)
    """
    fitted = []
    for rows in _checked("frechet", x, y):
        fitted.append(Gaussian(rows.shape[1]))
        fitted[-1].update(rows)
    return frechet_of(*fitted)


def frechet_of(x: Gaussian, y: Gaussian) -> float:
    """Frechet distance of two Gaussians, in float64:

        |m_x - m_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^(1/2)

    With S = A^T A the last trace is the sum of the singular values of A_x A_y^T. No covariance is squared or rooted, so that
    fewer pictures than dimensions do no harm to the arithmetic; the estimate itself is biased upward with few pictures.
    """
    a, b = x.factor(), y.factor()
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float((x.mean() - y.mean()).square().sum() + traces))


def kid(x: Tensor, y: Tensor, *, block: int = BLOCK) -> tuple[float, float | None]:
    """Unbiased squared MMD of features x and y [n, D] under k(a, b) = (a . b / D + 1)^3, in float64, and its standard error:

        1 / (n (n - 1)) sum over i != j of  k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)

    The mean over disjoint random blocks of at least `block` pictures, where there are as many; the error is that of this mean,
    None for one block. A picture is never compared with its own reconstruction (i = j), because those two are not independent.

    Raises:
        ValueError: fewer than two rows, other shapes, or values that are not finite.

    Source: Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.
    """
    x, y = _checked("kid", x, y)
    if len(x) != len(y):
        raise ValueError(f"kid: y: wanted as many rows as x, {len(x)}, got {len(y)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    values = torch.stack([_mmd(x[rows], y[rows]) for rows in order.tensor_split(blocks(len(x), block))])
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def blocks(count: int, block: int = BLOCK) -> int:
    """How many blocks of `block` to almost twice as many rows `kid` makes of `count` rows."""
    return max(1, count // block)


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


class _Frechet:
    def __init__(self, dim: int) -> None:
        self.fitted = (Gaussian(dim), Gaussian(dim))
        self.dim, self.count = dim, 0

    def update(self, originals: Tensor, images: Tensor) -> None:
        self.count += len(originals)
        for gaussian, rows in zip(self.fitted, (originals, images), strict=True):
            gaussian.update(rows)

    def measure(self, name: str, protocol: str) -> Measure:
        n, d = self.count, self.dim
        few = f", {n} pictures for {d} dimensions: biased upward" if n < 10 * d else ""
        return Measure(name, frechet_of(*self.fitted), f"{protocol}{few}", digits=3)


class _Kernel:
    """Pairs of features, at most KEPT of them: of more, a sample without replacement in which each is as likely (reservoir)."""

    def __init__(self, dim: int) -> None:
        self.pairs: list[Tensor] = []
        self.count, self.draw = 0, random.Random(0)

    def update(self, originals: Tensor, images: Tensor) -> None:
        for pair in torch.stack([originals, images], 1):
            self.count += 1
            if len(self.pairs) < KEPT:
                self.pairs.append(pair.clone())
            elif (place := self.draw.randrange(self.count)) < KEPT:
                self.pairs[place] = pair.clone()

    def measure(self, name: str, protocol: str) -> Measure:
        originals, images = torch.stack(self.pairs, 1)
        value, error = kid(originals, images)
        some = f" of a random {KEPT} of the pictures" if self.count > KEPT else ""
        number = blocks(len(self.pairs))
        how = f"{number} block{'s' * (number > 1)} of {len(self.pairs) // number}"
        return Measure(name, value, f"{protocol}, {how}{some}", digits=5, error=error)


class DistributionMeter:
    """A distance between the features of all originals and of all reconstructions, both rounded to 8 bits.

    Memory does not grow with the number of pictures: Frechet's distance keeps means and factors of the scatter, the kernel distance,
    which is defined on pairs of pictures, the features of KEPT pictures.

    Args:
        name: of the number.
        features: uint8 images [n, 3, H, W] -> [n, D].
        protocol: how features are made.
        kernel: kernel distance instead of Frechet's.
    """

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], protocol: str, *, kernel: bool = False) -> None:
        self.name, self.features, self.protocol = name, features, protocol
        self.kind, self.found = _Kernel if kernel else _Frechet, None

    def update(self, seen: Seen) -> None:
        originals, images = (self.features(rounded(t)).float().cpu() for t in (seen.originals, seen.images))
        if self.found is None:
            self.found = self.kind(originals.shape[1])
        self.found.update(originals, images)

    def measures(self) -> list[Measure]:
        if self.found is None or self.found.count < 2:
            return []
        return [self.found.measure(self.name, self.protocol)]
