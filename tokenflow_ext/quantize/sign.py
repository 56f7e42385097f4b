"""Quantization to signs, without a table: lookup-free (LFQ) and binary spherical (BSQ)."""

import torch
from torch import Tensor

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import may_look, real
from tokenflow_ext.quantize import _usage
from tokenflow_ext.quantize._codebook import recomputing
from tokenflow_ext.quantize._gradients import straight_through
from tokenflow_ext.quantize._losses import mean_square
from tokenflow_ext.quantize._precision import FullPrecision

MOST_BITS = 62


def pack_bits(bits: Tensor) -> Tensor:
    """ids [...] = sum_j 2^j bits_j of bits [..., D], D <= 62: little-endian, int64.

    Raises:
        TypeError: bits that are not bool.
        ValueError: more than 62 of them, or none.

    Example:
        >>> pack_bits(torch.tensor([[True, False, True]]))
        tensor([5])
    """
    if not isinstance(bits, Tensor) or bits.dtype != torch.bool:
        raise TypeError(
            f"pack_bits: bits: wanted a bool tensor, got {bits.dtype if isinstance(bits, Tensor) else type(bits).__name__}"
        )
    if bits.dim() < 1 or not 1 <= bits.shape[-1] <= MOST_BITS:
        raise ValueError(f"pack_bits: bits: wanted [..., 1 to {MOST_BITS}], got {list(bits.shape)}")
    return (bits.to(torch.int64) << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def unpack_bits(indices: Tensor, width: int) -> Tensor:
    """The bits [..., width] of int64 ids [...], little-endian.

    Raises:
        ValueError: a width that is not 1 to 62; ids outside 0 .. 2^width - 1 (CPU).
        TypeError: ids that are not int64.

    Example:
        >>> unpack_bits(torch.tensor(5), 4)
        tensor([ True, False,  True, False])
    """
    ops._check.ids("unpack_bits", "indices", indices)
    if not 1 <= ops._check.integer("unpack_bits", "width", width) <= MOST_BITS:
        raise ValueError(f"unpack_bits: width: wanted 1 to {MOST_BITS}, got {width}")
    ops._check.ids_in_range("unpack_bits", indices, 1 << width)
    return (indices.unsqueeze(-1) >> torch.arange(width, device=indices.device)) & 1 == 1


def bit_entropy(p: Tensor) -> Tensor:
    """h(p) = -p log p - (1 - p) log(1 - p) in nats, 0 at 0 and 1, where its gradient is large but finite."""
    tiny = torch.finfo(p.dtype).tiny
    return -p * (p + tiny).log() - (1 - p) * (1 - p + tiny).log()


class SignQuantizer(FullPrecision):
    """D bits a row, bit_j = x_j > 0: 2^D codes without a table, LFQ or, with spherical=True, BSQ.

        q_j = c sign(y_j);   LFQ: y = x, c = 1;   BSQ: y = x / |x|, c = 1 / sqrt(D)
        id = sum_j 2^j bit_j;   loss = commitment_weight mean((sg q - y)^2)

    In training plus entropy_weight (mean_n sum_j h(p_nj) - sum_j h(mean_n p_nj)), p_nj = sigmoid(4 c y_j / temperature), h
    the entropy of a bit. As |y - q|^2 is a sum over bits, softmax(-|y - q|^2 / temperature) over all 2^D codes is the product
    of these p_nj: the first term is its exact entropy for 2 D numbers, the second that of its mean taken bit by bit, from
    above. Straight-through: d quantized / dy = 1. A bit of 0 counts as not set.

    Args:
        dim: D, 1 to 62.
        spherical: BSQ, codes and rows on the unit sphere.
        commitment_weight: weight of the term that moves the input.
        entropy_weight: of the entropy term.
        entropy_temperature: of p, in units of the squared distance.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: of normalize_rows: "auto", "native" or "reference".

    Attributes:
        hits: [D + 1] int64, this rank's rows counted in training since `reset_usage`, and those of which each bit is set.
        non_finite: 0-dim int64, this rank's rows with NaN or inf.

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: LFQ (MAGVIT-v2), arXiv 2310.05737; BSQ, arXiv 2406.07548.

    Example:
        >>> quantizer = SignQuantizer(18)
        >>> quantized, indices, loss = quantizer(torch.randn(5, 18))
        >>> indices.shape, bool((quantizer.decode(indices) == quantized).all())
        (torch.Size([5]), True)
    """

    counters = ("hits", "non_finite")

    def __init__(
        self, dim: int, *, spherical: bool = False, commitment_weight: float = 0.25, entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0, channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        super().__init__()
        name = "SignQuantizer"
        if not 1 <= ops._check.integer(name, "dim", dim) <= MOST_BITS:
            raise ValueError(f"{name}: dim: wanted 1 to {MOST_BITS} bits, got {dim}")
        self.dim, self.backend = dim, ops._check.backend(name, backend)
        self.spherical = ops._check.flag(name, "spherical", spherical)
        self.commitment_weight = ops._check.non_negative(name, "commitment_weight", commitment_weight)
        self.entropy_weight = ops._check.non_negative(name, "entropy_weight", entropy_weight)
        self.entropy_temperature = ops._check.above_zero(name, "entropy_temperature", entropy_temperature)
        self.channel_dim = ops._check.integer(name, "channel_dim", channel_dim)
        self.size = dim**-0.5 if spherical else 1.0
        self.hits, self.non_finite = torch.zeros(dim + 1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        self._told = False

    def _rows(self, x: Tensor) -> Tensor:
        ops._check.floating("SignQuantizer", "x", x)
        if x.dim() < 1 or not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"SignQuantizer: x: wanted {self.dim} channels at axis {self.channel_dim}, got {list(x.shape)}"
            )
        return x.movedim(self.channel_dim, -1)

    def _codes(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.where(bits, 1.0, -1.0).to(dtype) * self.size

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes x; in training also counts usage.

        Args:
            x: any float type, `dim` channels at `channel_dim`.

        Returns:
            Quantized(quantized like x, int64 ids without the channel axis, 0-dim loss). Rows with NaN or inf get id 0 and NaN,
            and are left out of loss, usage and gradients.

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        rows = self._rows(x)
        good = rows.isfinite().all(-1)
        y = torch.where(good.unsqueeze(-1), rows, 0.0).to(real(rows))
        y = ops.normalize_rows(y, backend=self.backend) if self.spherical else y
        bits = (rows > 0) & good.unsqueeze(-1)
        q = self._codes(bits, y.dtype)
        loss = self.commitment_weight * mean_square(q, y, good)
        if self.training:
            if self.entropy_weight:
                loss = loss + self.entropy_weight * self._entropy(y, good)
            self._count(bits, good)
        quantized = straight_through(y, torch.where(good.unsqueeze(-1), q, torch.nan))
        return Quantized(quantized.movedim(-1, self.channel_dim).to(x.dtype), pack_bits(bits), loss)

    def _entropy(self, y: Tensor, good: Tensor) -> Tensor:
        logits = (y * (4 * self.size / self.entropy_temperature)).reshape(-1, self.dim)
        rows, good = max(ops._check.count(good.shape), 1), good.reshape(-1, 1)
        # h(sigmoid(a)) = log(1 + e^-|a|) + |a| sigmoid(-|a|): nothing cancels where a bit is sure.
        sure = logits.abs()
        entropies = torch.nn.functional.softplus(-sure) + sure * torch.sigmoid(-sure)
        means = (torch.sigmoid(logits) * good).sum(0) / rows
        return (entropies * good).sum() / rows - bit_entropy(means).sum()

    @torch.no_grad()
    def _count(self, bits: Tensor, good: Tensor) -> None:
        if recomputing():
            return
        rows = torch.cat([good.unsqueeze(-1), bits], dim=-1).reshape(-1, self.dim + 1)
        self.hits += rows.to(torch.int64).sum(0)
        self.non_finite += (~good).sum()
        if may_look(good):
            self._tell()

    def _tell(self) -> None:
        """Warns once of rows that are not finite. Waits for the device."""
        if not self._told and int(self.non_finite):
            self._told = True
            _usage.warn_non_finite("SignQuantizer", int(self.non_finite))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Ids of x, as in `forward`, without changing any state."""
        rows = self._rows(x)
        return pack_bits((rows > 0) & rows.isfinite().all(-1, keepdim=True))

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of ids, float32, bit for bit those that `forward` returns in float32."""
        return self._codes(unpack_bits(indices, self.dim), torch.float32).movedim(-1, self.channel_dim)

    def codebooks(self) -> tuple[Tensor, ...]:
        """None: there are no tables."""
        return ()

    def usage(self, *, all_ranks: bool = True) -> float:
        """Share of the 2 D bit values seen since `reset_usage()`, in training only: 2^D codes have no counter each.

        Args:
            all_ranks: see `VectorQuantizer.usage`.
        """
        hits = self._hits(all_ranks)
        rows, seen = hits[0], hits[1:]
        return float(((seen > 0).double() + (seen < rows).double()).mean() / 2)

    def perplexity(self, *, all_ranks: bool = True) -> float:
        """exp of the sum of the bits' entropies: of the codes hit, were their bits independent; 0 before any."""
        hits = self._hits(all_ranks).double()
        rows, seen = hits[0], hits[1:]
        return float(bit_entropy(seen / rows).sum().exp()) if rows > 0 else 0.0

    def _hits(self, all_ranks: bool) -> Tensor:
        self._tell()
        return _usage.over_ranks(self.hits, all_ranks)

    def non_finite_rows(self, *, all_ranks: bool = True) -> int:
        """Rows with NaN or inf since `reset_usage()`, in training."""
        return int(_usage.over_ranks(self.non_finite, all_ranks))

    def reset_usage(self) -> None:
        """Starts counting anew."""
        self.hits.zero_()
        self.non_finite.zero_()

    def freeze(self) -> None:
        """There is nothing that moves."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, spherical={self.spherical}"
