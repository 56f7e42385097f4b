"""compat.tokenflow: the published numbers through the original's constructor and returns, its usage window, edges, bad input."""

import copy
import pickle
import warnings

import pytest
import torch
from golden_values import Case, case_names
from harness import assert_near, assert_sentence, normal, same_bits
from test_golden import BACKENDS, QUANTIZER, table_gradient
from test_multiscale_golden import CHAINS, MULTISCALE
from torch.utils.checkpoint import checkpoint

from tokenflow_ext.compat import tokenflow as compat
from tokenflow_ext.compat.tokenflow import MultiScaleVectorQuantizer, VectorQuantizer

SMALL = {
    "n_e": 16, "e_dim": 5, "beta": 0.25, "entropy_loss_ratio": 0.0, "l2_norm": True, "show_usage": True, "split": (3, 2),
}  # fmt: skip


def build(case: Case, kind=VectorQuantizer, **options):
    """The quantizer of a golden case, its weights loaded strictly under the original's names."""
    o = case.options
    quantizer = kind(
        o["codebook_size"], sum(o["table_dims"]), o["beta"], o["entropy_ratio"], True, True, o["table_dims"], **options
    )
    window = torch.full((131072,), 0.0 if options.get("quirks") else -1.0)
    tables = {"embedding_vqkd.weight": case["sem_table"], "embedding_vqgan.weight": case["pix_table"]}
    quantizer.load_state_dict({**tables, "codebook_used": window}, strict=True)
    return quantizer


def grads(value, quantizer, z):
    """Gradients to z, and to the tables side by side; zeros where none arrives."""
    leaves = [z, *quantizer.codebooks()]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
    return found[0], torch.cat(found[1:], dim=1)


