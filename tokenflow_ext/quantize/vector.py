"""One codebook, grouped codebooks, and TokenFlow's shared index."""

from collections.abc import Sequence

from tokenflow_ext import ops
from tokenflow_ext.ops import _check
from tokenflow_ext.quantize._quantizer import Quantizer


class VectorQuantizer(Quantizer):
    """One codebook [K, D], or G of them over G slices of the channels (UniTok's multi-codebook quantization).

    loss = codebook_weight mean((q - sg y)^2) + commitment_weight mean((sg q - y)^2), y and q unit for cosine. The codebook
    learns from the first term alone (`update="gradient"`), or follows its rows (`update="ema"`, no codebook term).

    Args:
        dim: channels of the input, a multiple of `groups`.
        codebook_size: K, per group.
        groups: G.
        metric: "cosine", "l2" or "dot".
        update: "gradient", "ema" or "none".
        commitment_weight: weight of the term that moves the input.
        codebook_weight: weight of the term that moves the codes.
        entropy_weight: adds entropy_weight (mean_n H(p_n) - H(mean_n p_n)) in training.
        entropy_temperature: of p, in units of the distance.
        entropy_eps: inside the logarithm of the mean.
        decay: of the moving averages.
        kmeans_init: the first training batch places the codes.
        dead_code_threshold: codes whose moving average of rows a batch falls below take a row of the batch.
        normalize_mean: VQ-KD's rule, for cosine and update="ema": a code with rows becomes the unit vector of
            decay code + (1 - decay) unit(mean of its unit rows), whatever their number; the others stay.
        gradient: "straight_through", d quantized / dy = 1, or "rotation", d quantized / dy = (|q| / |y|) R with R the
            rotation that takes y / |y| to q / |q|, all of it constant; forward values are the same bits.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: "auto", "native" or "reference".

    Source: 1711.00937; UniTok, 2502.20321; normalize_mean 2411.04406; rotation 2410.06424.

    Example:
        >>> quantizer = VectorQuantizer(8, 512, channel_dim=1)
        >>> quantized, indices, loss = quantizer(torch.randn(2, 8, 4, 4))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 4, 4]))
        >>> bool((quantizer.decode(indices) == quantized).all())
        True
    """

    def __init__(
        self, dim: int, codebook_size: int, *, groups: int = 1, metric: str = "cosine", update: str = "gradient",
        commitment_weight: float = 0.25, codebook_weight: float = 1.0, entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, decay: float = 0.99, kmeans_init: bool = False,
        dead_code_threshold: float = 0, normalize_mean: bool = False, gradient: str = "straight_through",
        channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        if _check.positive("VectorQuantizer", "dim", dim) % _check.positive("VectorQuantizer", "groups", groups):
            raise ValueError(f"VectorQuantizer: dim: wanted a multiple of groups, got dim {dim} and groups {groups}")
        super().__init__(
            [dim // groups], codebook_size, groups, None, metric, update, commitment_weight, codebook_weight, entropy_weight,
            entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
        )  # fmt: skip
        self._pass_gradient(gradient)
        if ops._check.flag("VectorQuantizer", "normalize_mean", normalize_mean) and (
            update != "ema" or metric != "cosine"
        ):
            raise ValueError(
                f"VectorQuantizer: normalize_mean: wanted update='ema' and metric='cosine' with it, got {update!r} and {metric!r}"
            )
        self.codebook.normalize_mean = normalize_mean


class SharedIndexQuantizer(Quantizer):
    """TokenFlow's quantizer: T codebooks under one index, argmin_k sum_t weights[t] d_t.

    x carries the tables side by side on `channel_dim`, e.g. 32 semantic and 8 pixel channels for dims=(32, 8).

    Args:
        dims: D_t of the tables.
        codebook_size: K, common to the tables.
        weights: of the distances, 1 each by default; they choose the index and do not enter the loss.
        groups: 1, as tables that share an index have no groups; taken so that both quantizers take the same keywords.

    The other keywords are those of `VectorQuantizer`; the rotation is table by table.

    Source: TokenFlow, arXiv 2412.03069, section 3.1.

    Example:
        >>> quantizer = SharedIndexQuantizer((32, 8), 1024)
        >>> quantizer(torch.randn(5, 40)).indices.shape
        torch.Size([5])
    """

    def __init__(
        self, dims: Sequence[int], codebook_size: int, *, weights: Sequence[float] | None = None, groups: int = 1,
        metric: str = "cosine", update: str = "gradient", commitment_weight: float = 0.25, codebook_weight: float = 1.0,
        entropy_weight: float = 0.0, entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, decay: float = 0.99,
        kmeans_init: bool = False, dead_code_threshold: float = 0, gradient: str = "straight_through",
        channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        if not isinstance(dims, Sequence) or isinstance(dims, str):
            raise TypeError(f"SharedIndexQuantizer: dims: wanted a sequence of widths, got {type(dims).__name__}")
        if not 1 <= len(dims) <= 16:
            raise ValueError(f"SharedIndexQuantizer: dims: wanted 1 to 16 widths, got {len(dims)}")
        if _check.integer("SharedIndexQuantizer", "groups", groups) != 1:
            raise ValueError(f"SharedIndexQuantizer: groups: wanted 1, for its tables share one index, got {groups}")
        super().__init__(
            dims, codebook_size, 1, weights, metric, update, commitment_weight, codebook_weight, entropy_weight,
            entropy_temperature, entropy_eps, decay, kmeans_init, dead_code_threshold, channel_dim, backend,
        )  # fmt: skip
        self._pass_gradient(gradient)
