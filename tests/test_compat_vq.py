"""compat.vq against vector-quantize-pytorch at equal codebooks: ids, values, losses, gradients, moving averages, state dicts."""

import copy
import pickle

import pytest
import torch
from harness import assert_near, assert_sentence, near_ties, normal, same_bits

from tokenflow_ext.compat.vq import VectorQuantize

CASES = {
    "l2": {},
    "cosine": {"use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.3},
    "projected": {"codebook_dim": 4, "decay": 0.7},
    "heads": {"heads": 2, "codebook_dim": 5},
    "separate heads": {"heads": 3, "separate_codebook_per_head": True, "codebook_dim": 4, "commitment_weight": 0.5},
    "separate heads, cosine": {"heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "heads without projection": {"heads": 2, "codebook_dim": 6},
    "channel first": {"channel_last": False},
    "image": {"accept_image_fmap": True, "heads": 2},
    "frozen": {"freeze_codebook": True},
    "rotation": {"rotation_trick": True},
    "rotation, cosine": {"rotation_trick": True, "use_cosine_sim": True},
}
WIDTH, CODES = 12, 20


def inputs(case: str, seed: int) -> torch.Tensor:
    if case == "image":
        return normal(2, WIDTH, 3, 5, seed=seed)
    return normal(2, WIDTH, 15, seed=seed) if case == "channel first" else normal(2, 15, WIDTH, seed=seed)


def pair(case: str):
    """The peer and ours at equal weights, the codebook random and its state loaded strictly from the peer's."""
    peer = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(4)
    theirs = peer.VectorQuantize(WIDTH, CODES, **{"rotation_trick": False, **CASES[case]})
    state = theirs.state_dict()
    codes = torch.randn(state["_codebook.embed"].shape)
    if CASES[case].get("use_cosine_sim"):
        codes = torch.nn.functional.normalize(codes, dim=-1)
    counts = torch.rand(state["_codebook.cluster_size"].shape) + 0.5
    state |= {
        "_codebook.embed": codes,
        "_codebook.cluster_size": counts,
        "_codebook.embed_avg": codes * counts[..., None],
    }
    theirs.load_state_dict(state, strict=True)
    ours = VectorQuantize(WIDTH, CODES, backend="native", **CASES[case])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def gap(quantizer: VectorQuantize, x: torch.Tensor) -> float:
    """The smallest float64 gap between the two nearest codes of a row: above rounding, ids cannot differ."""
    with torch.no_grad():
        rows, codes = quantizer._heads(quantizer.project_in(quantizer._channels_last(x))).double(), quantizer.codebook
        rows = (
            rows.reshape(-1, codes.shape[0], codes.shape[-1])
            if codes.dim() == 3
            else rows.reshape(-1, 1, codes.shape[1])
        )
        codes = codes.double().reshape(rows.shape[1], CODES, -1)
        if quantizer.quantizer.metric == "cosine":
            rows, codes = (torch.nn.functional.normalize(v, dim=-1) for v in (rows, codes))
        best = torch.cdist(rows.transpose(0, 1), codes).square().topk(2, largest=False).values
        return float((best[..., 1] - best[..., 0]).min())


@pytest.mark.parametrize("case", CASES)
def test_equals_the_peer(case):
    """Three training steps and one in eval, from one state each: where the peer has moved by its eps, ours follows it."""
    theirs, ours = pair(case)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for step in range(4):
        training = step < 3
        x, upstream = inputs(case, step), inputs(case, 10 + step)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert gap(ours, x) > 2e-5
        out = []
        for module in (theirs.train(training), ours.train(training)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)
            ((quantized * upstream).sum() + loss).backward()
            grads = {"x": leaf.grad, **{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}
            out.append((quantized, indices, loss, grads))
        (q0, i0, l0, g0), (q1, i1, l1, g1) = out
        assert torch.equal(i0, i1)
        assert_near(q1, q0, 2e-6)
        assert l0.shape == l1.shape
        assert_near(l1, l0, 2e-6)
        renamed = {n.replace("quantizer.codebook.table_0", "_codebook.embed"): g for n, g in g1.items()}
        for name, grad in g0.items() if training else ():  # in eval theirs, with EMA, pass no gradient on; ours do
            assert_near(renamed[name].reshape(grad.shape), grad, 5e-6, name)
        mine = ours.state_dict()
        for name, value in theirs.state_dict().items():
            assert mine[name].shape == value.shape and mine[name].dtype == value.dtype, name
            if case == "learnable" and name in ("_codebook.cluster_size", "_codebook.embed_avg"):
                continue  # without a meaning there
            # Codes without rows: theirs move by the smoothing of the counts, eps in 1, ours stay.
            assert_near(mine[name].float(), value.float(), 3e-5 if name == "_codebook.embed" else 3e-6, name)


@pytest.mark.parametrize("case", ("l2", "separate heads", "image", "channel first", "learnable"))
def test_from_indices(case):
    theirs, ours = pair(case)
    x = inputs(case, 3)
    quantized, indices, _ = ours.eval()(x)
    assert same_bits(ours.get_output_from_indices(indices), quantized)
    if case != "image":  # theirs cannot, with heads
        assert_near(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices), 1e-6)
    assert_near(ours.codebook, theirs.codebook, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_state_dicts_go_back(case):
    """The peer loads what ours saves, strictly."""
    theirs, ours = pair(case)
    ours(inputs(case, 1))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = inputs(case, 2)
    a, b = theirs.eval()(x), ours.eval()(x)
    assert torch.equal(a[1], b[1])
    assert_near(b[0], a[0], 2e-6)
    again = VectorQuantize(WIDTH, CODES, backend="native", **CASES[case]).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    assert same_bits(again(x)[0], b[0])


def test_without_the_peer():
    """The defaults by hand: nearest code, EMA with decay 0.8, loss of weight 1."""
    quantizer, x = VectorQuantize(6, 9, backend="native"), normal(2, 7, 6)
    before = quantizer.codebook.clone()
    quantized, indices, loss = quantizer(x)
    exact = torch.cdist(x.double(), before.double()[None]).argmin(-1)
    near_ties(indices.flatten(), exact.flatten(), [x.flatten(0, 1)], [before], "l2")
    assert same_bits(quantized, before[indices])
    assert_near(loss, (before[indices] - x).square().mean(), 1e-6)
    counts = torch.bincount(indices.flatten(), minlength=9).float()
    sums = torch.zeros(9, 6).index_add_(0, indices.flatten(), x.flatten(0, 1))
    state = quantizer.state_dict()
    assert_near(state["_codebook.cluster_size"][0], 0.8 + 0.2 * counts, 1e-6)
    assert_near(state["_codebook.embed_avg"][0], 0.8 * before + 0.2 * sums, 1e-6)
    quantizer.eval()
    frozen = quantizer.codebook.clone()
    assert quantizer(x)[2] == 0 and torch.equal(frozen, quantizer.codebook)


def test_kmeans_and_dead_codes():
    """The first batch places the codes; those that no row chooses any more take one."""
    quantizer = VectorQuantize(4, 8, kmeans_init=True, threshold_ema_dead_code=0.5, backend="native")
    assert not quantizer.state_dict()["_codebook.initted"]
    spread = 100 + normal(1, 400, 4)
    quantizer(spread)
    assert quantizer.state_dict()["_codebook.initted"] and float((quantizer.codebook - 100).abs().max()) < 4
    far = torch.cat([spread[:, :200], -spread[:, 200:]], dim=1)
    for _ in range(20):
        quantizer(far)
    quantized, indices, _ = quantizer.eval()(far)
    assert len(indices.unique()) == 8
    assert float((quantized - far).square().mean()) < 2


@pytest.mark.parametrize("shape", ((0, 5, 6), (1, 1, 6), (2, 0, 6), (7, 6)))
def test_small_batches(shape):
    quantizer = VectorQuantize(6, 9, backend="native")
    x = normal(*shape).requires_grad_()
    quantized, indices, loss = quantizer(x)
    (quantized.sum() + loss).backward()
    assert quantized.shape == x.shape and indices.shape == x.shape[:-1] and loss.isfinite() and x.grad.shape == x.shape
    assert quantizer.codebook.isfinite().all()


def test_copies():
    quantizer, x = VectorQuantize(6, 9, heads=2, separate_codebook_per_head=True, backend="native"), normal(2, 7, 6)
    quantizer(x)
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert same_bits(other.eval()(x)[0], quantizer.eval()(x)[0])
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), quantizer.state_dict().values()))


