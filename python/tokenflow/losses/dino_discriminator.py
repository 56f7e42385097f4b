"""UniTok's discriminator: small heads on the features of a frozen DINOv2.

    t_l = patch tokens of block l + its class token  [C, h w],   l = 0, 2, 5, 8, 11
    head(t) = conv1( r(act(norm(conv1(t)))) ),   r(t) = (t + act(norm(conv9(t)))) / sqrt(2),   act = leaky ReLU 0.2

conv1 and conv9 run over the cells in raster order with kernels 1 and 9, the latter circular; the norm is GroupNorm with 32
groups. A picture is brought to a side that the tower's patches divide: cropped or shrunk by area averaging, half of the time
each.

Source: Sauer et al., "StyleGAN-T", ICML 2023, with DINOv2-S/14 in place of DINO, as UniTok uses it. The factor 1/sqrt(2) is
StyleGAN-T's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import Missing
from tokenflow.losses import _check

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS = (0, 2, 5, 8, 11)


class Head(nn.Module):
    """Tokens [B, C, N] -> [B, N].

    Args:
        width: C.
        groups: of the norm.
        kernel: of the second convolution, odd.
    """

    def __init__(self, width: int, groups: int = 32, kernel: int = 9) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Conv1d(width, width, 1), nn.GroupNorm(groups, width), nn.LeakyReLU(0.2))
        self.wide = nn.Sequential(
            # Padding by index in `forward`: circular padding refuses a sequence shorter than the pad.
            nn.Conv1d(width, width, kernel),
            nn.GroupNorm(groups, width),
            nn.LeakyReLU(0.2),
        )
        self.out = nn.Conv1d(width, 1, 1)
        self.pad = kernel // 2

    def forward(self, tokens: Tensor) -> Tensor:
        x, n = self.point(tokens), tokens.shape[-1]
        around = torch.arange(-self.pad, n + self.pad, device=x.device).remainder(n)
        return self.out((x + self.wide(x[..., around])) * 0.5**0.5)[:, 0]


class DinoDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> [B, levels * h w], one number a cell and level.

    Args:
        tower: frozen features: a module from normalised images [B, 3, 14 h, 14 w] to one [B, 1 + h w, width] a level, class
            token first; see `dinov2_tower`. It is kept in eval mode without gradients of its own.
        width: channels of its tokens, a multiple of `groups`.
        levels: how many it gives.
        patch: side of its patches.
        side: largest side that it is given; smaller pictures are shrunk to the next multiple of `patch`.
        groups: of the heads' norms.
        crop: share of passes in training that see a crop; the others, and eval mode, see the shrunk picture.

    Attributes:
        joint: pictures may share a pass without changing each other's values, and they see the same crop if they do.

    Raises:
        ValueError: a width that `groups` does not divide, a side below the patch, levels below 1 or a crop outside [0, 1].

    Example:
        >>> class Tower(torch.nn.Module):
        ...     def forward(self, x):
        ...         tokens = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)[..., :32]
        ...         return [torch.cat([tokens.mean(1, keepdim=True), tokens], 1)] * 2
        >>> DinoDiscriminator(Tower(), width=32, levels=2)(torch.zeros(3, 3, 64, 64)).shape
        torch.Size([3, 32])
    """

    joint = True

    def __init__(
        self,
        tower: nn.Module,
        *,
        width: int = 384,
        levels: int = len(BLOCKS),
        patch: int = 14,
        side: int = 224,
        groups: int = 32,
        crop: float = 0.5,
    ) -> None:
        super().__init__()
        _check.at_least("DinoDiscriminator", "levels", levels, 1)
        _check.at_least("DinoDiscriminator", "patch", patch, 1)
        _check.at_least("DinoDiscriminator", "side", side, patch)
        if width < 1 or width % groups:
            raise ValueError(f"DinoDiscriminator: width: wanted a multiple of {groups} for GroupNorm, got {width}")
        if not 0 <= crop <= 1:
            raise ValueError(f"DinoDiscriminator: crop: wanted a number in [0, 1], got {crop}")
        self.tower = tower.requires_grad_(False).eval()
        self.heads = nn.ModuleList(Head(width, groups) for _ in range(levels))
        self.width, self.patch, self.side, self.crop = width, patch, side, crop
        # x in [-1, 1] is (x + 1) / 2 in [0, 1].
        for name, values in (("mean", [2 * m - 1 for m in MEAN]), ("deviation", [2 * d for d in DEVIATION])):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DinoDiscriminator:
        """Training mode for the heads alone."""
        super().train(mode)
        self.tower.eval()
        return self

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One number a cell and level.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            generator: of the crop, on the CPU.

        Raises:
            TypeError: images that are not floats.
            ValueError: another shape, sides below the patch, or a tower that gives something else than it should.
        """
        _check.images("DinoDiscriminator", "images", images)
        if min(images.shape[2:]) < self.patch:
            raise ValueError(
                f"DinoDiscriminator: images: wanted sides of at least {self.patch}, got {list(images.shape[2:])}"
            )
        seen = self._fitted(images, generator)
        cells = seen.shape[2] * seen.shape[3] // self.patch**2
        if len(images) == 0:
            return seen.sum((1, 2, 3))[:, None].expand(0, len(self.heads) * cells)
        levels = self.tower((seen - self.mean) / self.deviation)
        wanted = [len(images), 1 + cells, self.width]
        shapes = [list(level.shape) for level in levels]
        if shapes != [wanted] * len(self.heads):
            raise ValueError(
                f"DinoDiscriminator: tower: wanted {len(self.heads)} tensors of shape {wanted}, got shapes {shapes}"
            )
        tokens = [(level[:, 1:] + level[:, :1]).transpose(1, 2) for level in levels]
        return torch.cat([head(t) for head, t in zip(self.heads, tokens, strict=True)], dim=1)

    def _fitted(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """The pictures, cropped or shrunk to sides that patches fill."""
        size = [min(n, self.side) // self.patch * self.patch for n in images.shape[2:]]
        if list(images.shape[2:]) == size:
            return images
        # Draws on the CPU, so that nothing waits for the device.
        if self.training and float(torch.rand((), generator=generator)) < self.crop:
            top, left = (
                int(torch.randint(n - m + 1, (), generator=generator))
                for n, m in zip(images.shape[2:], size, strict=True)
            )
            return images[:, :, top : top + size[0], left : left + size[1]]
        return F.interpolate(images, size, mode="area") if len(images) else images[:, :, : size[0], : size[1]]


class Dinov2Tower(nn.Module):
    """Outputs of some blocks of a transformers `Dinov2Model`: normalised images [B, 3, H, W] -> a [B, 1 + h w, C] each.

    Args:
        model: the model.
        blocks: whose outputs, counted from 0.

    Raises:
        ValueError: blocks that it does not have.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int] = BLOCKS) -> None:
        super().__init__()
        depth = model.config.num_hidden_layers
        if not blocks or not all(0 <= block < depth for block in blocks):
            raise ValueError(f"Dinov2Tower: blocks: wanted numbers below its depth {depth}, got {tuple(blocks)}")
        self.model, self.blocks = model, tuple(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        hidden = self.model(pixel_values=images, output_hidden_states=True).hidden_states
        return [hidden[block + 1] for block in self.blocks]


def dinov2_tower(folder: str | Path, blocks: Sequence[int] = BLOCKS) -> Dinov2Tower:
    """DINOv2 from a folder that holds transformers' config.json and model.safetensors (facebook/dinov2-small); no download.

    Args:
        folder: where they lie.
        blocks: whose outputs the discriminator judges, counted from 0.

    Raises:
        Missing: no such folder, or transformers is not installed.
        ValueError: blocks that the model does not have, a broken file, or the weights of another model.

    Example:
        >>> dinov2_tower("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tokenflow.errors.Missing: dinov2_tower: folder: wanted a copy of facebook/dinov2-small, ..., got nowhere
    """
    if not (Path(folder) / "config.json").is_file():
        raise Missing(
            "dinov2_tower: folder: wanted a copy of facebook/dinov2-small, which is not downloaded, with its config.json, "
            f"got {folder}"
        )
    if importlib.util.find_spec("transformers") is None:
        raise Missing("the discriminator's DINOv2 needs transformers: pip install transformers")
    from transformers import Dinov2Model

    try:
        model, loaded = Dinov2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:  # safetensors' and torch's errors have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"dinov2_tower: folder: wanted the weights of a DINOv2, got {folder} ({reason})") from error
    # What a file lacks is drawn at random by transformers. The token of masked patches is never read.
    missing = sorted({*loaded["missing_keys"]} - {"embeddings.mask_token"})
    if missing:
        raise ValueError(
            f"dinov2_tower: folder: wanted the weights of a DINOv2, got {folder} without {len(missing)} of its tensors, "
            f"such as {missing[0]}"
        )
    return Dinov2Tower(model.float(), blocks)
