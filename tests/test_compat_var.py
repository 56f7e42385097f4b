"""compat.var: the published numbers through the original's constructor and routes, its counters, edge shapes, bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from golden_values import Case
from harness import assert_near, assert_sentence, near_ties, normal, same_bits
from test_golden import BACKENDS
from test_var_golden import CASES, VAR, codebook_gradient

from tokenflow_ext import ops
from tokenflow_ext.compat.var import VectorQuantizer2, assignment


def build(case: Case, **options) -> VectorQuantizer2:
    """The quantizer of a golden case, its weights loaded strictly under the original's names."""
    o = case.options
    share = {"one shared": 1, "one per scale": 0, "4 partially shared": 4}[o["phi_sharing"]]
    quantizer = VectorQuantizer2(
        o["codebook_size"], o["width"], o["metric"].startswith("cosine"), o["beta"], v_patch_nums=tuple(o["scales"]),
        quant_resi=o["phi_ratio"], share_quant_resi=share, **options,
    )  # fmt: skip
    state = {
        "embedding.weight": case["codebook"],
        "ema_vocab_hit_SV": torch.zeros(len(o["scales"]), o["codebook_size"]),
    }
    for name in set(o["phi_of_scale"]) if o["phi_ratio"] else ():
        state |= {f"quant_resi.{name}.{part}": case[f"phi/{name}.{part}"] for part in ("weight", "bias")}
    quantizer.load_state_dict(state, strict=True)
    return quantizer


def ids_of(case: Case) -> list[torch.Tensor]:
    return list(case["idx"].split([s * s for s in case.options["scales"]], dim=1))


