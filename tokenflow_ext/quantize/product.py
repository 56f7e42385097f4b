"""Independent quantizers side by side (FQGAN, ImageFolder), what keeps their codes apart, and their ids as one stream."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.quantize._compound import Compound
from tokenflow_ext.quantize._quantizer import Quantizer
from tokenflow_ext.quantize.multiscale import MultiScaleQuantizer
from tokenflow_ext.quantize.prefix import PrefixMultiScaleQuantizer
from tokenflow_ext.quantize.residual import ResidualQuantizer
from tokenflow_ext.quantize.sign import SignQuantizer

KINDS = (Quantizer, MultiScaleQuantizer, ResidualQuantizer, SignQuantizer)


def disentangle_loss(quantized: Sequence[Tensor], *, weight: float = 1.0, channel_dim: int = -1) -> Tensor:
    """weight * mean over pairs a < b of mean_n cos(q_a, q_b)^2: 0 for orthogonal codes, `weight` for identical ones.

    Args:
        quantized: two or more tensors of one shape, outputs of quantizers. Straight-through outputs carry the gradient to what
            was quantized, not to the codebooks. Rows with NaN or inf add nothing.
        weight: FQGAN's lambda.
        channel_dim: axis of the channels.

    Returns:
        0-dim; 0 for no rows.

    Raises:
        ValueError, TypeError: fewer than two tensors, shapes that differ, or a weight that is no number >= 0.

    Source: FQGAN, arXiv 2411.16681.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> disentangle_loss([a, b]), disentangle_loss([a, a], weight=0.1)
        (tensor(0.), tensor(0.1000))
    """
    op = "disentangle_loss"
    ops._check.sequence(op, "quantized", quantized)
    weight = ops._check.non_negative(op, "weight", weight)
    if len(quantized) < 2:
        raise ValueError(f"{op}: quantized: wanted two tensors or more, got {len(quantized)}")
    for i, part in enumerate(quantized):
        ops._check.floating(op, f"quantized[{i}]", part)
        if part.shape != quantized[0].shape:
            raise ValueError(
                f"{op}: quantized[{i}]: wanted {list(quantized[0].shape)} as quantized[0], got {list(part.shape)}"
            )
    finite = [torch.where(part.isfinite().all(channel_dim, keepdim=True), part, 0.0) for part in quantized]
    unit = [torch.nn.functional.normalize(part, dim=channel_dim, eps=1e-12) for part in finite]
    squares = [(a * b).sum(channel_dim).square() for i, a in enumerate(unit) for b in unit[i + 1 :]]  # one [N] a pair
    rows = max(ops._check.count(squares[0].shape), 1)
    return weight / (len(squares) * rows) * sum(s.sum() for s in squares)


def fold(streams: Sequence[Tensor]) -> Tensor:
    """P streams of ids [B, L] as one of P ids a position, [B, L, P]: a model predicts a position's ids in one step.

    Source: ImageFolder, arXiv 2410.01756.

    Example:
        >>> fold([torch.tensor([[1, 2]]), torch.tensor([[7, 8]])])
        tensor([[[1, 7],
                 [2, 8]]])
    """
    ops._check.sequence("fold", "streams", streams)
    for i, stream in enumerate(streams):
        ops._check.ids("fold", f"streams[{i}]", stream)
        if stream.shape != streams[0].shape:
            raise ValueError(
                f"fold: streams[{i}]: wanted {list(streams[0].shape)} as streams[0], got {list(stream.shape)}"
            )
    return torch.stack(list(streams), dim=-1)


def unfold(indices: Tensor) -> tuple[Tensor, ...]:
    """The P streams [B, L] of folded ids [B, L, P].

    Example:
        >>> [stream.tolist() for stream in unfold(torch.tensor([[[1, 7], [2, 8]]]))]
        [[[1, 2]], [[7, 8]]]
    """
    ops._check.ids("unfold", "indices", indices)
    if indices.dim() < 1 or not indices.shape[-1]:
        raise ValueError(f"unfold: indices: wanted [..., P] with P >= 1, got {list(indices.shape)}")
    return indices.unbind(-1)


class ProductQuantizer(Compound):
    """P quantizers side by side, each with its own codebook and its own id: K^P codes for P K vectors.

        loss = sum_p loss_p + disentangle_weight mean_{a<b} mean_n cos(q_a, q_b)^2

    FQGAN: two or three VectorQuantizers, each fed by its own adapter (joined=False). ImageFolder: two
    PrefixMultiScaleQuantizers over halves of the channels; they drop the same scales of the same samples.

    Args:
        quantizers: P of one kind, with ids of one shape: any module of this package but a product.
        joined: whether x is one tensor, the branches side by side on its channels, or a sequence of P tensors.
        disentangle_weight: of `disentangle_loss` of the outputs; wants two or more quantizers of one width.

    Raises:
        ValueError, TypeError: quantizers that are none, or that do not go together.

    Source: FQGAN, arXiv 2411.16681; ImageFolder, arXiv 2410.01756.

    Example:
        >>> quantizer = ProductQuantizer([VectorQuantizer(8, 64) for _ in range(2)], joined=False, disentangle_weight=0.1)
        >>> (a, b), indices, loss = quantizer([torch.randn(5, 8), torch.randn(5, 8)])
        >>> a.shape, indices.shape
        (torch.Size([5, 8]), torch.Size([5, 2]))
    """

    def __init__(
        self, quantizers: Sequence[nn.Module], *, joined: bool = True, disentangle_weight: float = 0.0
    ):  # fmt: skip
        name = "ProductQuantizer"
        if isinstance(quantizers, str) or not isinstance(quantizers, Sequence) or not 1 <= len(quantizers) <= 16:
            raise ValueError(f"{name}: quantizers: wanted 1 to 16 of them in a sequence, got {quantizers!r}")
        for p, quantizer in enumerate(quantizers):
            if not isinstance(quantizer, KINDS) or type(quantizer) is not type(quantizers[0]):
                raise ValueError(
                    f"{name}: quantizers[{p}]: wanted quantizers of one kind, got {type(quantizer).__name__}"
                )
            if self._axis(quantizer) != self._axis(quantizers[0]):
                raise ValueError(
                    f"{name}: quantizers[{p}]: wanted the channel_dim of quantizers[0], {self._axis(quantizers[0])}, "
                    f"got {self._axis(quantizer)}"
                )
            if isinstance(quantizer, MultiScaleQuantizer) and quantizer.scales != quantizers[0].scales:
                raise ValueError(f"{name}: quantizers[{p}]: wanted the scales of quantizers[0], got {quantizer.scales}")
        super().__init__(quantizers)
        self.joined = ops._check.flag(name, "joined", joined)
        self.channel_dim = self._axis(quantizers[0])
        self.widths = [self._wrapped(quantizer).dim for quantizer in quantizers]
        self.disentangle_weight = ops._check.non_negative(name, "disentangle_weight", disentangle_weight)
        if self.disentangle_weight and (len(set(self.widths)) > 1 or len(quantizers) < 2):
            raise ValueError(
                f"{name}: disentangle_weight: wanted two or more quantizers of one width with it, got widths {self.widths}"
            )

    @staticmethod
    def _wrapped(quantizer) -> nn.Module:
        return quantizer.quantizer if isinstance(quantizer, MultiScaleQuantizer) else quantizer

    @staticmethod
    def _axis(quantizer) -> int:
        return 1 if isinstance(quantizer, MultiScaleQuantizer) else quantizer.channel_dim

    def _branches(self, x) -> Sequence[Tensor]:
        """x as P tensors."""
        name, wanted = "ProductQuantizer", len(self.quantizers)
        if self.joined:
            ops._check.floating(name, "x", x)
            axis, channels = self.channel_dim, sum(self.widths)
            if not -x.dim() <= axis < x.dim() or x.shape[axis] != channels:
                raise ValueError(f"{name}: x: wanted {channels} channels at axis {axis}, got {list(x.shape)}")
            return x.split(self.widths, dim=axis)
        ops._check.sequence(name, "x", x)
        if len(x) != wanted:
            raise ValueError(f"{name}: x: wanted {wanted} tensors, one a quantizer, got {len(x)}")
        return x

    def _joined(self, parts: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        return torch.cat(tuple(parts), dim=self.channel_dim) if self.joined else tuple(parts)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Quantized:
        """Quantizes every branch.

        Args:
            x: one tensor with the branches side by side, or P tensors where `joined` is False.

        Returns:
            Quantized(quantized like x, int64 ids of the branches on a last axis [..., P], 0-dim loss).

        Raises:
            ValueError, TypeError: wrong widths or types.
        """
        branches, options = self._branches(x), {}
        first = self.quantizers[0]
        if isinstance(first, PrefixMultiScaleQuantizer) and self.training:
            options["depths"] = first.draw(branches[0].shape[0], branches[0].device)
        outs = [quantizer(part, **options) for quantizer, part in zip(self.quantizers, branches)]
        loss = sum(out.loss for out in outs)
        parts = [out.quantized for out in outs]
        if self.disentangle_weight:
            real = [part.to(loss.dtype) for part in parts]
            options = {"weight": self.disentangle_weight, "channel_dim": self.channel_dim}
            loss = loss + disentangle_loss(real, **options)
        return Quantized(self._joined(parts), fold([out.indices for out in outs]), loss)

    def encode(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Ids [..., P] of x, as in `forward`, without changing any state."""
        return fold([quantizer.encode(part) for quantizer, part in zip(self.quantizers, self._branches(x))])

    def _streams(self, indices: Tensor) -> tuple[Tensor, ...]:
        streams = unfold(indices)
        if len(streams) != len(self.quantizers):
            raise ValueError(
                f"ProductQuantizer: indices: wanted [..., {len(self.quantizers)}], got {list(indices.shape)}"
            )
        return streams

    def decode(self, indices: Tensor, **options) -> Tensor | tuple[Tensor, ...]:
        """What ids [..., P] stand for, in the form of `forward`'s; options go to every branch's decode."""
        return self._joined(
            [quantizer.decode(ids, **options) for quantizer, ids in zip(self.quantizers, self._streams(indices))]
        )

    def inputs(self, indices: Tensor, *arguments, **options) -> Tensor:
        """Inputs [B, rows, C] of an autoregressive model after a prefix of ids [B, L', P], the branches side by side.

        Raises:
            TypeError: branches without scales.
        """
        if not isinstance(self.quantizers[0], MultiScaleQuantizer):
            raise TypeError(
                f"ProductQuantizer: inputs: wanted quantizers with scales, got {type(self.quantizers[0]).__name__}"
            )
        streams = zip(self.quantizers, self._streams(indices))
        return torch.cat([quantizer.inputs(ids, *arguments, **options) for quantizer, ids in streams], dim=-1)
