"""The compatible quantizers against dense formulas restated from their papers, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from harness import assert_gradients, assert_near, normal

from tokenflow_ext.compat.tokenflow import MultiScaleVectorQuantizer, VectorQuantizer
from tokenflow_ext.compat.unitok import VectorQuantizerM
from tokenflow_ext.compat.var import VectorQuantizer2, assignment

TERMS = (1.0, 0.7, 1.3, 0.4)
"""Weights of the output and the losses in what is differentiated."""


def unit(x):
    return F.normalize(x, dim=-1, eps=1e-12)


def straight_through(y, q):
    return q.detach() + (y - y.detach())


def entropy(logits, eps):
    """mean_n H(p_n) - H(mean_n p_n) of logits [N, K]."""
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * (mean + eps).log()).sum()


def halves(rows, tables):
    """Unit rows, unit tables, distances [N, K] of either half and of both."""
    ys = [unit(part) for part in rows.split([t.shape[1] for t in tables], dim=-1)]
    es = [unit(t) for t in tables]
    ds = [y.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * y @ e.T for y, e in zip(ys, es)]
    return torch.cat(ys, -1), torch.cat(es, -1), ds


def dense_tokenflow(z, tables, beta, ratio):
    rows = z.movedim(1, -1).reshape(-1, z.shape[1])
    y, e, ds = halves(rows, tables)
    ids = sum(ds).argmin(-1)
    q = e[ids]
    losses = [(q - y.detach()).square().mean(), beta * (q.detach() - y).square().mean()]
    losses += [ratio * entropy(-sum(ds) / 0.01, 1e-5), *[d.square().sum(-1).mean() for d in ds]]
    out = straight_through(y, q).view(len(z), *z.shape[2:], -1).movedim(-1, 1)
    return out, losses, ids


def check(actual, expected, leaves, upstream, tolerance=1e-9):
    """Outputs and losses, and the gradient of their weighted sum."""
    for a, b in zip(actual, expected, strict=True):
        assert_near(a, b, tolerance, size=1e-3)
    found = []
    for out, *losses in (actual, expected):
        total = (out * upstream).sum() * TERMS[0] + sum(w * v for w, v in zip(TERMS[1:], losses))
        found.append(torch.autograd.grad(total, leaves, retain_graph=True))
    assert_gradients(*found, tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_tokenflow(seed):
    torch.manual_seed(seed)
    quantizer = VectorQuantizer(50, 9, 0.3, 0.2, True, True, [6, 3], backend="native").double()
    z = normal(3, 9, 4, 5, seed=seed, dtype=torch.float64).requires_grad_()
    z_q, losses, (_, _, ids) = quantizer(z)
    tables = quantizer.codebooks()
    out, expected, wanted = dense_tokenflow(z, tables, 0.3, 0.2)
    assert torch.equal(ids, wanted)
    for a, b in zip(losses[4:], expected[3:], strict=True):
        assert_near(a, b, 1e-11)
    check((z_q, *losses[:3]), (out, *expected[:3]), [z, *tables], normal(*z.shape, seed=9, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(2))
def test_tokenflow_over_scales(seed):
    torch.manual_seed(seed)
    scales = (1, 3, 5)
    quantizer = MultiScaleVectorQuantizer(50, 9, 0.3, 0.2, True, True, [6, 3], scales=scales, backend="native").double()
    h = normal(2, 9, 5, 5, seed=seed, dtype=torch.float64).requires_grad_()
    f_hat, losses, (_, _, ids) = quantizer(h)
    tables = quantizer.codebooks()
    r, total, parts, wanted = h, 0.0, [], []
    for s in scales:
        out, found, i = dense_tokenflow(F.interpolate(r, (s, s), mode="area"), tables, 0.3, 0.2)
        up = F.interpolate(out, (5, 5), mode="bicubic") if s < 5 else out
        total, r = total + up, r - up.detach()
        parts.append(torch.stack(found))
        wanted.append(i.view(2, -1))
    expected = torch.stack(parts).mean(0)
    assert torch.equal(ids, torch.cat(wanted, 1))
    for a, b in zip(losses[4:], expected[3:], strict=True):
        assert_near(a, b, 1e-11)
    check((f_hat, *losses[:3]), (total, *expected[:3]), [h, *tables], normal(*h.shape, seed=9, dtype=torch.float64))


@pytest.mark.parametrize("groups", (1, 3))
def test_unitok(groups):
    quantizer = VectorQuantizerM(
        40 * groups, 4 * groups, 0.3, True, 0.05, groups, backend="native"
    ).double()  # fmt: skip
    z = normal(2, 7, 4 * groups, seed=2, dtype=torch.float64).requires_grad_()
    features, vq_loss, entropy_loss, _ = quantizer(z)
    tables, outs, vq, ent, ids = list(quantizer.parameters()), [], 0.0, 0.0, []
    for chunk, table in zip(z.chunk(groups, -1), tables):
        y, e = unit(chunk).flatten(0, 1), unit(table)
        i = (y @ e.T).argmax(-1)
        q = e[i]
        vq = vq + (0.3 * (q.detach() - y).square().mean() + (q - y.detach()).square().mean()) / groups
        ent = (
            ent + entropy(-(y.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * y @ e.T) / 0.05, 1e-7) / groups
        )
        outs.append(straight_through(y, q).view(2, 7, -1))
        ids.append(i.view(2, 7))
    assert torch.equal(quantizer.f_to_idx(z), torch.stack(ids, 1))
    upstream = normal(*z.shape, seed=9, dtype=torch.float64)
    check((features, vq_loss, entropy_loss), (torch.cat(outs, -1), vq, ent), [z, *tables], upstream)


@pytest.mark.parametrize("share", (0, 1, 2, 4))
@pytest.mark.parametrize("znorm", (False, True))
def test_var(share, znorm):
    torch.manual_seed(share)
    scales = (1, 2, 3, 5)
    quantizer = VectorQuantizer2(
        30, 4, znorm, 0.3, v_patch_nums=scales, quant_resi=-0.4, share_quant_resi=share, backend="native"
    ).double()
    f = normal(2, 4, 5, 5, seed=3, dtype=torch.float64).requires_grad_()
    f_hat, _, loss = quantizer(f)
    codebook, phis = quantizer.embedding.weight, quantizer.phis()
    r, total, expected, wanted = f.detach(), 0.0, 0.0, []
    for s, (n, p) in enumerate(zip(scales, assignment(len(phis), len(scales)))):
        x = F.interpolate(r, (n, n), mode="area").movedim(1, -1).flatten(0, 2)
        ids = (unit(x) @ unit(codebook).T).argmax(-1) if znorm else torch.cdist(x, codebook).argmin(-1)
        h = F.interpolate(codebook[ids].view(2, n, n, 4).movedim(-1, 1), (5, 5), mode="bicubic")
        h = 0.6 * h + 0.4 * F.conv2d(h, phis[p].weight, phis[p].bias, padding=1)
        total, r = total + h, r - h.detach()
        expected = expected + (0.3 * F.mse_loss(f, total.detach()) + F.mse_loss(total, f.detach())) / len(scales)
        wanted.append(ids.view(2, -1))
    assert all(torch.equal(a, b) for a, b in zip(quantizer.f_to_idxBl_or_fhat(f, to_fhat=False), wanted))
    leaves = [f, codebook, *quantizer.quant_resi.parameters()]
    assert len(leaves) == 2 + 2 * len(phis)
    upstream = normal(*f.shape, seed=9, dtype=torch.float64)
    check((f_hat, loss), (straight_through(f, total), expected), leaves, upstream)
