"""entropy_loss: how sure each row is of its code, and how evenly the codes are used; no N x K matrix, forward or backward."""

import torch

from tokenflow_ext import reference
from tokenflow_ext.ops import _check
from tokenflow_ext.ops._native import real, runs_on, use_native
from tokenflow_ext.ops._operator import define, define_autograd, define_backward
from tokenflow_ext.ops._softmax import best_codes, left_out
from tokenflow_ext.ops.normalize import normalize_rows


def _entropy_loss(x, codebook, good, eps):
    x, codebook = x.contiguous(), codebook.contiguous()
    rows, groups, _ = x.shape
    ids = best_codes("entropy_loss", x, codebook, good)
    losses, log_totals, entropies = x.new_empty(2), x.new_empty((groups, rows)), x.new_empty((groups, rows))
    means = x.new_empty(codebook.shape[:2])
    core, where = runs_on(x)
    core.entropy_loss(x, codebook, ids, eps, losses, log_totals, entropies, means, *where)
    return losses, ids, log_totals, entropies, means


def _entropy_loss_fake(x, codebook, good, eps):
    rows, groups = x.shape[:2]
    return (
        x.new_empty(2),
        x.new_empty((rows, groups), dtype=torch.int64),
        x.new_empty((groups, rows)),
        x.new_empty((groups, rows)),
        x.new_empty(codebook.shape[:2]),
    )


def _entropy_loss_backward(
    x, codebook, ids, log_totals, entropies, means, grad_losses, eps, wants_x, wants_codebook
):  # fmt: skip
    x, codebook, grad_losses = x.contiguous(), codebook.contiguous(), grad_losses.contiguous()
    grad_x = torch.empty_like(x) if wants_x else None
    grad_codebook = torch.empty_like(codebook) if wants_codebook else None
    core, where = runs_on(x)
    core.entropy_loss_backward(
        x, codebook, ids, eps, log_totals, entropies, means, grad_losses, grad_x, grad_codebook, *where
    )
    return grad_x, grad_codebook


def _entropy_loss_backward_fake(
    x, codebook, ids, log_totals, entropies, means, grad_losses, eps, wants_x, wants_codebook
):  # fmt: skip
    return x.new_empty(x.shape) if wants_x else None, x.new_empty(codebook.shape) if wants_codebook else None


def _setup(ctx, inputs, output):
    x, codebook, _, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, codebook, *output[1:])


def _backward(ctx, grad_losses, *_):
    if grad_losses is None:
        return None, None, None, None
    wants_x, wants_codebook = ctx.needs_input_grad[:2]
    grad_x, grad_codebook = ENTROPY_LOSS_BACKWARD(*ctx.saved_tensors, grad_losses, ctx.eps, wants_x, wants_codebook)
    return grad_x if wants_x else None, grad_codebook if wants_codebook else None, None, None


ENTROPY_LOSS = define(
    "entropy_loss(Tensor x, Tensor codebook, Tensor good, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _entropy_loss,
    _entropy_loss_fake,
)
ENTROPY_LOSS_BACKWARD = define_backward(
    "entropy_loss_backward(Tensor x, Tensor codebook, Tensor ids, Tensor log_totals, Tensor entropies, Tensor means, "
    "Tensor grad_losses, float eps, bool wants_x, bool wants_codebook) -> (Tensor, Tensor)",
    _entropy_loss_backward,
    _entropy_loss_backward_fake,
)
define_autograd(ENTROPY_LOSS, _setup, _backward)


def _searched(parts, metric: str, backend: str) -> list[torch.Tensor]:
    return [normalize_rows(part, backend=backend) for part in parts] if metric == "cosine" else list(parts)


