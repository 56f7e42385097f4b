"""VAR: a class-conditional transformer that writes a picture's tokens scale by scale, all tokens of a scale at once.

    x_1 = class + start,   x_s = enter(area(f_hat of the scales before s)) for s > 1;   x += level(s) + position
    t += g1 attention(norm(t) (1 + s1) + h1);   t += g2 mlp(norm(t) (1 + s2) + h2);   logits = head(norm(t) (1 + s) + h)

g, s, h come from the class (AdaLN). A token sees the tokens of its own and of coarser scales. Picture and ids belong to a VQVAE.

Source: Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction", 2404.02905.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.models import checkpoint, var_sampling
from tokenflow.models.model import Model
from tokenflow.models.vitamin import DropPath
from tokenflow.models.vqvae import SCALES, VQVAE

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
HEAD_WIDTH = 64
EPS = 1e-6
LARGEST_SCALE = math.log(100)

Cache = list[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Config:
    """Sizes of a VAR.

    Attributes:
        depth: blocks.
        width: channels.
        heads: of the attention.
        scales: sides of the token maps, coarse to fine; those of the VQVAE.
        dim: channels of the VQVAE's codes.
        codebook_size: K.
        classes: number of classes; one more row stands for "no class".
        shared_adaln: one conditioning layer for all blocks, each with an offset of its own.
        unit_attention: queries and keys are unit vectors, scaled by a learned number a head; else the softmax scale is
            0.25 / sqrt(head width).
        label_dropout: share of training labels that become "no class", for guidance.
        drop_path: rate of the last block in training; None is 0.1 depth / 24.
    """

    depth: int = 16
    width: int = 1024
    heads: int = 16
    scales: tuple[int, ...] = SCALES
    dim: int = 32
    codebook_size: int = 4096
    classes: int = 1000
    shared_adaln: bool = False
    unit_attention: bool = True
    label_dropout: float = 0.1
    drop_path: float | None = None


def _published(depth: int, **changes: object) -> Config:
    return Config(depth, HEAD_WIDTH * depth, depth, **changes)


PRESETS = {
    **{f"var-d{depth}": _published(depth) for depth in (16, 20, 24, 30)},
    "var-d36-512": _published(36, scales=SCALES_512, shared_adaln=True),
}

RULES = [
    (r"^pos_start$", "start"),
    (r"^pos_1LC$", "positions"),
    (r"^word_embed\.", "enter."),
    (r"^class_emb\.", "class_embedding."),
    (r"^lvl_embed\.", "level_embedding."),
    (r"^shared_ada_lin\.1\.", "condition."),
    (r"\.ada_lin\.1\.", ".condition."),
    (r"\.ada_gss$", ".offset"),
    (r"^head_nm\.condition\.", "head_condition."),
    (r"\.attn\.mat_qkv\.weight$", ".attention.qkv"),
    (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.([qv]_bias)$", r".attention.\1"),
    (r"\.ffn\.", ".mlp."),
]
DROPS = [
    (r"lvl_1L|attn_bias_for_masking", "follows from the scales"),
    (r"blocks\.\d+\.attn\.zero_k_bias", "is zero"),
]


class Attention(nn.Module):
    """Self-attention on [B, N, C]; keys have no bias."""

    def __init__(self, width: int, heads: int, *, unit: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(4.0))) if unit else None
        self.out = nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None, block: int) -> Tensor:
        """x [B, N, C]; `cache` holds keys and values of the coarser scales a block, and takes those of x."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = 0.25 * q.shape[-1] ** -0.5
        if self.log_scale is not None:
            q = F.normalize(q, dim=-1) * self.log_scale.clamp(max=LARGEST_SCALE).exp()
            q, k, scale = q.to(v.dtype), F.normalize(k, dim=-1), 1.0
        if cache is not None:
            if cache[block] is not None:
                k, v = (torch.cat([old, new], 2) for old, new in zip(cache[block], (k, v), strict=True))
            cache[block] = (k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, both between a norm that the class shifts and scales and a gate that it sets."""

    def __init__(self, config: Config, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.attention = Attention(width, config.heads, unit=config.unit_attention)
        self.mlp, self.drop_path = MLP(width), DropPath(drop_path)
        if config.shared_adaln:
            self.offset = nn.Parameter(torch.randn(6, width) / width**0.5)
        else:
            self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, given: Tensor, mask: Tensor | None, cache: Cache | None, block: int) -> Tensor:
        """x [B, N, C]; `given` is the class vector [B, C], or with shared AdaLN [B, 6, C] for all blocks."""
        six = given + self.offset if given.dim() == 3 else self.condition(F.silu(given)).unflatten(-1, (6, -1))
        gate1, gate2, scale1, scale2, shift1, shift2 = six.unsqueeze(2).unbind(1)
        h = modulated(x, scale1, shift1)
        x = x + self.drop_path(self.attention(h, mask, cache, block) * gate1)
        return x + self.drop_path(self.mlp(modulated(x, scale2, shift2)) * gate2)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift; the norm has no parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class VAR(Model):
    """A next-scale transformer over a VQVAE's tokens.

    Args:
        config: the sizes.

    Example:
        >>> from tokenflow.models import vqvae
        >>> tokens = dict(scales=(1, 2, 4), dim=4, codebook_size=16)
        >>> vqvae = VQVAE(vqvae.Config(image_size=32, widths=(8, 8, 8, 16), **tokens)).eval()
        >>> var = VAR(Config(depth=1, width=32, heads=2, classes=10, **tokens)).eval()
        >>> var.generate(vqvae, [3, 7], seed=0).shape
        torch.Size([2, 3, 32, 32])
        >>> indices = vqvae.encode(torch.zeros(2, 3, 32, 32))
        >>> var(torch.tensor([3, 7]), var.inputs(vqvae, indices)).shape
        torch.Size([2, 21, 16])
    """

    kind = "var"
    config_type = Config
    presets = PRESETS
    assumed = ("heads", "scales")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.width % c.heads:
            raise ValueError(f"VAR: heads: wanted a divisor of the width {c.width}, got {c.heads}")
        self.lengths = [side * side for side in c.scales]
        self.class_embedding = nn.Embedding(c.classes + 1, c.width)
        self.level_embedding = nn.Embedding(len(c.scales), c.width)
        self.start = nn.Parameter(torch.empty(self.lengths[0], c.width))
        self.positions = nn.Parameter(torch.empty(sum(self.lengths), c.width))
        self.enter = nn.Linear(c.dim, c.width)
        self.condition = nn.Linear(c.width, 6 * c.width) if c.shared_adaln else None
        rate = 0.1 * c.depth / 24 if c.drop_path is None else c.drop_path
        self.blocks = nn.ModuleList(Block(c, rate * i / max(1, c.depth - 1)) for i in range(c.depth))
        self.head_condition, self.head = nn.Linear(c.width, 2 * c.width), nn.Linear(c.width, c.codebook_size)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Small gates, so that each block starts near the identity, and nearly equal logits; the choice is ours."""
        std = (3 * self.config.width) ** -0.5
        for table in (self.class_embedding.weight, self.level_embedding.weight, self.start, self.positions):
            nn.init.trunc_normal_(table, std=std)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        conditions = [m for name, m in self.named_modules() if name.split(".")[-1] == "condition"]
        for layer in (self.head, *conditions):
            layer.weight.mul_(0.02)

    @classmethod
    def recognise(cls, state: Mapping[str, Tensor]) -> Config:
        try:
            classes, width = state["class_emb.weight"].shape
            length, dim = state["pos_1LC"].shape[1], state["word_embed.weight"].shape[1]
            codes = state["head.weight"].shape[0]
        except KeyError as error:
            raise ValueError(
                f"from_checkpoint: path: wanted the weights of a VAR, got {len(state)} tensors without {error.args[0]}"
            ) from error
        scale = state.get("blocks.0.attn.scale_mul_1H11")
        return Config(
            depth=checkpoint.count(state, r"blocks\.(\d+)\."),
            width=width,
            heads=width // HEAD_WIDTH if scale is None else scale.numel(),
            scales=_scales(state.get("lvl_1L"), length),
            dim=dim,
            codebook_size=codes,
            classes=classes - 1,
            shared_adaln="shared_ada_lin.1.weight" in state,
            unit_attention=scale is not None,
        )

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], config: Config) -> checkpoint.Converted:
        return checkpoint.rename(state, RULES, DROPS)

    def summary(self) -> dict[str, str]:
        c = self.config
        return {
            **super().summary(),
            "layers": f"{c.depth} of {c.width} channels in {c.heads} heads, {'one' if c.shared_adaln else 'own'} AdaLN",
            "scales": ", ".join(map(str, c.scales)),
            "tokens": f"{sum(self.lengths)} an image, {c.codebook_size} codes of {c.dim} channels",
            "classes": str(c.classes),
        }

    def inputs(self, tokenizer: VQVAE, indices: Tensor) -> Tensor:
        """What the model reads at scales 2.. of token ids [B, n], n those of whole scales: [B, rows, dim].

        Raises:
            ValueError: a tokenizer with other scales or codes.
        """
        theirs, ours = tokenizer.config, self.config
        for name in ("scales", "dim", "codebook_size"):
            if _plain(getattr(theirs, name)) != _plain(getattr(ours, name)):
                raise ValueError(
                    f"VAR: tokenizer: wanted {name} {getattr(ours, name)}, got a tokenizer with {getattr(theirs, name)}"
                )
        return tokenizer.quantizer.inputs(indices, rule="accumulate")

    def forward(self, labels: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, L, K] of all tokens, each from the tokens of coarser scales (teacher forcing).

        Args:
            labels: class ids [B]; `config.classes` means none. In training some become none.
            inputs: [B, L - first, dim], see `inputs`.

        Raises:
            TypeError: labels that are no integers.
            ValueError: other shapes, or, on the CPU, a label outside of [0, classes].
        """
        classes = self.config.classes
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"VAR: labels: wanted integers, got {labels.dtype}")
        # On a GPU the look at the values would wait for it.
        looking = labels.is_cpu and not torch.compiler.is_compiling()
        if looking and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ValueError(f"VAR: labels: wanted 0 to {classes - 1}, or {classes} for none, got {labels.tolist()}")
        want = [len(labels), sum(self.lengths[1:]), self.config.dim]
        if list(inputs.shape) != want:
            raise ValueError(f"VAR: inputs: wanted {want}, got {list(inputs.shape)}")
        if self.training and self.config.label_dropout:
            none = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(none, self.config.classes)
        return self._run(labels, self.enter(inputs.to(self.enter.weight.dtype)), slice(None))

    def loss(self, labels: Tensor, indices: Tensor, tokenizer: VQVAE) -> Tensor:
        """Mean cross-entropy of token ids [B, L], 0-dim: what training minimises."""
        logits = self(labels, self.inputs(tokenizer, indices))
        return F.cross_entropy(logits.flatten(0, 1).float(), indices.flatten())

    def step(self, labels: Tensor, inputs: Tensor | None, scale: int, cache: Cache) -> Tensor:
        """Logits [B, h w, K] of one scale, the coarser ones in `cache`, a list of `depth` entries that begin as None.

        Args:
            labels: class ids [B].
            inputs: [B, h w, dim] of this scale; None for the first.
            scale: its place in the list.
            cache: keys and values; takes those of this scale.
        """
        first = sum(self.lengths[:scale])
        rows = None if inputs is None else self.enter(inputs.to(self.enter.weight.dtype))
        return self._run(labels, rows, slice(first, first + self.lengths[scale]), cache)

    def generate(self, tokenizer: VQVAE, labels: Sequence[int] | Tensor, **options: object) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of classes; options as `tokenflow.models.var_sampling.sample` takes them."""
        return tokenizer.decode(var_sampling.sample(self, tokenizer, labels, **options))

    def _run(self, labels: Tensor, rows: Tensor | None, places: slice, cache: Cache | None = None) -> Tensor:
        """Logits at `places` of the sequence; `rows` [B, n, C] are the inputs behind the first scale."""
        given = self.class_embedding(labels)
        parts = [] if rows is None else [rows]
        if places.start in (None, 0):
            parts.insert(0, given[:, None] + self.start)
        levels = torch.repeat_interleave(
            torch.arange(len(self.lengths), device=labels.device), torch.tensor(self.lengths, device=labels.device)
        )
        x = torch.cat(parts, 1) + self.level_embedding(levels[places]) + self.positions[places]
        # With a cache there is nothing finer than the scale at hand to hide.
        mask = levels[:, None] >= levels[None] if cache is None else None
        condition = given if self.condition is None else self.condition(F.silu(given)).unflatten(-1, (6, -1))
        for number, block in enumerate(self.blocks):
            x = block(x, condition, mask, cache, number)
        scale, shift = self.head_condition(F.silu(given)).unsqueeze(1).chunk(2, -1)
        return self.head(modulated(x, scale, shift))


def _plain(value: object) -> object:
    """A list as a tuple, a pair of equal sides as one of them."""
    return tuple(map(_side, value)) if isinstance(value, Sequence) else value


def _side(value: object) -> object:
    return value[0] if isinstance(value, Sequence) and len(set(value)) == 1 else value


def _scales(levels: Tensor | None, length: int) -> tuple[int, ...]:
    """Sides of the scales: from the file's table of levels, or the published list of that length."""
    if levels is not None and levels.device.type != "meta":
        sides = [math.isqrt(n) for n in torch.bincount(levels.flatten().long()).tolist()]
        if sum(side * side for side in sides) == length:
            return tuple(sides)
    for known in (SCALES, SCALES_512):
        if sum(side * side for side in known) == length:
            return known
    raise ValueError(f"from_checkpoint: path: wanted the weights of a VAR of 680 or 2240 tokens, got {length}")