def code_maps(case: Case, quantizer: VectorQuantizer2) -> list[torch.Tensor]:
    """E[i_s] as maps [B, C, h, w]."""
    return [
        quantizer.embedding(i).transpose(1, 2).unflatten(-1, (s, s))
        for i, s in zip(ids_of(case), case.options["scales"])
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, backend):
    case = Case(VAR, name)
    quantizer, f = build(case, backend=backend), case["f"].requires_grad_()
    out, usages, loss = quantizer(f)
    assert usages is None
    case.check("f_hat", out, case["out"])
    assert abs(loss.item() - case.scalars["loss"]) <= case.limit("f_hat")
    named = {**dict(quantizer.named_parameters()), "f": f}
    passed = torch.autograd.grad(
        (out * case["upstream"]).sum(), list(named.values()), retain_graph=True, allow_unused=True
    )
    case.check("gradient", passed[-1], case["grad_f_out"])
    assert all(g is None or not g.any() for g in passed[:-1])
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values()))))
    case.check("gradient", grads["f"], case["grad_f_loss"])
    case.check("gradient", grads["embedding.weight"], codebook_gradient(case, case["codebook"]))
    for key in grads.keys() - {"f", "embedding.weight"}:
        case.check("gradient", grads[key], case[f"grad_phi/{key.removeprefix('quant_resi.')}"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_routes(name, backend):
    case = Case(VAR, name)
    quantizer = build(case, backend=backend).eval()
    ids = quantizer.f_to_idxBl_or_fhat(case["f"], to_fhat=False)
    assert case.check_indices(torch.cat(ids, dim=1)) == 0
    maps = quantizer.f_to_idxBl_or_fhat(case["f"], to_fhat=True)
    case.check("f_hat", maps[-1], case["f_hat"])
    decoded = quantizer.embed_to_fhat(code_maps(case, quantizer))
    case.check("f_hat", decoded[-1], case["f_hat_decoded"])
    for s, expected in enumerate(case["f_hat_per_scale"] if "f_hat_per_scale" in case else ()):
        case.check("f_hat", maps[s], expected)
        case.check("f_hat", decoded[s], expected)
    growing = quantizer.embed_to_fhat(code_maps(case, quantizer), all_to_max_scale=False)
    case.check("f_hat", growing[-1], case["f_hat_growing"])
    assert [tuple(m.shape[2:]) for m in growing] == quantizer.scales
    last = quantizer.embed_to_fhat(code_maps(case, quantizer), last_one=True)
    assert same_bits(last, decoded[-1])
    case.check("f_hat", quantizer.idxBl_to_var_input(ids), case["teacher_input"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_step_by_step(name, backend):
    """Sampling's route writes f_hat in place and gives what teacher forcing gives."""
    case = Case(VAR, name)
    quantizer = build(case, backend=backend)
    f_hat, rows = torch.zeros_like(case["f"]), []
    steps = code_maps(case, quantizer)
    with torch.no_grad():
        for s, h in enumerate(steps):
            same, following = quantizer.get_next_autoregressive_input(s, len(steps), f_hat, h)
            assert same is f_hat
            rows.append(following.flatten(2).transpose(1, 2))
    assert following is f_hat
    case.check("f_hat", f_hat, case["f_hat_decoded"])
    stepwise = torch.cat(rows[:-1], dim=1)
    case.check("f_hat", stepwise, case["stepwise_input"])
    assert_near(stepwise, quantizer.idxBl_to_var_input(ids_of(case)), 1e-6)


def test_one_step_costs_one_scale(monkeypatch):
    """Neither the codebook nor earlier scales are touched again: the op sees the pixels of this scale alone."""
    quantizer, seen = VectorQuantizer2(64, 8, False, v_patch_nums=(1, 2, 4, 8), backend="native"), []
    true = ops.multiscale_decode

    def spy(ids, codebooks, **options):
        seen.append((tuple(ids.shape), len(options["scales"])))
        return true(ids, codebooks, **options)

    monkeypatch.setattr(ops, "multiscale_decode", spy)
    f_hat = torch.zeros(2, 8, 8, 8)
    with torch.no_grad():
        for s, n in enumerate((1, 2, 4, 8)):
            quantizer.get_next_autoregressive_input(s, 4, f_hat, torch.randn(2, 8, n, n))
    assert seen == [((2, n * n), 1) for n in (1, 2, 4, 8)]


def test_other_scales():
    case = Case(VAR, "released_l2")
    quantizer, scales = build(case, backend="native"), case.options["alt_scales"]
    ids = quantizer.f_to_idxBl_or_fhat(case["f"], to_fhat=False, v_patch_nums=scales)
    assert torch.equal(torch.cat(ids, 1), case["alt_idx"])
    pairs = [(s, s) for s in scales]
    maps = quantizer.f_to_idxBl_or_fhat(case["f"], to_fhat=True, v_patch_nums=pairs)
    case.check("f_hat", maps[-1], case["alt_f_hat"])


@pytest.mark.parametrize("phis", range(1, 12))
def test_assignment_rounds_as_numpy(phis):
    """linspace and argmin of float64 exactly: exact ties between two phi are decided by their rounding."""
    share = 3 if phis == 4 else 2
    ticks = np.linspace(1 / share / phis, 1 - 1 / share / phis, phis)
    for scales in range(2, 40):
        expected = [int(np.argmin(np.abs(ticks - s / (scales - 1)))) for s in range(scales)]
        assert assignment(phis, scales) == expected
    assert assignment(phis, 1) == [0]


@pytest.mark.parametrize("share", (0, 1, 4))
@pytest.mark.parametrize("znorm", (False, True))
def test_one_scale(share, znorm):
    quantizer = VectorQuantizer2(32, 6, znorm, v_patch_nums=(3,), share_quant_resi=share, backend="native")
    f = normal(2, 6, 3, 3, seed=3).requires_grad_()
    f_hat, usages, loss = quantizer(f, ret_usages=True)
    loss.backward()
    (ids,) = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
    x, codebook = f.detach().movedim(1, -1).flatten(1, 2), quantizer.embedding.weight.detach()
    metric = "cosine" if znorm else "l2"
    exact = ops.nearest_code(x.double(), codebook.double(), metric=metric, backend="reference")
    near_ties(ids.flatten(), exact.flatten(), [x.flatten(0, 1)], [codebook], metric)
    h = codebook[ids].transpose(1, 2).unflatten(-1, (3, 3))
    phi = quantizer.phis()[0]
    expected = 0.5 * h + 0.5 * torch.nn.functional.conv2d(h, phi.weight, phi.bias, padding=1)
    assert_near(f_hat, expected, 1e-5)
    assert len(usages) == 1 and usages[0] > 0
    assert_near(phi(h), expected, 1e-5)
    assert quantizer.idxBl_to_var_input([ids]).shape == (2, 0, 6)
    same, following = quantizer.get_next_autoregressive_input(0, 1, torch.zeros_like(f_hat), h)
    assert following is same and same_bits(quantizer.embed_to_fhat([h], last_one=True), same)
    assert_near(same, f_hat, 1e-6)


@pytest.mark.parametrize("batch", (0, 1))
def test_oblong_scales_and_small_batches(batch):
    scales = ((1, 2), (3, 4), (5, 7))
    quantizer = VectorQuantizer2(40, 4, False, v_patch_nums=scales, share_quant_resi=2, backend="native")
    f = normal(batch, 4, 5, 7, seed=4)
    f_hat, usages, loss = quantizer(f, ret_usages=True)
    assert f_hat.shape == f.shape and len(usages) == 3 and loss.isfinite()
    ids = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
    assert [tuple(i.shape) for i in ids] == [(batch, 2), (batch, 12), (batch, 35)]
    rows, running = quantizer.idxBl_to_var_input(ids), torch.zeros_like(f)
    assert rows.shape == (batch, 47, 4)
    at = 0
    with torch.no_grad():
        for s, (i, grid) in enumerate(zip(ids, scales)):
            h = quantizer.embedding(i).transpose(1, 2).unflatten(-1, grid)
            _, following = quantizer.get_next_autoregressive_input(s, 3, running, h)
            if s < 2:
                cells = scales[s + 1][0] * scales[s + 1][1]
                assert_near(following.flatten(2).transpose(1, 2), rows[:, at : at + cells], 1e-6)
                at += cells
    assert_near(running, f_hat, 1e-5)


def test_the_last_scale_is_searched_at_the_maps_size():
    """A model for 4 x 4 runs on 6 x 6, as the original does."""
    quantizer = VectorQuantizer2(40, 4, False, v_patch_nums=(1, 2, 4), backend="native").eval()
    f = normal(2, 4, 6, 6, seed=5)
    ids = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False, v_patch_nums=(1, 2, 6))
    f_hat = quantizer.f_to_idxBl_or_fhat(f, to_fhat=True, v_patch_nums=(1, 2, 6))[-1]
    assert ids[-1].shape == (2, 36)
    assert_near(quantizer(f)[0], f_hat, 1e-6)


def hits(ids, codes):
    return torch.stack([torch.bincount(i.flatten(), minlength=codes).float() for i in ids])


def test_clean_counter():
    """Moves without a process group, in training only; steps are steps; a scale is held to its own share of tokens."""
    quantizer = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 2, 4), backend="native")
    quantizer.embedding.weight.data.mul_(3)
    expected, step = None, 0
    for step in range(103):
        f = normal(3, 4, 4, 4, seed=step)
        _, usages, _ = quantizer(f, ret_usages=True)
        new = hits(quantizer.f_to_idxBl_or_fhat(f, to_fhat=False), 16)
        decay = 0.9 if step < 100 else 0.99
        expected = new if expected is None else decay * expected + (1 - decay) * new
        if step in (0, 1, 99, 100, 102):
            assert_near(quantizer.ema_vocab_hit_SV, expected, 1e-5)
    share = expected / expected.sum(-1, keepdim=True)
    assert usages == pytest.approx((100 * (share >= 0.08 / 16).float().mean(-1)).tolist())
    before = quantizer.ema_vocab_hit_SV.clone()
    quantizer.eval()
    assert quantizer(f, ret_usages=True)[1] == pytest.approx(usages)
    assert torch.equal(quantizer.ema_vocab_hit_SV, before)
    resumed = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 2, 4), backend="native")
    resumed.load_state_dict(quantizer.state_dict(), strict=True)
    resumed(f)
    assert_near(resumed.ema_vocab_hit_SV, 0.99 * before + 0.01 * new, 1e-5)


