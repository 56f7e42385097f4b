"""Whole tokenizers of `eager_layers` around the published quantizers' expressions, with the weights of this package's models.

Source: TokenFlow, arXiv 2412.03069; UniTok, arXiv 2502.20321.
"""

import torch
import torch.nn.functional as F
from bench_multiscale import tokenflow_loop
from eager_layers import CLIP, Compress, Decoder, Encoder, Load, ViTamin
from torch import nn
from unitok_expression import unitok_indices


class TokenFlow(Load):
    """TokenFlow with CLIP's tower at its own resolution; `tables` are the codebooks."""

    def __init__(self, model):
        super().__init__()
        c = model.config
        self.scales, self.tables = c.scales, [t.detach().clone() for t in model.quantizer.codebooks()]
        self.pixel_encoder = Encoder(c.pixel_dim, c.widths, c.encoder_blocks, c.latent)
        self.pixel_decoder = Decoder(c.pixel_dim, c.decoder_widths, c.decoder_blocks, c.latent)
        t, width = c.tower, c.tower.width
        head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, c.semantic_dim))
        tower = CLIP(width, t.depth, t.heads, t.hidden, t.patch, t.grid)
        self.semantic_encoder = nn.ModuleDict({"tower": tower, "head": head})
        self.load(model.state_dict()).eval()

    @torch.no_grad()
    def encode_features(self, images):
        """[B, 40, h, w]."""
        tokens = self.semantic_encoder["head"](self.semantic_encoder["tower"](images))
        pixel = self.pixel_encoder(images)
        return torch.cat([tokens.transpose(1, 2).reshape(len(images), -1, *pixel.shape[2:]), pixel], 1)

    @torch.no_grad()
    def encode(self, images):
        return tokenflow_loop(self.encode_features(images), *self.tables, scales=self.scales, training=False)[1]

    @torch.no_grad()
    def decode(self, indices):
        """Images from ids [B, L]: codes of unit halves, every scale upsampled, their sum through the pixel decoder."""
        side, at, total = self.scales[-1], 0, 0.0
        for s in self.scales:
            ids = indices[:, at : at + s * s]
            at += s * s
            codes = torch.cat([F.normalize(t, dim=-1)[ids] for t in self.tables], -1)
            maps = codes.transpose(1, 2).reshape(len(ids), -1, s, s)
            total = total + F.interpolate(maps, size=(side, side), mode="bicubic")
        return self.pixel_decoder(total[:, self.tables[0].shape[1] :]).clamp(-1, 1)

    def reconstruct(self, images):
        return self.decode(self.encode(images))


class UniTokEncoder(Load):
    """UniTok from images to ids."""

    def __init__(self, model):
        super().__init__()
        c = model.config
        self.groups = c.groups
        self.codes = torch.stack([t.detach().clone() for t in model.quantizer.codebooks()]).view(
            c.groups, c.codebook_size, -1
        )
        self.encoder = ViTamin(c.widths, c.dim, c.depth, c.heads)
        self.quant_proj = Compress(c.dim, c.code_dim, c.projection_heads)
        self.load(model.state_dict()).eval()

    @torch.no_grad()
    def encode_features(self, images):
        """[B, L, code_dim]."""
        return self.quant_proj(self.encoder(images))

    @torch.no_grad()
    def encode(self, images):
        rows = self.encode_features(images)
        ids = unitok_indices(rows.reshape(-1, self.groups, rows.shape[-1] // self.groups), self.codes)
        return ids.view(*rows.shape[:2], self.groups).transpose(1, 2)
