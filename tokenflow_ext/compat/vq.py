"""vector-quantize-pytorch's VectorQuantize for its common arguments, same returns and state-dict names.

from tokenflow_ext.compat.vq import VectorQuantize
"""

import torch
from torch import Tensor, nn

from tokenflow_ext import ops
from tokenflow_ext.ops._check import flag, positive
from tokenflow_ext.quantize._precision import Linear
from tokenflow_ext.quantize.vector import VectorQuantizer

NAME = "VectorQuantize"
DEFAULTS = {
    "sync_kmeans": True, "layernorm_after_project_in": False, "accept_3d_fmap": False,
    "commitment_use_cross_entropy_loss": False, "orthogonal_reg_weight": 0.0, "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None, "codebook_diversity_loss_weight": 0.0, "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False, "sample_codebook_temp": 1.0, "straight_through": False, "directional_reparam": False,
    "directional_reparam_variance": 0.005, "sync_codebook": None, "sync_affine_param": False, "vq_bridge": None,
    "manual_ema_update": False, "in_place_codebook_optimizer": None, "manual_in_place_optimizer_update": False,
    "affine_param": False, "affine_param_batch_decay": 0.99, "affine_param_codebook_decay": 0.9, "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True, "route_gradients_to_input": True,
}  # fmt: skip
"""Arguments of the original that are taken at their default only."""
STATE = {"embed": "table_0", "cluster_size": "ema_counts", "embed_avg": "ema_sums"}
"""The original's names below `_codebook.` and those of our codebook."""


