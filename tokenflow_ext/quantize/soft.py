"""Quantizers whose gradient reaches every code: the hard code forward, its softmax backward (IBQ, CODA)."""

import torch
from torch import Tensor

from tokenflow_ext import ops
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops._native import real
from tokenflow_ext.quantize._losses import mean_square
from tokenflow_ext.quantize._precision import LayerNorm, Linear, RMSNorm
from tokenflow_ext.quantize._quantizer import Quantizer


class SoftQuantizer(Quantizer):
    """Keys choose a code, values are what it stands for; a subclass says what they are.

        z_q = (h + p - sg(p)) values, h = onehot(argmax_k s_k), p = softmax(s), s = scale queries(z).keys;   hard = h values
        loss = mean((z_q - z)^2) + commitment_weight mean((sg hard - z)^2) + codebook_weight mean((hard - sg z)^2)

    in training plus entropy_weight (mean_n H(p'_n) - H(mean_n p'_n)), p' = softmax(s / entropy_temperature). `quantized` sends
    its gradient to input and keys through the softmax, to values through the hard code alone.
    """

    gradient, scale = "softmax", 1.0

    def __init__(
        self, dim, codebook_size, commitment_weight, codebook_weight, entropy_weight, entropy_temperature, entropy_eps,
        channel_dim, backend,
    ):  # fmt: skip
        ops._check.positive(type(self).__name__, "dim", dim)
        super().__init__(
            widths=[dim], codebook_size=codebook_size, groups=1, weights=None, metric="dot", update="gradient",
            commitment_weight=commitment_weight, codebook_weight=codebook_weight, entropy_weight=entropy_weight,
            entropy_temperature=entropy_temperature, entropy_eps=entropy_eps, decay=0.99, kmeans_init=False,
            dead_code_threshold=0, channel_dim=channel_dim, backend=backend,
        )  # fmt: skip

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """([K, D of the queries], [K, dim])."""
        raise NotImplementedError

    def queries(self, z: Tensor) -> Tensor:
        """What is compared with the keys, of rows [..., dim]."""
        return z

    def _clean(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Queries with NaN for the rows that are not finite, which no gradient passes, and which rows are."""
        good = z.isfinite().all(-1)
        queries = self.queries(torch.where(good.unsqueeze(-1), z, 0.0))
        return torch.where(good.unsqueeze(-1), queries, torch.nan), good

    def choose(self, z: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and ids of rows z [..., dim], float32 or float64; their queries, and which rows are finite."""
        queries, good = self._clean(z)
        options = {"scale": self.scale, "backend": self.backend}
        return *ops.soft_quantize(queries, keys, values, **options), queries, good

    def step(self, z: Tensor, keys: Tensor, values: Tensor) -> Quantized:
        """`choose` with its loss, entropy term included; in training counts usage."""
        with self.codebook.quietly():
            quantized, indices, queries, good = self.choose(z, keys, values)
        hard = ops.lookup(indices, values, backend=self.backend)
        loss = (
            mean_square(quantized, z, good)
            + self.commitment_weight * mean_square(hard.detach(), z, good)
            + self.codebook_weight * mean_square(hard, z.detach(), good)
        )
        if self.training:
            loss = loss + self._entropy(queries, keys)
            self.codebook.observe(self._flat(z), indices.reshape(-1, 1), self.backend)
        return Quantized(quantized, indices, loss)

    def _entropy(self, queries: Tensor, keys: Tensor) -> Tensor | float:
        if self.entropy_weight == 0:
            return 0.0
        options = {"metric": "dot", "temperature": self.entropy_temperature / self.scale, "eps": self.entropy_eps}
        with self.codebook.quietly():
            first, second = ops.entropy_loss(queries, keys, **options, backend=self.backend)
        return self.entropy_weight * (first - second)

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes x; in training also counts usage.

        Args:
            x: any float type, `dim` channels at `channel_dim`.

        Returns:
            Quantized(quantized like x, int64 ids without the channel axis, 0-dim loss). Rows with NaN or inf get id 0 and
            NaN, and are left out of loss, usage and gradients.

        Raises:
            ValueError, TypeError: wrong width or type.
        """
        rows = self._rows(x)
        keys, values = self.keys_and_values()
        quantized, indices, loss = self.step(rows.to(real(rows, values)), keys, values)
        return Quantized(self._restore(quantized).to(x.dtype), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Ids of x, as in `forward`, without changing any state."""
        rows = self._rows(x)
        keys, values = self.keys_and_values()
        return self.choose(rows.to(real(rows, values)), keys, values)[1]

    def decode(self, indices: Tensor) -> Tensor:
        """The values of ids, bit for bit those that `forward` returns in float32; differentiable in the values."""
        return self._restore(ops.lookup(indices, self.keys_and_values()[1], backend=self.backend))


class IndexPropagationQuantizer(SoftQuantizer):
    """IBQ: one codebook [K, D], searched by dot product, every code of which gets a gradient from every row.

        z_q = (h + p - sg(p)) E, h = onehot(argmax_k z.E_k), p = softmax(z E^T);   hard = h E
        loss = mean((z_q - z)^2) + commitment_weight mean((sg hard - z)^2) + codebook_weight mean((hard - sg z)^2)

    Nothing of size N x K exists, forward or backward: K = 262144 trains where a row of probabilities a token would not fit.

    Args:
        dim: D, channels of the input.
        codebook_size: K.
        commitment_weight: weight of the term that moves the input to its hard code.
        codebook_weight: weight of the term that moves the hard code; the paper's beta.
        entropy_weight: adds entropy_weight (mean_n H(p_n) - H(mean_n p_n)) in training; 0.05 in the paper.
        entropy_temperature: of p = softmax(z E^T / temperature).
        entropy_eps: inside the logarithm of the mean.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: IBQ, arXiv 2412.02692.

    Example:
        >>> quantizer = IndexPropagationQuantizer(8, 512)
        >>> quantized, indices, loss = quantizer(torch.randn(5, 8))
        >>> loss.backward()
        >>> bool((quantizer.codebooks()[0].grad != 0).any(-1).all())
        True
    """

    def __init__(
        self, dim: int, codebook_size: int, *, commitment_weight: float = 1.0, codebook_weight: float = 0.25,
        entropy_weight: float = 0.0, entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, channel_dim: int = -1,
        backend: str = "auto",
    ):  # fmt: skip
        super().__init__(
            dim, codebook_size, commitment_weight, codebook_weight, entropy_weight, entropy_temperature, entropy_eps,
            channel_dim, backend,
        )  # fmt: skip

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """The codebook, twice."""
        (table,) = self.codebook.tables()
        return table, table


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class AttentionQuantizer(SoftQuantizer):
    """CODA: a row attends to a codebook [K, D] with projected keys and values, and the hardened attention picks one code.

        q = norm(z W_q + b_q), k = norm(E W_k + b_k), v = E W_v + b_v, s = q.k / sqrt(key_dim)
        z_q = (h + p - sg(p)) v, h = onehot(argmax_k s_k), p = softmax(s);   hard = h v
        loss = mean((z_q - z)^2) + commitment_weight mean((sg hard - z)^2) + codebook_weight mean((hard - sg z)^2)

    Wrap it in a `SoftMultiScaleQuantizer` for CODA's residual over scales. Projections stay float32 under half() and autocast.

    Args:
        dim: D, channels of the input, the codes and the values.
        codebook_size: K.
        key_dim: channels of queries and keys; `dim` by default.
        norm: "rms" or "layer", of queries and of keys, each with its own gain.
        norm_eps: of both norms.
        commitment_weight: weight of the term that moves the input to its hard code.
        codebook_weight: weight of the term that moves the hard code; the paper's beta.
        entropy_weight: adds entropy_weight (mean_n H(p_n) - H(mean_n p_n)) in training.
        entropy_temperature: of p = softmax(s / temperature).
        entropy_eps: inside the logarithm of the mean.
        channel_dim: axis of the channels: -1, or 1 for [B, C, H, W].
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: an argument that does not fit, in a sentence.

    Source: CODA, arXiv 2503.17760.

    Example:
        >>> quantizer = AttentionQuantizer(8, 64, key_dim=16)
        >>> quantized, indices, loss = quantizer(torch.randn(5, 8))
        >>> quantized.shape, bool((quantizer.decode(indices) == quantized).all())
        (torch.Size([5, 8]), True)
    """

    def __init__(
        self, dim: int, codebook_size: int, *, key_dim: int | None = None, norm: str = "rms", norm_eps: float = 1e-5,
        commitment_weight: float = 1.0, codebook_weight: float = 0.05, entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01, entropy_eps: float = 1e-5, channel_dim: int = -1, backend: str = "auto",
    ):  # fmt: skip
        name = "AttentionQuantizer"
        key_dim = dim if key_dim is None else ops._check.positive(name, "key_dim", key_dim)
        ops._check.one_of(name, "norm", norm, NORMS)
        norm_eps = ops._check.non_negative(name, "norm_eps", norm_eps)
        super().__init__(
            dim, codebook_size, commitment_weight, codebook_weight, entropy_weight, entropy_temperature, entropy_eps,
            channel_dim, backend,
        )  # fmt: skip
        dtype = self.codebook.table_0.dtype
        self.to_q, self.to_k = Linear(dim, key_dim, dtype=dtype), Linear(dim, key_dim, dtype=dtype)
        self.to_v = Linear(dim, dim, dtype=dtype)
        self.norm_q, self.norm_k = (NORMS[norm](key_dim, eps=norm_eps, dtype=dtype) for _ in range(2))
        self.scale = key_dim**-0.5

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Projected codebook: normalised keys [K, key_dim] and values [K, dim]."""
        (table,) = self.codebook.tables()
        return self.norm_k(self.to_k(table)), self.to_v(table)

    def queries(self, z: Tensor) -> Tensor:
        """Projected and normalised rows [..., key_dim]."""
        return self.norm_q(self.to_q(z.to(self.to_q.weight.dtype))).to(z.dtype)

    def freeze(self) -> None:
        """Codes move no more: codebook, keys and values; queries still learn."""
        super().freeze()
        for module in (self.to_k, self.norm_k, self.to_v):
            module.requires_grad_(False)
