"""The three quantizer modules in every shape that the tests of modules share: groups, tables, scales, phi; update rules."""

import torch
from harness import normal
from torch import nn

from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer
from tokenflow_ext.quantize._codebook import Codebook

DIM, CODES, SCALES = 12, 40, (1, 2, 4)


def _phi(kind):
    torch.manual_seed(6)
    return kind(0.1 * torch.randn(2, DIM, DIM, 3, 3)), kind(0.1 * torch.randn(2, DIM)), 0.5, (0, 0, 1)


def _multi(quantizer, **options):
    return MultiScaleQuantizer(quantizer, SCALES, **options)


KINDS = {
    "vector": lambda **k: VectorQuantizer(DIM, CODES, **k),
    "groups": lambda **k: VectorQuantizer(DIM, CODES, groups=3, **k),
    "shared": lambda **k: SharedIndexQuantizer((8, 4), CODES, weights=(1.0, 3.0), **k),
    "multi vector": lambda **k: _multi(VectorQuantizer(DIM, CODES, **k)),
    "multi shared": lambda **k: _multi(SharedIndexQuantizer((8, 4), CODES, weights=(1.0, 3.0), **k)),
    "multi phi": lambda **k: _multi(
        VectorQuantizer(DIM, CODES, metric="l2", **k), phi=_phi(nn.Parameter), loss_on="accumulated"
    ),
}
"""Modules of 12 channels and 40 codes; the multi-scale ones on maps of 4 x 4."""

UPDATES = {
    "gradient": {},
    "ema": {"update": "ema", "decay": 0.9},
    "none": {"update": "none"},
    "revived": {"dead_code_threshold": 1.0},
    "ema, revived": {"update": "ema", "decay": 0.9, "dead_code_threshold": 1.0},
    "entropy": {"entropy_weight": 0.1, "entropy_temperature": 1.0},
}
"""Options that change what a training step does to the state."""


def build(kind: str, update: str = "gradient", **options) -> nn.Module:
    """A module of `KINDS` with the options of `UPDATES`, the same whenever it is built."""
    torch.manual_seed(5)
    return KINDS[kind](backend="native", **UPDATES[update], **options)


def codebook(module: nn.Module) -> nn.Module:
    """The tables' own module, wherever it lies inside."""
    return next(part for part in module.modules() if isinstance(part, Codebook))


def features(kind: str, batch: int = 8, seed: int = 1, dtype=torch.float32) -> torch.Tensor:
    """[batch * 4, 12] rows, or maps [batch, 12, 4, 4]."""
    return (
        normal(batch, DIM, 4, 4, seed=seed, dtype=dtype)
        if "multi" in kind
        else normal(4 * batch, DIM, seed=seed, dtype=dtype)
    )


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer, and of the hits, which a state dict leaves out."""
    tensors = (*module.named_parameters(), *module.named_buffers(), ("hits", codebook(module).hits))
    return {name: tensor.detach().clone() for name, tensor in tensors if not name.endswith(".hits")}


def step(module: nn.Module, x: torch.Tensor, *, call=None, scale: float = 1.0) -> list[torch.Tensor]:
    """One training step's forward and backward: the three results, then the gradients of x and of every parameter.

    Args:
        module: whose parameters learn.
        x: its input; its gradient is a fresh one.
        call: the compiled or otherwise wrapped module, by default the module itself.
        scale: of what is differentiated.
    """
    x = x.detach().requires_grad_()
    out = (module if call is None else call)(x)
    ((out.quantized.float().square().mean() + out.loss) * scale).backward()
    return [*(t.detach() for t in out), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