def check_losses(case, losses, quantizer, z, at):
    """The tuple of losses and its gradients; `at` names the input in the fixture."""
    vq, commit, entropy, _, sem, pix = losses
    for value, key in ((vq, "vq_loss"), (commit, "commit_loss")):
        assert abs(value.item() - case.scalars[key]) <= case.limit("value"), key
    assert abs(entropy.item() - case.scalars["entropy_loss"]) <= 1e-5
    for value, key in ((sem, "sem_distance_square_sum"), (pix, "pix_distance_square_sum")):
        assert value.item() == pytest.approx(case.scalars[key], rel=1e-5) and not value.requires_grad
    z_vq, tables_vq = grads(vq, quantizer, z)
    z_commit, tables_commit = grads(commit, quantizer, z)
    assert not z_vq.any() and not tables_commit.any(), "each term moves its own side"
    case.check("gradient", tables_vq, table_gradient(case))
    if case.name == "scaled_rows":
        share = (z_commit - case["grad_z_loss"]).abs().amax(dim=1) / case["grad_z_loss"].abs().amax(dim=1)
        assert float(share.max()) <= 5e-5
    else:
        case.check("gradient", z_commit, case[f"grad_{at}_loss"])
    if f"grad_{at}_entropy" in case:
        z_entropy, tables_entropy = grads(entropy, quantizer, z)
        case.check("entropy_gradient", z_entropy, case[f"grad_{at}_entropy"])
        expected = torch.cat([case["grad_sem_entropy"], case["grad_pix_entropy"]], dim=1)
        case.check("entropy_gradient", tables_entropy, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", case_names(QUANTIZER))
def test_forward(name, backend):
    case = Case(QUANTIZER, name)
    quantizer, z = build(case, backend=backend, quirks=True), case["z"].requires_grad_()
    z_q, losses, (perplexity, encodings, indices) = quantizer(z)
    assert encodings is None and indices.dim() == 1
    case.check_indices(indices.view(case["idx"].shape))
    case.check("value", z_q, case["out"])
    assert losses[3] == pytest.approx(case.scalars["usage_window"])
    passed, none = grads((z_q * case["upstream"]).sum(), quantizer, z)
    assert not none.any()
    if name != "scaled_rows":
        case.check("gradient", passed, case["grad_z_out"])
    check_losses(case, losses, quantizer, z, "z")
    _, counts = indices.unique(return_counts=True)
    share = counts.double() / counts.sum()
    assert float(perplexity) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
    assert len(counts) == case.scalars["distinct_codes_in_batch"]
    codes = quantizer.get_codebook_entry(indices)
    case.check("value", codes.view_as(case["code"]), case["code"])
    b, c, h, w = z.shape
    assert same_bits(quantizer.get_codebook_entry(indices, (b, c, h, w)), z_q.contiguous())
    assert same_bits(quantizer.get_codebook_entry(indices, (b, h, w, c), channel_first=False).movedim(-1, 1), z_q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", case_names(MULTISCALE))
def test_residual_loop(name, backend):
    case = Case(MULTISCALE, name)
    scales = case.options["scales_used"]
    quantizer, h = build(case, MultiScaleVectorQuantizer, backend=backend, quirks=True, scales=scales), case["h"]
    f_hat, losses, (_, encodings, indices) = quantizer(h.requires_grad_())
    assert encodings is None and case.check_indices(indices) == 0
    case.check("f_hat", f_hat, case["f_hat"])
    assert losses[3] == pytest.approx(case.scalars["usage_window_mean"])
    passed, none = grads((f_hat * case["upstream"]).sum(), quantizer, h)
    case.check("gradient", passed, case["grad_h_out"])
    assert not none.any()
    check_losses(case, losses, quantizer, h, "h")
    assert same_bits(quantizer.decode_code(indices), f_hat)
    first = scales[0] ** 2 + scales[1] ** 2
    if "f_hat_prefix" in case:
        case.check("f_hat", quantizer.decode_code(indices[:, :first]), case["f_hat_prefix"][1])


@pytest.mark.parametrize("name, position", CHAINS)
def test_inputs_of_the_language_model(name, position):
    case = Case(MULTISCALE, name)
    quantizer = build(case, MultiScaleVectorQuantizer, backend="native", scales=case.options["scales_used"])
    rows = quantizer.inputs(case["idx"], refine=None if position is None else position + 2)
    case.check("chain", rows, case["chain" if position is None else f"chain_refine_{position}"])


def test_the_loop_is_the_original_models_loop():
    """One quantizer called for every scale, as TokenFlow.encode does, gives what the loop in one call gives."""
    case = Case(MULTISCALE, "overlapping_windows")
    single = build(case, backend="native")
    whole = build(case, MultiScaleVectorQuantizer, backend="native", scales=case.options["scales_used"])
    r, f_hat, ids, losses = case["h"], 0.0, [], []
    for s in case.options["scales_used"]:
        z = torch.nn.functional.interpolate(r, (s, s), mode="area")
        q, part, (_, _, i) = single(z)
        up = torch.nn.functional.interpolate(q, (7, 7), mode="bicubic")
        f_hat, r = f_hat + up, r - up.detach()
        ids.append(i.view(len(q), -1))
        losses.append(torch.stack([part[0], part[1], part[4], part[5]]))
    expected = whole(case["h"])
    assert torch.equal(torch.cat(ids, 1), expected[2][2])
    assert_near(f_hat, expected[0], 1e-5)
    mine = torch.stack([expected[1][0], expected[1][1], expected[1][4], expected[1][5]])
    assert_near(torch.stack(losses).mean(0) / mine, torch.ones(4), 1e-5)
    assert float(expected[1][3]) == pytest.approx(len(torch.cat(ids, 1).unique()) / 200)
    assert torch.equal(single.codebook_used.sort()[0], whole.codebook_used.sort()[0])


def test_a_scale_is_dropped_in_training():
    torch.manual_seed(1)
    quantizer = MultiScaleVectorQuantizer(**SMALL, scales=(1, 2, 4), scale_drop=1.0, backend="native")
    z, lengths = normal(2, 5, 4, 4), set()
    for _ in range(20):
        lengths.add(quantizer(z)[2][2].shape[1])
    assert lengths == {17, 5}
    assert quantizer.eval()(z)[2][2].shape[1] == 21


def test_without_normalisation():
    """l2_norm=False, which the original cannot: raw rows by squared distance."""
    quantizer = VectorQuantizer(**{**SMALL, "l2_norm": False}, backend="native").double()
    z = normal(2, 5, 3, 3, dtype=torch.float64).requires_grad_()
    z_q, (vq, commit, _, _, sem, pix), (_, _, ids) = quantizer(z)
    x, table = z.detach().movedim(1, -1).reshape(-1, 5), torch.cat(quantizer.codebooks(), 1).detach()
    assert torch.equal(ids, torch.cdist(x, table).argmin(-1))
    for value, part in ((sem, slice(0, 3)), (pix, slice(3, 5))):
        dense = torch.cdist(x[:, part], table[:, part]).pow(4).sum(-1).mean()
        assert_near(value, dense, 1e-10)
    expected = (table[ids] - x).square().mean()
    assert_near(vq, expected, 1e-12)
    assert_near(commit, 0.25 * expected, 1e-12)


def test_distance_sums_of_zero_rows():
    """A zero row has no unit length; the Gram form must not assume one."""
    quantizer = VectorQuantizer(**SMALL, backend="native").double()
    z = normal(1, 5, 2, 2, dtype=torch.float64)
    z[0, :, 0, 0] = 0
    *_, sem, pix = quantizer(z)[1]
    x, tables = z.movedim(1, -1).reshape(-1, 5).split([3, 2], 1), quantizer.codebooks()
    for value, part, table in zip((sem, pix), x, tables):
        unit = torch.nn.functional.normalize
        assert_near(value, torch.cdist(unit(part, dim=-1), unit(table.detach(), dim=-1)).pow(4).sum(-1).mean(), 1e-10)


def test_eval_has_no_losses_and_moves_nothing():
    for quirks in (False, True):
        quantizer = VectorQuantizer(**SMALL, quirks=quirks, backend="native")
        z = normal(2, 5, 3, 3)
        trained = quantizer(z)
        before = quantizer.codebook_used.clone()
        z_q, losses, _ = quantizer.eval()(normal(2, 5, 3, 3, seed=2))
        assert losses[:3] == (None, None, None) and losses[4:] == (None, None)
        assert torch.equal(before, quantizer.codebook_used)
        assert float(losses[3]) == (0.0 if quirks else float(trained[1][3]))
        assert same_bits(quantizer(z)[0], trained[0])


def test_the_window(monkeypatch):
    """By default it starts empty and takes any number of rows; with quirks code 0 counts at once and too many rows raise."""
    monkeypatch.setattr(compat, "WINDOW", 24)
    clean, quirky = (VectorQuantizer(**SMALL, quirks=q, backend="native") for q in (False, True))
    quirky.load_state_dict(clean.state_dict(), strict=True)
    seen = []
    for step in range(4):
        z = normal(1, 5, 3, 3, seed=step)
        (_, a, (_, _, ids)), (_, b, _) = clean(z), quirky(z)
        seen += ids.tolist()
        window = set(seen[-24:])
        assert float(a[3]) == pytest.approx(len(window) / 16)
        assert b[3] == pytest.approx(len(window | ({0} if len(seen) < 24 else set())) / 16)
    big = normal(1, 5, 5, 5, seed=9)
    ids = clean(big)[2][2]
    assert clean.codebook_used.tolist() == ids[-24:].tolist()
    assert_sentence(ValueError, "VectorQuantizer", "z", quirky, big)


def test_hidden_usage():
    quantizer = VectorQuantizer(**{**SMALL, "show_usage": False}, backend="native")
    assert float(quantizer(normal(1, 5, 2, 2))[1][3]) == 0 and bool((quantizer.codebook_used == -1).all())


def test_checkpointing_counts_once():
    quantizer = VectorQuantizer(**SMALL, backend="native")
    z = normal(1, 5, 2, 2).requires_grad_()
    checkpoint(lambda z: quantizer(z)[0], z, use_reentrant=False).sum().backward()
    assert int((quantizer.codebook_used >= 0).sum()) == 4


@pytest.mark.parametrize("shape", ((0, 5, 2, 2), (1, 5, 1, 1)))
@pytest.mark.parametrize("scales", (None, (1,)))
def test_small_batches(shape, scales):
    kind = VectorQuantizer if scales is None else MultiScaleVectorQuantizer
    options = {**SMALL, "entropy_loss_ratio": 0.1, **({} if scales is None else {"scales": scales})}
    quantizer = kind(**options, backend="native")
    z = normal(*shape).requires_grad_()
    z_q, losses, (perplexity, _, ids) = quantizer(z)
    (z_q.sum() + losses[0] + losses[1] + losses[2]).backward()
    assert z_q.shape == z.shape and ids.numel() == shape[0] * shape[2] * shape[3]
    assert all(torch.as_tensor(value).isfinite() for value in losses) and perplexity == 1.0
    assert z.grad.shape == z.shape and quantizer.embedding_vqkd.weight.grad.isfinite().all()


def test_rows_that_are_not_numbers():
    quantizer = VectorQuantizer(**SMALL, backend="native")
    z = normal(1, 5, 2, 2)
    z[0, 4, 1, 1] = float("nan")
    z.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z_q, losses, _ = quantizer(z)
    (losses[0] + losses[1]).backward()
    assert all(torch.as_tensor(value).isfinite() for value in losses)
    assert z.grad.isfinite().all() and quantizer.embedding_vqgan.weight.grad.isfinite().all()
    assert int((quantizer.codebook_used >= 0).sum()) == 3
    assert z_q[0, :, 1, 1].isnan().all() and int(z_q.isnan().sum()) == 5


def test_half_models_and_autocast_keep_their_tokens():
    quantizer = VectorQuantizer(**{**SMALL, "entropy_loss_ratio": 0.1}, backend="native")
    z = normal(2, 5, 4, 4).bfloat16()
    expected = quantizer(z.float())
    quantizer.bfloat16()
    assert {t.dtype for t in (*quantizer.parameters(), *quantizer.buffers())} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, losses, (_, _, ids) = quantizer(z)
    assert torch.equal(ids, expected[2][2]) and z_q.dtype == torch.bfloat16
    for actual, wanted in zip(losses, expected[1]):
        assert_near(actual, wanted, 1e-6)


def test_copies():
    quantizer, z = MultiScaleVectorQuantizer(**SMALL, scales=(1, 2), backend="native"), normal(2, 5, 2, 2)
    quantizer(z)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert torch.equal(other.codebook_used, quantizer.codebook_used)
        assert same_bits(other.eval()(z)[0], quantizer.eval()(z)[0])


def test_first_codebooks_are_unit():
    quantizer = VectorQuantizer(**SMALL)
    for table in quantizer.codebooks():
        assert_near(table.norm(dim=-1), torch.ones(16), 1e-6)


def test_bad_input():
    for error, argument, value in (
        (ValueError, "n_e", 0), (TypeError, "n_e", 8.0), (ValueError, "e_dim", 4), (ValueError, "beta", -1),
        (ValueError, "entropy_loss_ratio", float("inf")), (TypeError, "l2_norm", 1), (TypeError, "show_usage", None),
        (ValueError, "split", (3,)), (ValueError, "split", (3, 0)), (ValueError, "split", 5), (ValueError, "kmeans", True),
        (TypeError, "kmeans", "no"),
        (TypeError, "quirks", 0), (ValueError, "backend", "fast"),
    ):  # fmt: skip
        assert_sentence(error, "VectorQuantizer", argument, lambda: VectorQuantizer(**{**SMALL, argument: value}))
    name = "MultiScaleVectorQuantizer"
    assert_sentence(ValueError, name, "scales", lambda: MultiScaleVectorQuantizer(**SMALL, scales=()))
    assert_sentence(
        ValueError, name, "scale_drop", lambda: MultiScaleVectorQuantizer(**SMALL, scales=(1,), scale_drop=2)
    )
    quantizer = VectorQuantizer(**SMALL)
    assert_sentence(ValueError, "VectorQuantizer", "z", quantizer, torch.zeros(1, 4, 2, 2))
    assert_sentence(ValueError, "VectorQuantizer", "features", quantizer, torch.zeros(5, 2, 2))
    assert_sentence(TypeError, "VectorQuantizer", "features", quantizer, torch.zeros(1, 5, 2, 2, dtype=torch.int64))
