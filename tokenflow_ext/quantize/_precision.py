"""What chooses codes stays float32 (float64) under half() and autocast, so that the tokens stay those of float32."""

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


class FullPrecision(nn.Module):
    """A module whose own tensors move devices with the model around it, but never become half precision.

    Attributes:
        counters: names of int64 tensors that are plain attributes and move with the module. They are no buffers, because
            DistributedDataParallel would overwrite every rank's by rank 0's.
    """

    counters: tuple[str, ...] = ()

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_load_state_dict_post_hook(_in_full_precision)

    def _apply(self, fn, recurse=True):
        owned = {**self._parameters, **self._buffers}
        tensors = {name: t for name, t in owned.items() if t is not None and t.dtype in (torch.float32, torch.float64)}
        # Detached, for what `_apply` moves in place is the gradient itself.
        before = {name: (t.detach(), t.grad if t.grad is None else t.grad.detach()) for name, t in tensors.items()}
        super()._apply(fn, recurse)
        for name, (value, grad) in before.items():
            tensor = getattr(self, name)
            if tensor.dtype not in (torch.float32, torch.float64):
                tensor.data = value.to(tensor.device)
                if grad is not None:
                    tensor.grad = grad.to(tensor.device)
        for name in self.counters:
            counts = getattr(self, name)
            moved = fn(counts)
            # Memory that a tensor without any has just been given holds anything.
            setattr(self, name, moved.zero_() if counts.is_meta and not moved.is_meta else moved)
        return self


def _in_full_precision(module: nn.Module, _) -> None:
    """After load_state_dict(assign=True) of a file in half precision: the module's own tensors are float32 again."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.dtype in HALVES:
            tensor.data = tensor.data.float()


def without_autocast(x: Tensor):
    """A region of x's device where autocast is off."""
    return torch.autocast(x.device.type, enabled=False)


class _Layer(FullPrecision):
    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return super().forward(x)


class Linear(_Layer, nn.Linear):
    """nn.Linear in its own precision."""


class LayerNorm(_Layer, nn.LayerNorm):
    """nn.LayerNorm in its own precision."""


class RMSNorm(_Layer, nn.RMSNorm):
    """nn.RMSNorm in its own precision."""