def test_quirks_without_a_process_group():
    """As in the original nothing moves and every usage is 0; unlike it, nothing crashes."""
    quantizer = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 2, 4), quirks=True, backend="native")
    _, usages, _ = quantizer(normal(3, 4, 4, 4), ret_usages=True)
    assert usages == [0.0, 0.0, 0.0] and not quantizer.ema_vocab_hit_SV.any()


def test_rows_that_are_not_numbers_do_not_count():
    quantizer = VectorQuantizer2(16, 4, False, v_patch_nums=(2, 4), backend="native")
    f = normal(2, 4, 4, 4)
    f[1, 0, 0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="NaN"):
        quantizer(f)
    # Scale 2 x 2 loses one of eight rows; its NaN code then spreads over that image's 4 x 4 map.
    assert float(quantizer.ema_vocab_hit_SV[0].sum()) == 7
    assert quantizer.ema_vocab_hit_SV.isfinite().all()
    assert 16 <= float(quantizer.ema_vocab_hit_SV[1].sum()) < 32


def test_state_dict_of_another_list_of_scales():
    """As with the original's loader the counter of another number of scales is not taken, all else is."""
    old = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 2, 4), backend="native")
    old(normal(2, 4, 4, 4))
    new = VectorQuantizer2(16, 4, False, v_patch_nums=(1, 4), backend="native")
    new.load_state_dict(old.state_dict(), strict=True)
    assert torch.equal(new.embedding.weight, old.embedding.weight) and not new.ema_vocab_hit_SV.any()


