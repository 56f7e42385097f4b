"""compat.unitok: the published numbers through the original's constructor and returns, its usage buffer, edges, bad input."""

import copy
import pickle
import warnings

import pytest
import torch
from golden_values import Case, case_names, manifest, normals
from harness import assert_near, assert_sentence, near_ties, normal, same_bits
from test_golden import BACKENDS

from tokenflow_ext import ops
from tokenflow_ext.compat.unitok import VectorQuantizerM

UNITOK = "unitok_quantizer"
CASES = case_names(UNITOK)


def tables_of(case: Case) -> torch.Tensor:
    """[G, V, c], stored or generated one by one."""
    made = (manifest(UNITOK)["cases"][case.name].get("generated") or {}).get("tables")
    if made is None:
        return case["tables"]
    return torch.stack([torch.from_numpy(normals(m["name"], m["shape"], m["salt"]) * m["scale"]) for m in made]).float()


def build(case: Case, **options) -> VectorQuantizerM:
    """The quantizer of a golden case, its weights loaded strictly under the original's names."""
    o, tables = case.options, tables_of(case)
    groups, codes, width = tables.shape
    quantizer = VectorQuantizerM(
        groups * codes, groups * width, o["beta"], o["entropy"], o["entropy_temperature"], groups, **options
    )
    state = {f"codebooks.{g}.codebook.weight": table for g, table in enumerate(tables)}
    state |= {f"codebooks.{g}.vocab_usage": torch.zeros(codes) for g in range(groups)}
    quantizer.load_state_dict(state, strict=True)
    return quantizer


def usage_of(quantizer) -> torch.Tensor:
    return torch.stack([part.vocab_usage for part in quantizer.codebooks])


def grads(loss, quantizer, z):
    """Gradients to z and to the tables [G, V, c]; zeros where none arrives."""
    leaves = [z, *quantizer.parameters()]
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
    return found[0], torch.stack(found[1:])


@pytest.mark.parametrize("quirks", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, backend, quirks):
    case = Case(UNITOK, name)
    quantizer, z = build(case, backend=backend, quirks=quirks), case["z"].requires_grad_()
    out, vq_loss, entropy_loss, usage = quantizer(z)
    case.check("value", out, case["out"])
    case.check("value", vq_loss, torch.tensor(case.scalars["vq_loss"]))
    case.check("value", usage_of(quantizer), case["vocab_usage"])
    assert float(usage) == pytest.approx(case.scalars["usage_percent"], rel=1e-6)
    z_out, tables_out = grads((out * case["upstream"]).sum(), quantizer, z)
    case.check("gradient", z_out, case["grad_z_out"])
    assert not tables_out.any()
    z_loss, tables_loss = grads(vq_loss, quantizer, z)
    case.check("gradient", z_loss, case["grad_z_loss"])
    expected = tables_of(case)
    if "grad_tables_loss" in case:
        expected = case["grad_tables_loss"]
    else:
        rows = torch.zeros_like(expected).flatten(0, 1)
        expected = rows.index_copy(0, case["grad_rows_loss"], case["grad_vals_loss"]).view_as(expected)
    case.check("gradient", tables_loss, expected)
    if case.options["entropy"]:
        assert abs(entropy_loss.item() - case.scalars["entropy_loss"]) < 2e-5
        z_entropy, tables_entropy = grads(entropy_loss, quantizer, z)
        for actual, wanted in ((z_entropy, case["grad_z_entropy"]), (tables_entropy, case["grad_tables_entropy"])):
            assert float((actual - wanted).abs().max()) <= 2e-6 + 2e-4 * float(wanted.abs().max())
    else:
        assert entropy_loss.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_codes_and_back(name, backend):
    case = Case(UNITOK, name)
    quantizer = build(case, backend=backend)
    ids = quantizer.f_to_idx(case["z"])
    assert case.check_indices(ids) == 0
    case.check("value", quantizer.idx_to_f(ids), case["code"])
    assert same_bits(quantizer.idx_to_f(ids), quantizer(case["z"])[0])


@pytest.mark.parametrize("quirks", (False, True))
def test_usage_over_steps(quirks):
    case = Case(UNITOK, "usage_steps")
    quantizer = build(case, backend="native", quirks=quirks)
    quantizer(case["z"])
    for step in range(3):
        quantizer(torch.from_numpy(normals(f"usage_steps/step{step}", [1, 20, 16], 507)))
    case.check("value", usage_of(quantizer), case["vocab_usage_after"])


def share(quantizer, z):
    ids = quantizer.f_to_idx(z)
    return torch.stack([torch.bincount(ids[:, g].flatten(), minlength=12) / ids[:, g].numel() for g in range(2)])


def test_the_average_slows_down_after_a_hundred_steps_and_is_resumed():
    quantizer, expected = VectorQuantizerM(24, 8, num_codebooks=2, backend="native"), None
    for step in range(102):
        z = normal(2, 9, 8, seed=step)
        usage = quantizer(z)[3]
        decay = 0.9 if step < 100 else 0.99
        expected = share(quantizer, z) if expected is None else decay * expected + (1 - decay) * share(quantizer, z)
        if step in (0, 1, 99, 100, 101):
            assert_near(usage_of(quantizer), expected, 1e-5)
    assert float(usage) == pytest.approx(100 * float((expected > 0.01 / 12).float().mean()))
    for quirks, decay in ((False, 0.99), (True, 0.0)):  # the original's count starts anew: its first step copies
        resumed = VectorQuantizerM(24, 8, num_codebooks=2, quirks=quirks, backend="native")
        resumed.load_state_dict(quantizer.state_dict(), strict=True)
        resumed(z)
        assert_near(usage_of(resumed), decay * expected + (1 - decay) * share(quantizer, z), 1e-5)