def test_inside_a_model():
    """Names are translated below a prefix too, and what misses is named."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), VectorQuantize(6, 9, backend="native"))
    state = model.state_dict()
    assert {n for n in state if n.startswith("1.")} == {
        f"1._codebook.{n}" for n in ("initted", "cluster_size", "embed_avg", "embed")
    }
    model.load_state_dict(state, strict=True)
    del state["1._codebook.embed"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("case", ["projected", "heads", "image"])
def test_projections_choose_codes_in_float32(case):
    """Autocast and half() change no token: the projections before the search are float32 like the codes."""
    module, x = pair(case)[1].eval(), inputs(case, 1)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert torch.equal(out[1], expected[1]) and same_bits(out[0], expected[0])
    rounded, half = module(x.bfloat16().float()), module.bfloat16()(x.bfloat16())
    assert torch.equal(half[1], rounded[1]) and torch.equal(half[0], rounded[0].bfloat16())
    assert same_bits(module.get_output_from_indices(expected[1]), expected[0])


def test_bad_input():
    good = {"dim": 6, "codebook_size": 9}
    for error, argument, value in (
        (ValueError, "dim", 0), (ValueError, "codebook_size", 0), (ValueError, "heads", 0), (ValueError, "codebook_dim", 0),
        (TypeError, "kmeans_init", 1), (ValueError, "eps", 1e-3), (ValueError, "kmeans_iters", 3),
        (TypeError, "rotation_trick", "yes"), (ValueError, "commitment_weight", -1), (ValueError, "ema_update", False),
        (TypeError, "learnable_codebook", "no"), (TypeError, "ema_update", 1), (ValueError, "threshold_ema_dead_code", -1),
        (ValueError, "backend", "fast"), (TypeError, "colour", 3), (ValueError, "orthogonal_reg_weight", 1.0),
        (ValueError, "affine_param", True), (ValueError, "stochastic_sample_codes", True), (ValueError, "vq_bridge", 1),
    ):  # fmt: skip
        assert_sentence(error, "VectorQuantize", argument, lambda: VectorQuantize(**{**good, argument: value}))
    both = {"use_cosine_sim": True, "learnable_codebook": True}
    assert_sentence(ValueError, "VectorQuantize", "learnable_codebook", lambda: VectorQuantize(**good, **both))
    assert_sentence(ValueError, "VectorQuantizer", "decay", lambda: VectorQuantize(**good, decay=2))
    quantizer = VectorQuantize(**good)
    assert_sentence(ValueError, "VectorQuantize", "x", quantizer, torch.zeros(2, 3, 5))
    assert_sentence(TypeError, "VectorQuantize", "x", quantizer, torch.zeros(2, 3, 6, dtype=torch.int64))
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert_sentence(ValueError, "VectorQuantize", "mask", lambda: quantizer(torch.zeros(2, 3, 6), mask=mask))
    images = VectorQuantize(**good, accept_image_fmap=True)
    assert_sentence(ValueError, "VectorQuantize", "x", images, torch.zeros(2, 3, 6))
    VectorQuantize(**good, sync_codebook=None, orthogonal_reg_weight=0, route_gradients_to_input=True)
