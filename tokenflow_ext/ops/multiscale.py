"""Multi-scale residual quantization: the loop, its pooled rows, its decoder, and the inputs of a next-scale model.

Scales are grids (h, w), an int n for (n, n), in any order, with repeats; ids [B, L] lie scale by scale, row major inside
a scale. A scale whose ids are all -1 in an image is dropped there: it adds nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenflow_ext import reference
from tokenflow_ext._types import Quantized
from tokenflow_ext.ops import _check, _multiscale_decode, _multiscale_quantize
from tokenflow_ext.ops import _multiscale_check as check
from tokenflow_ext.ops._native import use_native

Scales = Sequence[int | tuple[int, int]]
Phi = tuple[Tensor, Tensor, float, Sequence[int]]


def multiscale_quantize(
    features: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    metric: str = "cosine",
    weights: Sequence[float] | None = None,
    phi: Phi | None = None,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    loss_on: str = "codes",
    normalize_codes: bool | None = None,
    backend: str = "auto",
) -> Quantized:
    """Residual quantization from grid to grid, in one call.

        r_1 = x;   ids_s = nearest codes of Down r_s;   step_s = phi_s(Up q_s);   r_{s+1} = r_s - sg(step_s)
        quantized = sum_s step_s

    Down is area, Up bicubic (a = -0.75, align_corners False, border clamped), q_s the codes of ids_s. With y_s the rows as
    searched, loss_on="codes" is the plain mean over scales of codebook_weight mean((q_s - sg y_s)^2) + commitment_weight
    mean((sg q_s - y_s)^2); loss_on="accumulated" is the mean over scales of codebook_weight mse(f_s, sg x) +
    commitment_weight mse(sg f_s, x) for the running maps f_s. d quantized / dy_s = 1 (codes), d quantized / dx = 1
    (accumulated); `quantized` sends no gradient to codebooks or phi, which learn from the loss alone.

    Args:
        features: x [B, C, H, W], any float type; the loop runs in float32 (float64 for float64).
        codebooks: T tables [K, D_t] under one index, sum D_t = C; any float type.
        scales: grids, none larger than the map.
        metric: "cosine", "l2" or "dot"; rows and codes are unit per table for cosine.
        weights: T numbers >= 0 of the distances, 1 each by default; they decide ids, not the loss.
        phi: (weight [P, C, C, 3, 3], bias [P, C], ratio, assignment), phi_s(u) = (1 - ratio) u + ratio (conv(u) + bias) with
            row assignment[s]; only with loss_on="accumulated".
        commitment_weight: weight of the term that moves the features.
        codebook_weight: weight of the term that moves the codebooks.
        loss_on: "codes" (TokenFlow) or "accumulated" (VAR).
        normalize_codes: whether the codes that are added are unit; None means metric == "cosine".
        backend: "auto", "native" or "reference".

    Returns:
        Quantized(quantized [B, C, H, W] in x's type, int64 ids [B, L], 0-dim loss). A pooled row that holds NaN or inf gets
        id 0 and NaN codes, and is left out of loss and gradients.

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.
        RuntimeError: a second derivative.

    Source: TokenFlow, arXiv 2412.03069, section 3.1; VAR, arXiv 2404.02905, for "accumulated" and phi.

    Example:
        >>> tables = torch.randn(64, 6), torch.randn(64, 2)
        >>> quantized, indices, loss = multiscale_quantize(torch.randn(2, 8, 4, 4), tables, scales=(1, 2, 4))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 21]))
    """
    options = {"scales": scales, "metric": metric, "weights": weights, "phi": phi, "loss_on": loss_on}
    loss_weights = {"commitment_weight": commitment_weight, "codebook_weight": codebook_weight}
    options = {**options, **loss_weights, "normalize_codes": normalize_codes, "backend": backend}
    return quantize_with_rows(features, codebooks, **options, with_rows=False)[0]


def quantize_with_rows(
    features, codebooks, *, scales, metric, weights, phi, commitment_weight, codebook_weight, loss_on, normalize_codes, backend,
    with_rows=True,
) -> tuple[Quantized, Tensor]:  # fmt: skip
    """`multiscale_quantize` and the rows [B, L, C] that it searched for, without gradient: what training statistics need."""
    op = "multiscale_quantize"
    check.maps(op, features)
    accumulated = check.loss_on(op, loss_on, phi)
    made = check.setup(
        op, codebooks, scales, features.shape[2:], metric, phi, normalize_codes, weights=weights, features=features
    )
    commitment_weight = _check.non_negative(op, "commitment_weight", commitment_weight)
    codebook_weight = _check.non_negative(op, "codebook_weight", codebook_weight)
    if not use_native(op, backend, features, *codebooks):
        options = {"scales": scales, "metric": metric, "weights": made.weights, "phi": phi, "loss_on": loss_on}
        options = {**options, "commitment_weight": commitment_weight, "codebook_weight": codebook_weight}
        out = reference.multiscale_quantize(features, codebooks, **options, normalize_codes=normalize_codes)
        if not with_rows:
            return out, features.new_empty(0)
        with torch.no_grad():
            return out, reference.multiscale_rows(
                features, out.indices, codebooks, **options, normalize_codes=normalize_codes
            )
    weight, bias, ratio = made.phi_tensors()
    inputs = (features, *codebooks, *(phi or ())[:2])
    keep = with_rows or (torch.is_grad_enabled() and any(i.requires_grad for i in inputs))
    out = _multiscale_quantize.MULTISCALE_QUANTIZE(
        features, made.codebook(codebooks), weight, bias, made.grids, made.widths, made.weights, metric, made.unit_codes,
        ratio, accumulated, commitment_weight, codebook_weight, keep,
    )  # fmt: skip
    return Quantized(*out[:3]), out[3]


def multiscale_rows(
    features: Tensor,
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    metric: str = "cosine",
    weights: Sequence[float] | None = None,
    phi: Phi | None = None,
    commitment_weight: float = 0.25,
    codebook_weight: float = 1.0,
    loss_on: str = "codes",
    normalize_codes: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """The pooled residual rows Down r_s that each id was searched for, following given ids.

    Takes the options of `multiscale_quantize`, so that one set of them serves both; those of the loss do not matter here.

    Args:
        features: [B, C, H, W], any float type.
        indices: int64 ids [B, L] of all scales.
        codebooks: T tables [K, D_t].
        scales: grids, none larger than the map.
        metric: "cosine", "l2" or "dot".
        weights: as in `multiscale_quantize`.
        phi: as in `multiscale_quantize`.
        commitment_weight: as in `multiscale_quantize`.
        codebook_weight: as in `multiscale_quantize`.
        loss_on: as in `multiscale_quantize`.
        normalize_codes: whether the codes that are subtracted are unit; None means metric == "cosine".
        backend: "auto", "native" or "reference".

    Returns:
        [B, L, C] float32 (float64), not normalised; NaN throughout where a row holds NaN or inf, zeros where a scale was
        dropped. Differentiable once, in `features` only.

    Raises:
        ValueError: ids outside the table (CPU), ids that are not all scales, wrong shapes or options.
        TypeError: wrong types.

    Example:
        >>> x, table = torch.randn(2, 8, 4, 4), torch.randn(64, 8)
        >>> multiscale_rows(x, torch.zeros(2, 21, dtype=torch.int64), [table], scales=(1, 2, 4)).shape
        torch.Size([2, 21, 8])
    """
    op = "multiscale_rows"
    check.maps(op, features)
    check.loss_on(op, loss_on, phi)
    made = check.setup(
        op, codebooks, scales, features.shape[2:], metric, phi, normalize_codes, weights=weights, features=features
    )
    _check.non_negative(op, "commitment_weight", commitment_weight)
    _check.non_negative(op, "codebook_weight", codebook_weight)
    check.prefix(op, indices, made, codebooks, whole=True)
    if indices.shape[0] != features.shape[0]:
        raise ValueError(f"{op}: indices: wanted {features.shape[0]} rows, as many as features, got {indices.shape[0]}")
    if not use_native(op, backend, features, *codebooks):
        check.values_of_ids(op, indices, made, len(codebooks[0]))
        return reference.multiscale_rows(
            features, indices, codebooks, scales=scales, metric=metric, phi=phi,
            loss_on=loss_on, normalize_codes=normalize_codes,
        )  # fmt: skip
    weight, bias, ratio = (p.detach() if isinstance(p, Tensor) else p for p in made.phi_tensors())
    codebook = made.codebook([c.detach() for c in codebooks])
    return _multiscale_decode.MULTISCALE_ROWS(
        features, indices, codebook, weight, bias, made.grids, made.widths, made.unit_codes, ratio
    )[0]


def multiscale_decode(
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    size: int | tuple[int, int],
    metric: str = "cosine",
    phi: Phi | None = None,
    normalize_codes: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """The map that ids stand for: sum over the scales of a prefix of phi_s(Up q_s).

    Args:
        indices: int64 ids [B, L'] of the first p scales, any p from 0 (zeros) to S.
        codebooks: T tables [K, D_t].
        scales: all S grids.
        size: (H, W) of the map, or H for a square.
        metric: "cosine", "l2" or "dot"; decides whether codes are unit, with normalize_codes.
        phi: (weight, bias, ratio, assignment) as in `multiscale_quantize`.
        normalize_codes: whether codes are unit; None means metric == "cosine".
        backend: "auto", "native" or "reference".

    Returns:
        [B, C, H, W] float32 (float64 where a codebook is): `quantized` of `multiscale_quantize`, bit for bit.
        Differentiable once, in codebooks and phi.

    Raises:
        ValueError: ids outside the table (CPU), a prefix that is not whole scales, wrong shapes or options.
        TypeError: wrong types.

    Example:
        >>> multiscale_decode(torch.tensor([[0]]), [torch.tensor([[3.0, 4.0]])], scales=(1, 2), size=2)[0, :, 0, 0]
        tensor([0.6000, 0.8000])
    """
    op = "multiscale_decode"
    made = check.setup(op, codebooks, scales, size, metric, phi, normalize_codes)
    check.prefix(op, indices, made, codebooks)
    if not use_native(op, backend, indices, *codebooks):
        check.values_of_ids(op, indices, made, len(codebooks[0]))
        return reference.multiscale_decode(
            indices, codebooks, scales=scales, size=size, metric=metric, phi=phi,
            normalize_codes=normalize_codes,
        )  # fmt: skip
    weight, bias, ratio = made.phi_tensors()
    return _multiscale_decode.MULTISCALE_DECODE(
        indices,
        made.codebook(codebooks),
        weight,
        bias,
        made.grids,
        *made.size,
        made.widths,
        made.unit_codes,
        ratio,
        False,
    )[0]


def multiscale_inputs(
    indices: Tensor,
    codebooks: Sequence[Tensor],
    *,
    scales: Scales,
    size: int | tuple[int, int],
    rule: str,
    refine: int | None = None,
    metric: str = "cosine",
    phi: Phi | None = None,
    normalize_codes: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """What an autoregressive model reads to predict the next scale, from the ids of the first p scales.

    Scales count from 1. rule="accumulate" (VAR): the running map f_{s-1} at full size, Down to grid s. rule="chain"
    (TokenFlow's language model): state_1 = q_1, input_s = bicubic(state_{s-1} -> grid s), state_s = input_s + q_s.

    Args:
        indices: int64 ids [B, L'] of the first p scales.
        codebooks: T tables [K, D_t].
        scales: all S grids.
        size: (H, W) of the map, or H for a square.
        rule: "accumulate" or "chain".
        refine: k in 2..p, with "chain": scale k's rows become state_k, which already holds its codes.
        metric: "cosine", "l2" or "dot"; decides whether codes are unit, with normalize_codes.
        phi: as in `multiscale_quantize`, with "accumulate".
        normalize_codes: whether codes are unit; None means metric == "cosine".
        backend: "auto", "native" or "reference".

    Returns:
        [B, R, C] float32 (float64): rows of scales 2 .. min(p + 1, S). Differentiable once, in codebooks and phi.

    Raises:
        ValueError: ids outside the table (CPU), a prefix that is not whole scales, wrong shapes or options.
        TypeError: wrong types.

    Source: VAR, arXiv 2404.02905, Algorithm 2; TokenFlow, arXiv 2412.03069, section 3.3.

    Example:
        >>> ids = torch.zeros(2, 5, dtype=torch.int64)
        >>> multiscale_inputs(ids, [torch.randn(9, 8)], scales=(1, 2, 4), size=4, rule="chain").shape
        torch.Size([2, 20, 8])
    """
    op = "multiscale_inputs"
    made = check.setup(op, codebooks, scales, size, metric, phi, normalize_codes)
    p = check.prefix(op, indices, made, codebooks)
    if rule not in ("accumulate", "chain"):
        raise ValueError(f"{op}: rule: wanted 'accumulate' or 'chain', got {rule!r}")
    if phi is not None and rule == "chain":
        raise ValueError(f"{op}: phi: wanted rule='accumulate' with it, got rule='chain'")
    if refine is not None:
        _check.integer(op, "refine", refine)
    if refine is not None and (rule != "chain" or not 2 <= refine <= p):
        raise ValueError(
            f"{op}: refine: wanted a scale in 2..{p} that has ids, with rule='chain', got {refine} with rule={rule!r}"
        )
    if not use_native(op, backend, indices, *codebooks):
        check.values_of_ids(op, indices, made, len(codebooks[0]))
        return reference.multiscale_inputs(
            indices, codebooks, scales=scales, size=size, rule=rule,
            refine=refine, metric=metric, phi=phi, normalize_codes=normalize_codes,
        )  # fmt: skip
    codebook = made.codebook(codebooks)
    if rule == "chain":
        return _multiscale_decode.MULTISCALE_CHAIN(
            indices, codebook, made.grids, made.widths, made.unit_codes, refine or 0
        )[0]
    weight, bias, ratio = made.phi_tensors()
    return _multiscale_decode.MULTISCALE_DECODE(
        indices, codebook, weight, bias, made.grids, *made.size, made.widths, made.unit_codes, ratio, True
    )[0]
