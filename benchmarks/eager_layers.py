"""The published networks as one writes them down from the papers, layer by layer: what the models' speed is measured against.

Maps are [B, C, H, W] and contiguous, queries, keys and values of convolutional attention are three layers, its matrix of weights
exists, and upsampling precedes its convolution. Parameters have this package's names, so that its weights load.
Source: VQGAN, arXiv 2012.09841; CLIP, arXiv 2103.00020; ViTamin, arXiv 2404.02132; UniTok, arXiv 2502.20321.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Load(nn.Module):
    """Loads this package's state dict, whose `qkv` stands for three layers where those have names of their own."""

    def load(self, state: dict[str, torch.Tensor]) -> nn.Module:
        own = self.state_dict()
        for name, value in own.items():
            head, _, last = name.rpartition(".")
            head, _, layer = head.rpartition(".")
            joined = f"{head}.qkv.{last}"
            parts = dict(zip("qkv", state[joined].chunk(3))) if layer in ("q", "k", "v") and joined in state else {}
            value.copy_(parts.get(layer, state.get(name)))
        return self


def attend(q, k, v):
    """softmax(q k^T / sqrt(D)) v over the last two dimensions."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


def heads(x, count: int):
    """[B, N, 3 D] -> q, k, v of [B, heads, N, D / heads]."""
    return x.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, channels: int, out: int):
        super().__init__()
        self.norm1, self.act1, self.conv1 = norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.act2, self.conv2 = norm(out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        h = self.conv1(self.act1(self.norm1(x)))
        return self.shortcut(x) + self.conv2(self.act2(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Down(nn.Conv2d):
    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Conv2d):
    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, channels: int, out: int, blocks: int, attention: bool, resample: nn.Module):
        super().__init__()
        self.residuals = nn.ModuleList(Residual(out if i else channels, out) for i in range(blocks))
        self.attentions = nn.ModuleList(Attention(out) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x):
        for residual, attention in zip(self.residuals, self.attentions):
            x = attention(residual(x))
        return self.resample(x)


class Encoder(nn.Module):
    """VQGAN's encoder and the convolution to the codes' width."""

    def __init__(self, dim: int, widths, blocks: int, latent: int):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], w, blocks, i == last, nn.Identity() if i == last else Down(w))
            for i, w in enumerate(widths)
        ))  # fmt: skip
        self.middle = nn.Sequential(
            Residual(widths[-1], widths[-1]), Attention(widths[-1]), Residual(widths[-1], widths[-1])
        )
        self.norm_out, self.act = norm(widths[-1]), nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.project = nn.Conv2d(latent, dim, 1)

    def forward(self, x):
        x = self.middle(self.levels(self.conv_in(x)))
        return self.project(self.conv_out(self.act(self.norm_out(x))))


class Decoder(nn.Module):
    """The convolution from the codes' width and VQGAN's decoder."""

    def __init__(self, dim: int, widths, blocks: int, latent: int):
        super().__init__()
        widths, last = list(reversed(widths)), len(widths) - 1
        self.project = nn.Conv2d(dim, latent, 1)
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            Residual(widths[0], widths[0]), Attention(widths[0]), Residual(widths[0], widths[0])
        )
        self.levels = nn.Sequential(*(
            Level(widths[max(i - 1, 0)], w, blocks, i == 0, nn.Identity() if i == last else Up(w, w))
            for i, w in enumerate(widths)
        ))  # fmt: skip
        self.norm_out, self.act, self.conv_out = norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.levels(self.middle(self.conv_in(self.project(x))))
        return self.conv_out(self.act(self.norm_out(x)))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """CLIP's transformer block."""

    def __init__(self, width: int, count: int, hidden: int):
        super().__init__()
        self.count = count
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.act = nn.LayerNorm(width), nn.Linear(width, hidden), QuickGELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        q, k, v = heads(self.qkv(self.norm1(x)), self.count)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class CLIP(nn.Module):
    """CLIP's vision tower at its own resolution: [B, 3, H, W] -> [B, N, width], without the class token."""

    def __init__(self, width: int, depth: int, count: int, hidden: int, patch: int, grid: int):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(grid * grid + 1, width))
        self.pre_norm, self.post_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, count, hidden) for _ in range(depth)))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.positions
        return self.post_norm(self.blocks(self.pre_norm(x)))[:, 1:]


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class Shortcut(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.expand = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x):
        return self.expand(self.pool(x))


