"""UniTok's multi-codebook quantizer under its own constructor, returns and state-dict names.

from tokenflow_ext.compat.unitok import VectorQuantizerM
"""

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.compat._shared import WARM, Table, count, rates
from tokenflow_ext.ops._check import flag, positive
from tokenflow_ext.quantize._codebook import recomputing
from tokenflow_ext.quantize._precision import FullPrecision

EPS = 1e-7
"""Of the entropy loss."""
USED = 0.01
"""A code is in use above this part of an even share."""


class SubCodebook(FullPrecision):
    """What one codebook holds: `codebook.weight` [V, c] and `vocab_usage` [V], its moving share of the tokens."""

    def __init__(self, codes: int, width: int, backend: str):
        super().__init__()
        self.codebook = Table(codes, width, backend)
        self.register_buffer("vocab_usage", torch.zeros(codes))


def _resume(quantizer: "VectorQuantizerM", _) -> None:
    quantizer.resume()


class VectorQuantizerM(FullPrecision):
    """G codebooks of V codes over G slices of the channels: i_g = argmax_v cos(z_g, E_gv).

    With y and e unit: L_g = beta mean((sg e - y)^2) + mean((e - sg y)^2), vq_loss = mean_g L_g; entropy_loss = mean_g
    (mean_n H(p_n) - H(mean_n p_n)), p = softmax(-(2 - 2 cos) / entropy_temp). features out = e, d out / dy = 1.

    State dict: `codebooks.{g}.codebook.weight` [V, c], `codebooks.{g}.vocab_usage` [V], for g < G.

    Args:
        vocab_size: codes of all codebooks together, V = vocab_size / num_codebooks each.
        vocab_width: channels, c = vocab_width / num_codebooks each.
        beta: weight of the commitment.
        use_entropy_loss: whether entropy_loss is computed; it is 0 otherwise.
        entropy_temp: its temperature.
        num_codebooks: G.
        quirks: usage as the original has it: that of this batch alone, and the buffer moves in eval too. By default both are
            the buffer, which moves in training and keeps its slow average after a resume.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: a sentence with class, argument, wanted, got.

    Source: UniTok, arXiv 2502.20321, section 3.2.

    Example:
        >>> from tokenflow_ext.compat.unitok import VectorQuantizerM
        >>> quantizer = VectorQuantizerM(vocab_size=64, vocab_width=16, num_codebooks=4)
        >>> features, vq_loss, entropy_loss, usage = quantizer(torch.randn(2, 9, 16))
        >>> ids = quantizer.f_to_idx(torch.randn(2, 9, 16))
        >>> features.shape, ids.shape, quantizer.idx_to_f(ids).shape
        (torch.Size([2, 9, 16]), torch.Size([2, 4, 9]), torch.Size([2, 9, 16]))
    """

    def __init__(
        self, vocab_size: int, vocab_width: int, beta: float = 0.25, use_entropy_loss: bool = False,
        entropy_temp: float = 0.01, num_codebooks: int = 16, *, quirks: bool = False, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        name = "VectorQuantizerM"
        groups = positive(name, "num_codebooks", num_codebooks)
        for key, value in (("vocab_size", vocab_size), ("vocab_width", vocab_width)):
            if positive(name, key, value) % groups:
                raise ValueError(f"{name}: {key}: wanted a multiple of num_codebooks, {groups}, got {value}")
        self.vocab_size, self.vocab_width, self.num_codebooks = vocab_size, vocab_width, groups
        self.beta = ops._check.non_negative(name, "beta", beta)
        self.use_entropy_loss = flag(name, "use_entropy_loss", use_entropy_loss)
        self.entropy_temp = ops._check.above_zero(name, "entropy_temp", entropy_temp)
        self.quirks, self.backend = flag(name, "quirks", quirks), ops._check.backend(name, backend)
        self.codebooks = nn.ModuleList(
            SubCodebook(vocab_size // groups, vocab_width // groups, backend) for _ in range(groups)
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_resume)
        self.init_vocab(-1.0)

    def resume(self) -> None:
        """A usage that was loaded is past its warm-up; the original, and quirks, start its count of steps anew."""
        if not self.quirks and not self.steps.is_meta:
            known = any(bool(part.vocab_usage.any()) for part in self.codebooks)
            self.steps.fill_(WARM if known else 0)

    def init_vocab(self, eini: float) -> None:
        """Draws the codebooks: eini > 0 truncated normal of that standard deviation, eini < 0 uniform +- |eini| c^-0.5 / 36."""
        for part in self.codebooks:
            weight = part.codebook.weight
            if eini > 0:
                nn.init.trunc_normal_(weight, std=eini)
            elif eini < 0:
                bound = abs(eini) * weight.shape[1] ** -0.5 / 36
                nn.init.uniform_(weight, -bound, bound)

    def _tables(self) -> Tensor:
        """The codebooks as one, [G, V, c]."""
        return torch.stack([part.codebook.weight for part in self.codebooks])

    def _rows(self, features: Tensor) -> Tensor:
        ops._check.floating("VectorQuantizerM", "features", features)
        if features.dim() < 2 or features.shape[-1] != self.vocab_width:
            raise ValueError(
                f"VectorQuantizerM: features: wanted [B, L, {self.vocab_width}], got {list(features.shape)}"
            )
        return features.unflatten(-1, (self.num_codebooks, self.vocab_width // self.num_codebooks))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantizes features [B, L, C].

        Returns:
            features [B, L, C]; vq_loss, entropy_loss, 0-dim; usage, 0-dim, percent of codes above 1 % of an even share.

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        rows, tables = self._rows(features), self._tables()
        common = {"metric": "cosine", "backend": self.backend}
        quantized, indices, vq_loss = ops.quantize(rows, tables, commitment_weight=self.beta, **common)
        entropy_loss = vq_loss.new_zeros(())
        if self.use_entropy_loss:
            first, second = ops.entropy_loss(rows, tables, temperature=self.entropy_temp, eps=EPS, **common)
            entropy_loss = first - second
        return quantized.flatten(-2), vq_loss, entropy_loss, self._usage(indices, rows)

    @torch.no_grad()
    def _usage(self, indices: Tensor, rows: Tensor) -> Tensor:
        codes = self.vocab_size // self.num_codebooks
        moves = (self.quirks or self.training) and not recomputing()
        share = None
        if moves or self.quirks:
            counts = count(indices.flatten(0, -2), rows.detach().flatten(0, -3), codes, ranks=self.training)
            share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        if moves:
            # A batch without rows leaves everything as it is.
            some = (share.sum(-1) > 0).any()
            rate = torch.where(some, rates(self.steps), 0.0)
            for part, new in zip(self.codebooks, share):
                part.vocab_usage.lerp_(new.to(part.vocab_usage.dtype), rate.to(part.vocab_usage.dtype))
            self.steps += some
        seen = share if self.quirks else torch.stack([part.vocab_usage for part in self.codebooks])
        return 100 * (seen > USED / codes).float().mean()

    @torch.no_grad()
    def f_to_idx(self, features: Tensor) -> Tensor:
        """Ids [B, G, L], local to each codebook, of features [B, L, C]; changes no state."""
        ids = ops.nearest_code(self._rows(features), self._tables().detach(), metric="cosine", backend=self.backend)
        return ids.movedim(-1, 1).contiguous()

    def idx_to_f(self, indices: Tensor) -> Tensor:
        """Features [B, L, C] of ids [B, G, L]: the unit codes, side by side. Differentiable in the codebooks.

        Raises:
            ValueError, TypeError: another shape or type, ids outside the codebooks (on the CPU).
        """
        ops._check.ids("VectorQuantizerM", "indices", indices)
        if indices.dim() < 2 or indices.shape[1] != self.num_codebooks:
            raise ValueError(
                f"VectorQuantizerM: indices: wanted [B, {self.num_codebooks}, L], got {list(indices.shape)}"
            )
        codes = ops.lookup(indices.movedim(1, -1), self._tables(), backend=self.backend)
        return ops.normalize_rows(codes, backend=self.backend).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"vocab_size={self.vocab_size}, vocab_width={self.vocab_width}, num_codebooks={self.num_codebooks}, "
            f"beta={self.beta}, quirks={self.quirks}"
        )