def _logit_factors(xs, codebooks, metric: str, weights, temperature: float, backend: str):
    """Rows [N, G, C], codes [G, K, C] and good [N, G] whose products are the logits -distance / temperature.

    Constants of a row cancel in the softmax. What l2 needs of a code alone is one channel more.
    """
    codebooks, intact = left_out(*codebooks)
    xs, good = left_out(*xs)
    y, q = _searched(xs, metric, backend), _searched(codebooks, metric, backend)
    factors = [weight * (1.0 if metric == "dot" else 2.0) / temperature for weight in weights]
    rows = [part * factor for part, factor in zip(y, factors)]
    if metric == "l2":
        start = sum(part.square().sum(-1, keepdim=True) * (-0.5 * factor) for part, factor in zip(q, factors))
        rows, q = [*rows, y[0].new_ones(()).expand(*y[0].shape[:-1], 1)], [*q, start]
    rows, codes = (part[0] if len(part) == 1 else torch.cat(part, dim=-1) for part in (rows, q))
    return rows, torch.where(intact.unsqueeze(-1), codes, torch.nan), good


def entropy_loss(
    x, codebook, *, metric: str, temperature: float, weights=None, eps: float = 1e-5, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean_n H(p_n), -sum_k m_k log(m_k + eps)) in nats, with p = softmax(-distance / temperature) and m = mean_n p_n.

    The first is how unsure a row is of its code, the second how evenly the codes are used; callers minimise the first minus
    the second. Distances: cosine 2 - 2 cos, l2 squared, dot -x.c, over shared tables sum_t weights[t] d_t. Nothing of size
    N x K exists, forward or backward; probabilities under e^-20 / K (e^-44 / K in float64) may count as 0.

    Args:
        x: rows [..., D] for a codebook [K, D], [..., G, D] for [G, K, D] (both results are means over groups), or a sequence
            of T tensors [..., D_t] that share an index; any float type, computed in float32 (float64 for float64).
        codebook: the codes, or T tables [K, D_t]; for cosine not normalised in place.
        metric: "cosine", "l2" or "dot".
        temperature: > 0, in units of the distance.
        weights: T numbers >= 0 for shared tables, 1 each by default.
        eps: >= 0, inside the logarithm of the mean; 1e-5 in TokenFlow, IBQ, FQGAN and CODA, 1e-7 in UniTok.
        backend: "auto", "native" or "reference".

    Returns:
        Two 0-dim tensors, 0 for an empty batch. Rows with NaN or inf are left out, the mean's denominator stays; codes with
        NaN or inf have probability 0. Neither gets a gradient.

    Raises:
        ValueError, TypeError: a sentence with op, argument, wanted, got.
        RuntimeError: a second derivative.

    Source: TokenFlow, arXiv 2412.03069; Yu et al., 2310.05737.

    Example:
        >>> codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> first, second = entropy_loss(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), codebook, metric="cosine", temperature=0.1)
        >>> round(float(first), 4), round(float(second), 4)
        (0.0, 0.6931)
    """
    op = "entropy_loss"
    shared = not isinstance(x, torch.Tensor)
    if shared:
        _, weights = _check.shared_tables(op, x, codebook, weights)
        xs, codebooks = x, codebook
    else:
        if weights is not None:
            raise ValueError(f"{op}: weights: wanted None for one table, got {weights!r}")
        xs, codebooks = ([part] for part in _check.rows_and_table(op, x, codebook))
    _check.metric(op, metric)
    temperature, eps = _check.number(op, "temperature", temperature), _check.non_negative(op, "eps", eps)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature: wanted a finite number > 0, got {temperature}")
    if not use_native(op, backend, *xs, *codebooks):
        _check.warn_about_rows(op, *xs)
        return reference.entropy_loss(x, codebook, metric=metric, temperature=temperature, weights=weights, eps=eps)
    dtype = real(*xs, *codebooks)
    if shared:
        xs = [part.to(dtype).reshape(_check.count(part.shape[:-1]), 1, part.shape[-1]) for part in xs]
        codebooks = [part.to(dtype)[None] for part in codebooks]
    else:
        xs, codebooks = [xs[0].to(dtype)], [codebooks[0].to(dtype)]
    factors = _logit_factors(xs, codebooks, metric, weights or [1.0], temperature, backend)
    first, second = ENTROPY_LOSS(*factors, eps)[0].unbind()
    return first, second
