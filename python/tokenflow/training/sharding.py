"""FSDP2: weights, gradients, averages and the optimiser's moments in pieces, one a rank; the files stay whole.

Accelerate's own FSDP2 takes no CPU ranks and no parameters of choice, so torch's `fully_shard` is called here. Whole on every
rank stay the codebooks, which their rules write to, the decoder's last layer, whose gradient the adaptive weight asks for, and
parameters without dimensions, which FSDP2 does not take; the ranks average their gradients.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tokenflow.errors import Missing
from tokenflow.models import Tokenizer
from tokenflow.training.run import WeightAverage

WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: Tokenizer, last_layer: Tensor, device: torch.device) -> None:
    """Shard the model in place, every block of a stack on its own, so that one at a time is whole.

    Raises:
        Missing: a torch below 2.7, whose FSDP2 leaves no parameters of choice whole.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise Missing(f"train: shard: wanted torch 2.7 or newer, got {torch.__version__}: pip install 'torch>=2.7'")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {last_layer, *model.quantizer.parameters(), *(p for p in model.parameters() if p.dim() == 0)}
    # From the inside out, as FSDP2 wants it.
    for stack in [module for module in reversed(list(model.modules())) if isinstance(module, nn.ModuleList)]:
        for block in stack:
            if any(p not in whole for p in block.parameters()):
                fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def clip_grad_norm_(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """The norm of the whole gradient, which is scaled down to `largest`, as `nn.utils.clip_grad_norm_` does with tensors alike."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    pieces = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    wholes = [g for g in gradients if not isinstance(g, DTensor)]
    square = torch.zeros((), device=gradients[0].device)
    for piece in pieces:
        square += piece.square().sum()
    dist.all_reduce(square)
    norm = (square + sum(g.square().sum() for g in wholes)).sqrt()
    if math.isfinite(largest):
        torch._foreach_mul_([*pieces, *wholes], (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class ShardedModel:
    """The model's whole state dict, on rank 0; every rank has to ask for it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return states.get_model_state_dict(self.model, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.set_model_state_dict(self.model, state, options=states.StateDictOptions(full_state_dict=True))


class ShardedOptimizer:
    """The optimiser's, by the names of parameters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return states.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states.set_optimizer_state_dict(
            self.model, self.optimizer, state, options=states.StateDictOptions(full_state_dict=True)
        )


class ShardedAverage:
    """The averages'."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Any]:
        whole = {name: _whole(value) for name, value in self.average.average.items()}
        return {"updates": self.average.updates, "average": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.updates = state["updates"]
        for name, value in self.average.average.items():
            saved = state["average"][name]
            if isinstance(value, DTensor):
                saved = distribute_tensor(saved.to(value.device), value.device_mesh, value.placements)
            value.copy_(saved)


class Portrait:
    """The finished weights as a whole model on rank 0's CPU, None on the others.

    Args:
        model: before it is sharded.
        first: whether this is rank 0.
    """

    def __init__(self, model: Tokenizer, first: bool) -> None:
        self.copy = copy.deepcopy(model).cpu().eval() if first else None

    def of(self, model: nn.Module, average: WeightAverage | None) -> Tokenizer | None:
        """Filled with the weights of the sharded model, or their averages; every rank has to ask."""
        state = ShardedModel(model).state_dict()
        averages = {} if average is None else ShardedAverage(average).state_dict()["average"]
        if self.copy is not None:
            self.copy.load_state_dict({**state, **averages})
        return self.copy


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
