"""The Inception network that FID is defined on, with the weight file that torch-fidelity publishes.

    phi(x) = mean over the last map, [B, 2048],   x in 0..255 resized to 299 x 299, (x - 128) / 128

It is the TensorFlow graph of 2015: bilinear resizing whose grid starts at a pixel's corner, averages at borders over what is
inside, and a maximum in the last block where the published architecture has an average.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567; Heusel et al., "GANs
Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", arXiv 1706.08500.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.models import checkpoint

FILE = "weights-inception-2015-12-05-6726825d.pth"
SIDE = 299
EPS = 1e-3
# No padding, and stride 2 for those that halve the map; all others keep its size.
UNPADDED = {"Conv2d_2a_3x3": 1, "Conv2d_4a_3x3": 1, "Conv2d_1a_3x3": 2, "Mixed_6a.branch3x3": 2,
            "Mixed_6a.branch3x3dbl_3": 2, "Mixed_7a.branch3x3_2": 2, "Mixed_7a.branch7x7x3_4": 2}  # fmt: skip


def installed_weights() -> Path | None:
    """torch-fidelity's weight file where its own download puts it, None where it is not."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
    return path if path.exists() else None


class Inception(nn.Module):
    """Features [B, 2048] of pictures, frozen weights.

    Args:
        state: the tensors of the weight file.

    Raises:
        ValueError: they are those of another network.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
        if len(self.names) != 94 or "Mixed_7c.branch3x3dbl_3b" not in self.names:
            raise ValueError(f"Inception: state: wanted the 94 convolutions of FID's network, got {len(self.names)}")
        for name in self.names:
            norm = {
                part: state[f"{name}.bn.{part}"].float() for part in ("weight", "bias", "running_mean", "running_var")
            }
            scale = norm["weight"] / (norm["running_var"] + EPS).sqrt()
            weight = state[f"{name}.conv.weight"].float() * scale[:, None, None, None]
            self.register_buffer(self._key(name, "weight"), weight.contiguous(memory_format=torch.channels_last))
            self.register_buffer(self._key(name, "bias"), norm["bias"] - norm["running_mean"] * scale)

    @classmethod
    def from_file(cls, path: str | Path) -> Inception:
        """The network with the weights of a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file.
        """
        return cls(checkpoint.read(path)[0]).eval()

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 2048] of uint8 images [B, 3, H, W]."""
        x = (resized(images.float(), SIDE) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._chain(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
        x = self._chain(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", "Conv2d_4a_3x3")
        x = F.max_pool2d(x, 3, 2)
        for block in ("5b", "5c", "5d"):
            x = self._block(x, block, ["branch1x1"], ["branch5x5_1", "branch5x5_2"], self._double(3), pool="mean")
        x = self._block(x, "6a", ["branch3x3"], self._double(3), pool="halve")
        for block in ("6b", "6c", "6d", "6e"):
            seven = [[f"branch7x7{kind}_{i + 1}" for i in range(count)] for kind, count in (("", 3), ("dbl", 5))]
            x = self._block(x, block, ["branch1x1"], *seven, pool="mean")
        long = [f"branch7x7x3_{i + 1}" for i in range(4)]
        x = self._block(x, "7a", ["branch3x3_1", "branch3x3_2"], long, pool="halve")
        for block, pool in (("7b", "mean"), ("7c", "max")):
            x = self._block(
                x, block, ["branch1x1"], ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
                [*self._double(2), ("branch3x3dbl_3a", "branch3x3dbl_3b")], pool=pool,
            )  # fmt: skip
        return x.mean((2, 3))

    def _block(self, x: Tensor, block: str, *branches: Sequence[str | tuple[str, str]], pool: str) -> Tensor:
        """The branches and a pooled one, joined; a pair of names ends its branch in two convolutions side by side."""
        prefix, out = f"Mixed_{block}.", []
        for branch in branches:
            *first, last = branch
            h = self._chain(x, *(prefix + name for name in first))
            out += [self._chain(h, prefix + name) for name in ([last] if isinstance(last, str) else last)]
        if pool == "halve":
            return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if pool == "mean" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*out, self._chain(mean, f"{prefix}branch_pool")], 1)

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            weight = getattr(self, self._key(name, "weight"))
            padding = 0 if name in UNPADDED else tuple((side - 1) // 2 for side in weight.shape[2:])
            bias = getattr(self, self._key(name, "bias"))
            x = F.conv2d(x, weight, bias, stride=UNPADDED.get(name, 1), padding=padding).relu_()
        return x

    @staticmethod
    def _double(count: int) -> list[str]:
        return [f"branch3x3dbl_{i + 1}" for i in range(count)]

    @staticmethod
    def _key(name: str, part: str) -> str:
        return f"{name}.{part}".replace(".", "_")


def resized(images: Tensor, side: int) -> Tensor:
    """Bilinear to [B, C, side, side] as TensorFlow 1 did it: pixel i of the result lies at i * (H / side) of the source.

    Example:
        >>> resized(torch.tensor([[[[0.0, 4.0]]]]), 4)[0, 0, 0]
        tensor([0., 2., 4., 4.])
    """
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(side, device=images.device, dtype=torch.float32) * (length / side)
        low = place.long().clamp(max=length - 1)
        shape = [side if d == dim else 1 for d in range(4)]
        share = (place - low).view(shape)
        a, b = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=length - 1))
        images = a + (b - a) * share
    return images
