"""A frozen table under a learned projection, searched within a window of it (SweetTok's vocabularies, SimVQ)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops.search import _window
from tokenflow_ext.quantize._codebook import Codebook
from tokenflow_ext.quantize._precision import Linear, without_autocast
from tokenflow_ext.quantize._quantizer import Quantizer


class ProjectedCodebook(Codebook):
    """A frozen table [K, E], whose codes [K, D] are what `projection` makes of it."""

    def __init__(self, owner: str, table: Tensor, projection: nn.Module, dim: int, metric: str):
        super().__init__(owner, [dim], len(table), 1, metric, "none", 0.99, False, 0)
        self.table_0, self.projection = table, projection

    def tables(self) -> tuple[Tensor, ...]:
        """The codes, in a sequence of one."""
        with without_autocast(self.table_0):
            # A module of the user's computes in its own precision, whatever half() made of it.
            wanted = next((p.dtype for p in self.projection.parameters()), self.table_0.dtype)
            codes = self.projection(self.table_0.to(wanted)).to(self.table_0.dtype)
        if codes.shape != (self.codes, self.widths[0]):
            raise ValueError(
                f"ProjectedQuantizer: projection: wanted [{self.codes}, {self.widths[0]}], got {list(codes.shape)}"
            )
        return (codes,)

    def freeze(self) -> None:
        """The projection moves no more."""
        self.projection.requires_grad_(False)


class ProjectedQuantizer(Quantizer):
    """Codes F(T_k) of a frozen table T under a learned projection F, searched among ids lo .. hi - 1 only.

        i = argmin_{lo <= k < hi} d(x, F(T_k));   q = F(T_i)
        loss = codebook_weight mean((q - sg y)^2) + commitment_weight mean((sg q - y)^2)

    The codebook term moves F, nothing moves T. SweetTok: T holds word vectors sorted by part of speech, F is a graph network,
    and each of two quantizers over the same T has the window of its vocabulary. With a linear F and no window: SimVQ. The
    projection reads the rows of the window alone. Inside a MultiScaleQuantizer ids count from the window's start.

    Args:
        table: T [K, E], float; a copy of the window is kept in float32 (float64).
        dim: D, channels of the input and of the codes.
        projection: module [hi - lo, E] -> [hi - lo, D]; a linear map, float32 always, where None.
        window: (lo, hi); all of the table where None. Ids count from the table's start.
        metric: "l2", "cosine" or "dot".
        commitment_weight: weight of the term that moves the input.
        codebook_weight: weight of the term that moves the projection.
        entropy_weight: adds entropy_weight (mean_n H(p_n) - H(mean_n p_n)) in training.
        entropy_temperature: of p, in units of the distance.
        entropy_eps: inside the logarithm of the mean.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: SweetTok, arXiv 2412.10443; SimVQ, arXiv 2411.02038.

    Example:
        >>> words = torch.randn(1000, 32)
        >>> nouns = ProjectedQuantizer(words, 8, window=(200, 900))
        >>> quantized, indices, loss = nouns(torch.randn(5, 8))
        >>> bool((indices >= 200).all() & (indices < 900).all()), bool((nouns.decode(indices) == quantized).all())
        (True, True)
    """

    def __init__(
        self, table: Tensor, dim: int, *, projection: nn.Module | None = None, window: Sequence[int] | None = None,
        metric: str = "l2", commitment_weight: float = 0.25, codebook_weight: float = 1.0, entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        name = "ProjectedQuantizer"
        ops._check.table(name, "table", table, grouped=False)
        ops._check.positive(name, "dim", dim)
        if projection is not None and not isinstance(projection, nn.Module):
            raise TypeError(f"{name}: projection: wanted a module, got {type(projection).__name__}")
        lo, hi = (0, len(table)) if window is None else _window(name, window, len(table))
        super().__init__(
            widths=[dim], codebook_size=hi - lo, groups=1, weights=None, metric=metric, update="none",
            commitment_weight=commitment_weight, codebook_weight=0.0, entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature, entropy_eps=entropy_eps, decay=0.99, kmeans_init=False,
            dead_code_threshold=0, channel_dim=channel_dim, backend=backend,
        )  # fmt: skip
        self.codebook_weight = ops._check.non_negative(name, "codebook_weight", codebook_weight)
        self.window = (lo, hi)
        frozen = table.detach()[lo:hi].clone()
        frozen = frozen.to(frozen.dtype if frozen.dtype == torch.float64 else self.codebook.table_0.dtype)
        projection = Linear(table.shape[1], dim, dtype=frozen.dtype) if projection is None else projection
        self.codebook = ProjectedCodebook(name, frozen, projection, dim, metric)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """As `VectorQuantizer.forward`; ids lie in the window, or are -1 where a mask leaves rows out."""
        quantized, indices, loss = super().forward(x, mask)
        return Quantized(quantized, torch.where(indices < 0, -1, indices + self.window[0]), loss)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Ids of x, as in `forward`, without changing any state."""
        return super().encode(x) + self.window[0]

    def decode(self, indices: Tensor) -> Tensor:
        """The projected codes of ids in the window, bit for bit those that `forward` returns in float32."""
        ops._check.ids("ProjectedQuantizer.decode", "indices", indices)
        # Ids before the window stay outside the table, and none of them becomes the -1 of a row that was left out.
        inside = torch.where(indices == -1, -1, indices - self.window[0])
        return super().decode(torch.where((inside == -1) & (indices != -1), -2, inside))

    def codebooks(self) -> tuple[Tensor, ...]:
        """The projected codes of the window, [hi - lo, D]."""
        return super().codebooks()