def test_half_models_keep_their_tokens():
    quantizer = VectorQuantizer2(64, 8, False, v_patch_nums=(1, 2, 4), backend="native")
    f = normal(2, 8, 4, 4).bfloat16()
    ids = quantizer.f_to_idxBl_or_fhat(f.float(), to_fhat=False)
    quantizer.bfloat16()
    assert {p.dtype for p in quantizer.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(ids, quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)))
    out, _, loss = quantizer(f)
    assert out.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_copies():
    quantizer = VectorQuantizer2(16, 4, True, v_patch_nums=(1, 2), share_quant_resi=0, backend="native")
    f = normal(2, 4, 2, 2)
    quantizer(f)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        a, b = quantizer.eval()(f, ret_usages=True), other.eval()(f, ret_usages=True)
        assert same_bits(a[0], b[0]) and a[1] == b[1]
        assert int(other.record_hit) == 1


def test_eini():
    quantizer = VectorQuantizer2(1000, 8, False, v_patch_nums=(1,))
    quantizer.eini(-2.0)
    assert 0.0019 < float(quantizer.embedding.weight.detach().abs().max()) <= 0.002
    quantizer.eini(0.3)
    assert 0.25 < float(quantizer.embedding.weight.detach().std()) < 0.31
    before = quantizer.embedding.weight.clone()
    quantizer.eini(0)
    assert torch.equal(before, quantizer.embedding.weight)


def test_bad_input():
    good = {"vocab_size": 8, "Cvae": 4, "using_znorm": False, "v_patch_nums": (1, 2)}
    for error, argument, value in (
        (ValueError, "vocab_size", 0), (TypeError, "vocab_size", 8.0), (ValueError, "Cvae", -1),
        (TypeError, "using_znorm", 1), (ValueError, "beta", -1.0), (TypeError, "beta", "a"),
        (ValueError, "v_patch_nums", None), (ValueError, "v_patch_nums", ()), (ValueError, "v_patch_nums", (0, 2)),
        (TypeError, "v_patch_nums", 4), (ValueError, "quant_resi", float("nan")),
        (TypeError, "quant_resi", None), (ValueError, "share_quant_resi", -1), (TypeError, "share_quant_resi", 1.5),
        (ValueError, "default_qresi_counts", -2), (TypeError, "quirks", 1), (ValueError, "backend", "fast"),
    ):  # fmt: skip
        assert_sentence(error, "VectorQuantizer2", argument, lambda: VectorQuantizer2(**{**good, argument: value}))
    quantizer = VectorQuantizer2(**good)
    f, h = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1)
    for argument, call in (
        ("f_BChw", lambda: quantizer(torch.zeros(1, 5, 2, 2))),
        ("features", lambda: quantizer(torch.zeros(4, 2, 2))),
        ("f_BChw", lambda: quantizer.f_to_idxBl_or_fhat(torch.zeros(1, 3, 2, 2), False)),
        ("v_patch_nums", lambda: quantizer.f_to_idxBl_or_fhat(f, False, (1, 3))),
        ("ms_h_BChw", lambda: quantizer.embed_to_fhat([f])),
        ("ms_h_BChw", lambda: quantizer.embed_to_fhat([])),
        ("si", lambda: quantizer.get_next_autoregressive_input(2, 2, f, h)),
        ("SN", lambda: quantizer.get_next_autoregressive_input(0, 3, f, h)),
        ("h_BChw", lambda: quantizer.get_next_autoregressive_input(0, 2, f, torch.zeros(1, 3, 1, 1))),
    ):
        assert_sentence(ValueError, "VectorQuantizer2", argument, call)