class MBConv(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1):
        super().__init__()
        self.shortcut = Shortcut(width, out) if stride == 2 else nn.Identity()
        self.pre_norm, self.conv1_1x1, self.act1 = LayerNorm2d(width, eps=1e-6), nn.Conv2d(width, 4 * out, 1), nn.GELU()
        self.conv2_kxk = nn.Conv2d(4 * out, 4 * out, 3, stride=stride, padding=1, groups=4 * out)
        self.act2, self.conv3_1x1 = nn.GELU(), nn.Conv2d(4 * out, out, 1)

    def forward(self, x):
        y = self.act2(self.conv2_kxk(self.act1(self.conv1_1x1(self.pre_norm(x)))))
        return self.conv3_1x1(y) + self.shortcut(x)


class GeGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(dim, eps=1e-6), nn.GELU(approximate="tanh")
        self.w0, self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.norm(x)
        return self.w2(self.act(self.w0(x)) * self.w1(x))


class GatedBlock(nn.Module):
    """ViTamin's transformer block."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.count = count
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = GeGLU(dim, 2 * dim)

    def forward(self, x):
        q, k, v = heads(self.attn["qkv"](self.norm1(x)), self.count)
        x = x + self.attn["proj"](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViTamin(nn.Module):
    """[B, 3, H, W] -> [B, H/16 W/16, dim]."""

    def __init__(self, widths, dim: int, depth: int, count: int, depths=(2, 4)):
        super().__init__()
        stem = nn.ModuleDict({
            "conv1": nn.Conv2d(3, widths[0], 3, stride=2, padding=1), "norm1": LayerNorm2d(widths[0], eps=1e-6),
            "act": nn.GELU(), "conv2": nn.Conv2d(widths[0], widths[0], 3, padding=1),
        })  # fmt: skip
        stages = nn.Sequential(*(
            nn.Sequential(MBConv(before, width, 2), *(MBConv(width, width) for _ in range(n - 1)))
            for before, width, n in zip((widths[0], *widths), widths, depths)
        ))  # fmt: skip
        pool = {"norm": LayerNorm2d(widths[-1], eps=1e-6), "proj": nn.Conv2d(widths[-1], dim, 3, stride=2, padding=1)}
        backbone = nn.ModuleDict({"stem": stem, "stages": stages, "pool": nn.ModuleDict(pool)})
        self.patch_embed = nn.ModuleDict({"backbone": backbone})
        self.blocks = nn.Sequential(*(GatedBlock(dim, count) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        stem, stages, pool = (self.patch_embed["backbone"][name] for name in ("stem", "stages", "pool"))
        x = stem["conv2"](stem["act"](stem["norm1"](stem["conv1"](x))))
        x = pool["proj"](pool["norm"](stages(x))).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(x))


class Compress(nn.Module):
    """UniTok's attention projection to fewer channels, heads as wide as the codes."""

    def __init__(self, dim: int, out: int, count: int):
        super().__init__()
        self.count = count
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(out), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(out, out)})
        self.attn.register_parameter("q_bias", nn.Parameter(torch.zeros(dim)))
        self.attn.register_parameter("v_bias", nn.Parameter(torch.zeros(dim)))
        self.proj, self.mlp = nn.Linear(dim, out), GeGLU(out, 2 * out)

    def forward(self, x):
        bias = torch.cat([self.attn.q_bias, torch.zeros_like(self.attn.q_bias), self.attn.v_bias])
        q, k, v = heads(self.attn["qkv"](self.norm1(x)) + bias, self.count)
        x = self.proj(self.norm3(x)) + self.attn["proj"](attend(q, k, v).mean(1))
        return x + self.mlp(self.norm2(x))
