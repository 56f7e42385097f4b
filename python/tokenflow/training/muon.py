"""Muon: momentum whose matrix is replaced by the nearest one with all singular values about 1.

    b <- mu b + (1 - mu) g        u = polar(g + mu (b - g))        w <- (1 - lr decay) w - lr 0.2 sqrt(max(m, n)) u

A matrix of size m x n has entries of root mean square 0.2 after the scaling, about what AdamW's steps have, so one rate serves
both. A convolution is the matrix of its output channels. torch.optim.Muon takes matrices alone, and torch 2.6 has none.

Source: Jordan et al., "Muon", kellerjordan.github.io/posts/muon (2024); the scaling is that of Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def polar(matrix: Tensor) -> Tensor:
    """U V^T, roughly, of a matrix [m, n] = U S V^T: five steps of s <- a s + b s^3 + c s^5 on the singular values.

    The polynomials are gathered on the smaller Gram matrix and applied once, which for 128 x 1152 is a third of the work.

    Example:
        >>> s = torch.linalg.svdvals(polar(torch.randn(8, 30, generator=torch.Generator().manual_seed(0))))
        >>> bool((s > 0.5).all() and (s < 1.3).all())
        True
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    gathered = None
    for iteration in range(ITERATIONS):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        gathered = step if gathered is None else step @ gathered
        if iteration + 1 < ITERATIONS:
            gram = step @ gram @ step
    x = gathered @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions.

    Args:
        parameters: of two or more dimensions.
        lr: the rate.
        momentum: mu.
        weight_decay: decoupled, as AdamW's.

    Raises:
        ValueError: a parameter of fewer dimensions.

    Example:
        >>> layer = torch.nn.Conv2d(3, 8, 3)
        >>> layer(torch.ones(1, 3, 4, 4)).sum().backward()
        >>> Muon([layer.weight], lr=1e-3).step()
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() < 2:
                    raise ValueError(f"Muon: parameters: wanted two or more dimensions, got {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that are there; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, **{name: group[name] for name in ("lr", "momentum", "weight_decay")})
        return loss

    def _move(self, p: nn.Parameter, lr: float, momentum: float, weight_decay: float) -> None:
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(p.grad, 1 - momentum)
        update = polar(p.grad.lerp(average, momentum).flatten(1))
        scale = 0.2 * max(update.shape) ** 0.5
        p.mul_(1 - lr * weight_decay).add_(update.reshape(p.shape), alpha=-lr * scale)


def matrices(module: nn.Module, *, least: int = 16) -> list[nn.Parameter]:
    """Weights of the module's linear layers and convolutions whose smaller side, as matrices, is at least `least`.

    Example:
        >>> [list(p.shape) for p in matrices(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Conv2d(32, 8, 1)))]
        [[32, 16]]
    """
    layers = (m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return [m.weight for m in layers if min(m.weight.flatten(1).shape) >= least]