class VectorQuantize(nn.Module):
    """Nearest code under l2 or cosine, straight-through, codes that follow their rows (EMA) or learn from the loss.

    commit_loss = commitment_weight mean((sg q - y)^2), y unit for cosine; with learnable_codebook the codes get their part of
    the gradient of the same mean. 0 in eval.

    State dict: the original's `_codebook.{initted, cluster_size, embed_avg, embed}`, `project_in.*`, `project_out.*`; in and
    out, strictly. Codes that no row of a batch chose keep their bits, where the original moves them by its eps.

    Args:
        dim: channels.
        codebook_size: K.
        codebook_dim: width of a code, dim by default; another width than dim, or heads, come with linear projections.
        heads: slices of the projected channels, each with an id.
        separate_codebook_per_head: a codebook for every slice in place of one for all.
        decay: of the moving averages.
        eps: 1e-5.
        freeze_codebook: the codes never move.
        kmeans_init: the first training batch places the codes.
        kmeans_iters: 10.
        use_cosine_sim: unit rows and codes.
        threshold_ema_dead_code: codes whose moving average of rows falls below it take a row of the batch.
        channel_last: [B, N, C] in place of [B, C, N].
        accept_image_fmap: [B, C, H, W], ids [B, H, W].
        commitment_weight: of the loss.
        rotation_trick: True for gradient="rotation", else straight-through (the original's None means True where it can).
        learnable_codebook: the codes are a parameter; there are no moving averages then.
        ema_update: None or the opposite of learnable_codebook.
        backend: "auto", "native" or "reference".
        others: the original's other arguments, at their default values.

    Raises:
        ValueError, TypeError: a sentence with class, argument, wanted, got.

    Source: van den Oord et al., 1711.00937; the documentation of vector-quantize-pytorch.

    Example:
        >>> from tokenflow_ext.compat.vq import VectorQuantize
        >>> quantizer = VectorQuantize(dim=256, codebook_size=512, decay=0.8, commitment_weight=1.0)
        >>> quantized, indices, commit_loss = quantizer(torch.randn(1, 64, 256))
        >>> quantized.shape, indices.shape, commit_loss.shape
        (torch.Size([1, 64, 256]), torch.Size([1, 64]), torch.Size([]))
    """

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int | None = None, heads: int = 1,
        separate_codebook_per_head: bool = False, decay: float = 0.8, eps: float = 1e-5, freeze_codebook: bool = False,
        kmeans_init: bool = False, kmeans_iters: int = 10, *, use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0, channel_last: bool = True, accept_image_fmap: bool = False,
        commitment_weight: float = 1.0, rotation_trick: bool | None = None, learnable_codebook: bool | None = None,
        ema_update: bool | None = None, backend: str = "auto", **others,
    ):  # fmt: skip
        super().__init__()
        for key, value in others.items():
            if key not in DEFAULTS:
                raise TypeError(f"{NAME}: {key}: wanted an argument of {NAME}, got {value!r}")
            if value is not DEFAULTS[key] and value != DEFAULTS[key]:
                raise ValueError(f"{NAME}: {key}: wanted {DEFAULTS[key]!r}, the only value supported, got {value!r}")
        for key, value, only in (("eps", eps, 1e-5), ("kmeans_iters", kmeans_iters, 10)):
            if value != only:
                raise ValueError(f"{NAME}: {key}: wanted {only}, the only value supported, got {value!r}")
        self.dim, self.codebook_size = positive(NAME, "dim", dim), positive(NAME, "codebook_size", codebook_size)
        self.heads = positive(NAME, "heads", heads)
        width = dim if codebook_dim is None else positive(NAME, "codebook_dim", codebook_dim)
        for key, value in (
            ("separate_codebook_per_head", separate_codebook_per_head), ("freeze_codebook", freeze_codebook),
            ("kmeans_init", kmeans_init), ("use_cosine_sim", use_cosine_sim), ("channel_last", channel_last),
            ("accept_image_fmap", accept_image_fmap),
        ):  # fmt: skip
            flag(NAME, key, value)
        for key, value in (
            ("rotation_trick", rotation_trick), ("learnable_codebook", learnable_codebook), ("ema_update", ema_update),
        ):  # fmt: skip
            if value is not None:
                flag(NAME, key, value)
        ops._check.non_negative(NAME, "threshold_ema_dead_code", threshold_ema_dead_code)
        self.separate_codebook_per_head = separate_codebook_per_head and heads > 1
        self.channel_last, self.accept_image_fmap = channel_last, accept_image_fmap
        self.learnable_codebook = bool(learnable_codebook)
        if ema_update is not None and ema_update == self.learnable_codebook:
            raise ValueError(
                f"{NAME}: ema_update: wanted None or {not self.learnable_codebook}, the opposite of learnable_codebook, "
                f"got {ema_update!r}"
            )
        if self.learnable_codebook and use_cosine_sim:
            raise ValueError(
                f"{NAME}: learnable_codebook: wanted False with use_cosine_sim, got {learnable_codebook!r}"
            )
        self.backend = ops._check.backend(NAME, backend)
        self.commitment_weight = ops._check.non_negative(NAME, "commitment_weight", commitment_weight)
        inner = width * heads
        self.project_in, self.project_out = nn.Identity(), nn.Identity()
        if inner != dim:
            self.project_in, self.project_out = Linear(dim, inner), Linear(inner, dim)
        groups = heads if self.separate_codebook_per_head else 1
        self.quantizer = VectorQuantizer(
            width * groups, codebook_size, groups=groups, metric="cosine" if use_cosine_sim else "l2",
            update="gradient" if self.learnable_codebook else "ema", decay=decay, kmeans_init=kmeans_init,
            commitment_weight=commitment_weight, codebook_weight=commitment_weight,
            dead_code_threshold=threshold_ema_dead_code, backend=backend,
            gradient="rotation" if rotation_trick else "straight_through",
        )  # fmt: skip
        if freeze_codebook:
            self.quantizer.freeze()
        self._register_state_dict_hook(_under_their_names)
        self.register_load_state_dict_pre_hook(_under_our_names)

    @property
    def codebook(self) -> Tensor:
        """The codes: [K, D], or [heads, K, D] with a codebook for every head."""
        return self.quantizer.codebooks()[0]

    def _channels_last(self, x: Tensor) -> Tensor:
        first = self.accept_image_fmap or not self.channel_last
        wanted = (4,) if self.accept_image_fmap else (2, 3)
        ops._check.floating(NAME, "x", x)
        if x.dim() not in wanted or x.shape[1 if first else -1] != self.dim:
            form = f"[B, {self.dim}, H, W]" if self.accept_image_fmap else f"[B, {self.dim}, N]"
            raise ValueError(f"{NAME}: x: wanted {form if first else f'[B, N, {self.dim}]'}, got {list(x.shape)}")
        return x.movedim(1, -1) if first else x

    def _heads(self, x: Tensor) -> Tensor:
        """[..., inner] as the quantizer takes it: heads that share a codebook are rows of their own."""
        return x if self.separate_codebook_per_head or self.heads == 1 else x.unflatten(-1, (self.heads, -1))

    def _joined(self, quantized: Tensor) -> Tensor:
        """The quantizer's output with heads side by side again."""
        return quantized if self.separate_codebook_per_head or self.heads == 1 else quantized.flatten(-2)

    def _full(self, x: Tensor) -> Tensor:
        """x in the type of the projections, where there are any: they choose codes and stay float32."""
        return x.to(self.project_in.weight.dtype) if isinstance(self.project_in, Linear) else x

    def _placed(self, out: Tensor) -> Tensor:
        """[..., C] with channels where the input has them."""
        return out.movedim(-1, 1) if self.accept_image_fmap or not self.channel_last else out

    def forward(self, x: Tensor, **others) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x [B, N, C] (or as channel_last, accept_image_fmap say). Of the original's other arguments none works.

        Returns:
            quantized like x; ids [B, N] (or [B, H, W]), with a trailing [heads] where there are several; commit_loss, 0-dim.

        Raises:
            ValueError, TypeError: wrong shape or type.
        """
        for key, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"{NAME}: {key}: wanted None, it is not supported, got {type(value).__name__}")
        rows = self._heads(self.project_in(self._full(self._channels_last(x))))
        quantized, indices, loss = self.quantizer(rows)
        if not self.training:
            loss = torch.zeros_like(loss)
        elif self.quantizer.codebook_weight > 0:
            # One mean pulls both sides here, ours counts it once for either.
            loss = loss - 0.5 * loss.detach()
        return self._placed(self.project_out(self._full(self._joined(quantized)))).to(x.dtype), indices, loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of ids as `forward` returns them, before the projection: heads D channels where the input has its own."""
        return self._placed(self._joined(self.quantizer.decode(indices)))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` returned for these ids."""
        return self._placed(self.project_out(self._joined(self.quantizer.decode(indices))))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, commitment_weight={self.commitment_weight}"


def _under_their_names(module: VectorQuantize, state: dict, prefix: str, _) -> None:
    """Our codebook's entries of a state dict under the original's names and shapes."""
    ours, codebook = f"{prefix}quantizer.codebook.", module.quantizer.codebook
    table = codebook.table_0.detach()
    grouped = (codebook.groups, codebook.codes, table.shape[-1])
    found = {name: state.pop(ours + mine, None) for name, mine in STATE.items()}
    state.pop(ours + "revivals", None)  # the original has none: its draws do not repeat
    waits = state.pop(ours + "needs_init", torch.zeros((), dtype=torch.bool, device=table.device))
    counts = found["cluster_size"] if found["cluster_size"] is not None else table.new_ones(grouped[:2])
    sums = found["embed_avg"] if found["embed_avg"] is not None else table.clone()
    state[f"{prefix}_codebook.initted"] = ~waits
    state[f"{prefix}_codebook.cluster_size"] = counts.view(grouped[:2])
    state[f"{prefix}_codebook.embed_avg"] = sums.view(grouped)
    state[f"{prefix}_codebook.embed"] = found["embed"].view(grouped)


def _under_our_names(module: VectorQuantize, state: dict, prefix: str, *_) -> None:
    """The original's entries of a state dict under our codebook's names and shapes."""
    theirs, ours, codebook = f"{prefix}_codebook.", f"{prefix}quantizer.codebook.", module.quantizer.codebook
    for name, mine in STATE.items():
        value, own = state.pop(theirs + name, None), getattr(codebook, mine, None)
        if value is not None and own is not None:
            state[ours + mine] = value.view(own.shape) if value.numel() == own.numel() else value
    ready = state.pop(theirs + "initted", None)
    if ready is not None and hasattr(codebook, "needs_init"):
        state[ours + "needs_init"] = ~ready.bool().reshape(())