def test_eval_moves_the_buffer_with_quirks_only():
    z = normal(2, 9, 8)
    for quirks in (False, True):
        quantizer = VectorQuantizerM(24, 8, num_codebooks=2, quirks=quirks, backend="native").eval()
        usage = quantizer(z)[3]
        assert bool(usage_of(quantizer).any()) is quirks
        assert (float(usage) > 0) is quirks
        quantizer.f_to_idx(z)
        assert int(quantizer.steps) == int(quirks), "f_to_idx is pure"


@pytest.mark.parametrize("shape", ((0, 5, 6), (1, 1, 6), (2, 0, 6)))
def test_small_batches(shape):
    quantizer = VectorQuantizerM(40, 6, num_codebooks=2, use_entropy_loss=True, backend="native")
    quantizer(normal(2, 5, 6))
    before = usage_of(quantizer).clone()
    z = normal(*shape, seed=2).requires_grad_()
    out, vq_loss, entropy_loss, _ = quantizer(z)
    (out.sum() + vq_loss + entropy_loss).backward()
    assert out.shape == z.shape and torch.isfinite(vq_loss + entropy_loss) and z.grad.shape == z.shape
    ids = quantizer.f_to_idx(z)
    assert ids.shape == (shape[0], 2, shape[1]) and quantizer.idx_to_f(ids).shape == z.shape
    assert torch.equal(before, usage_of(quantizer)) is (z.numel() == 0)


def test_rows_that_are_not_numbers_do_not_count():
    quantizer = VectorQuantizerM(24, 8, num_codebooks=2, backend="native")
    z = normal(1, 4, 8)
    z[0, 0, 0] = float("inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = quantizer(z)
    assert out[1].isfinite()
    counted = usage_of(quantizer)
    assert_near(counted.sum(-1), torch.ones(2), 1e-6)
    assert float((counted[0] * 3).sub((counted[0] * 3).round()).abs().max()) < 1e-5, "three rows in the first codebook"


def test_other_types():
    quantizer = VectorQuantizerM(64, 16, num_codebooks=4, backend="native")
    z = normal(2, 5, 16).half()
    ids = quantizer.f_to_idx(z)
    table, rows = quantizer._tables().detach(), z.float().unflatten(-1, (4, 4))
    exact = ops.nearest_code(rows.double(), table.double(), metric="cosine", backend="reference").movedim(-1, 1)
    for g in range(4):
        near_ties(ids[:, g].flatten(), exact[:, g].flatten(), [rows[:, :, g].flatten(0, 1)], [table[g]], "cosine")
    quantizer.half()
    assert {p.dtype for p in quantizer.parameters()} == {torch.float32}
    assert torch.equal(quantizer.f_to_idx(z), ids)
    assert quantizer(z)[0].dtype == torch.float16
    double = VectorQuantizerM(64, 16, num_codebooks=4, backend="native").double()
    assert double(z.double())[1].dtype == torch.float64


def test_copies():
    quantizer, z = VectorQuantizerM(24, 8, num_codebooks=2, backend="native"), normal(2, 9, 8)
    quantizer(z)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert int(other.steps) == 1 and same_bits(other.eval()(z)[0], quantizer.eval()(z)[0])


def test_first_codebooks():
    quantizer = VectorQuantizerM(4096, 16, num_codebooks=2)
    bound = 8**-0.5 / 36
    largest = max(float(part.codebook.weight.detach().abs().max()) for part in quantizer.codebooks)
    assert 0.99 * bound < largest <= bound
    quantizer.init_vocab(0.2)
    assert 0.17 < float(quantizer._tables().detach().std()) < 0.21


def test_bad_input():
    good = {"vocab_size": 24, "vocab_width": 8, "num_codebooks": 2}
    for error, argument, value in (
        (ValueError, "vocab_size", 25), (ValueError, "vocab_size", 0), (TypeError, "vocab_size", "a"),
        (ValueError, "vocab_width", 7), (ValueError, "num_codebooks", 0), (ValueError, "beta", -1),
        (TypeError, "use_entropy_loss", 1), (ValueError, "entropy_temp", 0), (ValueError, "entropy_temp", float("inf")),
        (TypeError, "quirks", None), (ValueError, "backend", "fast"),
    ):  # fmt: skip
        assert_sentence(error, "VectorQuantizerM", argument, lambda: VectorQuantizerM(**{**good, argument: value}))
    quantizer = VectorQuantizerM(**good)
    for error, argument, call in (
        (ValueError, "features", lambda: quantizer(torch.zeros(2, 3, 7))),
        (ValueError, "features", lambda: quantizer.f_to_idx(torch.zeros(8))),
        (TypeError, "features", lambda: quantizer(torch.zeros(2, 3, 8, dtype=torch.int64))),
        (ValueError, "indices", lambda: quantizer.idx_to_f(torch.zeros(2, 3, 4, dtype=torch.int64))),
        (TypeError, "indices", lambda: quantizer.idx_to_f(torch.zeros(2, 2, 4))),
    ):
        assert_sentence(error, "VectorQuantizerM", argument, call)
    with pytest.raises(ValueError, match=r"wanted ids in \[0, 12\)"):
        quantizer.idx_to_f(torch.full((1, 2, 3), 12))
