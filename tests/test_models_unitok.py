"""UniTok: the published base model in stages, grids of any shape, gradients, half precision, and bad input."""

import copy
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from golden_values import FOLDER, Case, image, published_shapes, value
from small_models import UNITOK, images
from small_models import small_unitok as small
from tokenflow.models.checkpoint import read
from tokenflow.models.unitok import UniTok

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base():
    """The published base model with its generated weights, made without a copy."""
    shapes = published_shapes("unitok_base")
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda key: torch.from_numpy(value(key, shapes[key], 1)).reshape(shapes[key]), shapes)
        state = dict(zip(shapes, made))
    config = UniTok.recognise(state)
    with torch.device("meta"):
        model = UniTok(config)
    model.load_state_dict(UniTok.convert(state, config).state, assign=True)
    model.quantizer.codebook.hits = torch.zeros(config.groups, config.codebook_size, dtype=torch.int64)
    return model.eval()


@pytest.fixture(scope="module")
def case():
    return Case("unitok_model", "unitok_base")


@torch.inference_mode()
def test_published_features(base, case):
    made = case.options["image"]
    x = torch.from_numpy(image(made["name"], made["shape"], made["salt"]))
    assert float(x.double().sum()) == pytest.approx(case.scalars["image_sum"], abs=1e-6)
    tokens = base.encoder(x)
    case.check("quant_in", tokens[:, ::16], case["encoder_tokens_every16"])
    case.check("quant_in", tokens.norm(dim=-1), case["encoder_token_norm"])
    features = base.quant_proj(tokens)
    case.check("quant_in", features, case["quant_in"])


@torch.inference_mode()
def test_published_codes_and_vectors(base, case):
    features = case["quant_in"].transpose(1, 2).unflatten(2, (16, 16))
    assert case.check_indices(base._by_group(base.quantizer.encode(features))) == 0
    tokens = base.expand(base.codes(case["idx"]))
    case.check("reconstruction", tokens[:, ::16], case["post_every16"])
    vectors = base._image_vectors(tokens)
    limit = 1e-3 * float(case["image_feature"].norm())
    assert float((vectors - case["image_feature"]).norm()) < limit
    assert float((F.normalize(vectors, dim=-1) - case["image_feature_unit"]).norm()) < 1e-3
    text = base.encode_text(case["text_tokens"], normalize=True)
    assert float((text - case["text_feature_unit"]).abs().max()) < 1e-5


@torch.inference_mode()
def test_published_reconstruction(base, case):
    y = base.decode_features(base.codes(case["idx"]))
    case.check("reconstruction", F.avg_pool2d(y, 8), case["unclamped_down8"])
    case.check("reconstruction", y[:, :, 112:144, 112:144], case["unclamped_crop"])
    y = y.clamp(-1, 1)
    case.check("reconstruction", F.avg_pool2d(y, 8), case["rec_down8"])
    case.check("reconstruction", y[:, :, 112:144, 112:144], case["rec_crop"])
    case.check("reconstruction", y.mean((2, 3)), case["rec_mean"])
    case.check("reconstruction", y.std((2, 3), unbiased=False), case["rec_std"])


@pytest.mark.parametrize("changes", [{}, {"projection": "linear"}, {"groups": 1}])
def test_shapes_and_grids(changes):
    model = small(**changes)
    for batch, height, width in ((2, 64, 64), (1, 16, 16), (2, 32, 80), (1, 48, 16), (0, 32, 32)):
        x, grid = images(batch, 3, height, width), (height // 16, width // 16)
        ids = model.encode(x)
        assert ids.shape == (batch, model.config.groups, math.prod(grid)) and ids.dtype == torch.int64
        assert ids.is_contiguous() and (batch == 0 or 0 <= ids.min() <= ids.max() < 32)
        decoded = model.decode(ids, grid)
        assert decoded.shape == x.shape and (batch == 0 or decoded.abs().max() <= 1)
        assert torch.equal(decoded, model.reconstruct(x))
        assert model.features(x).shape == (batch, 8, *grid) and model.encode_image(x).shape == (batch, 12)
    unit = model.encode_image(images(3, 3, 32, 32), normalize=True)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(3))


def test_a_model_of_oblong_images_decodes_to_their_grid():
    """2 x 8 tokens are as many as 4 x 4."""
    model, x = small(image_size=(32, 128)), images(1, 3, 32, 128)
    assert torch.equal(model.decode(model.encode(x)), model.reconstruct(x)) and model.reconstruct(x).shape == x.shape
    assert model.decode(torch.zeros(1, 4, 9, dtype=torch.int64)).shape == (1, 3, 48, 48)


def test_tokens_land_on_their_grid():
    model, x = small(projection="linear"), images(1, 3, 32, 128)
    features, tokens = model.encode_features(x), model.encoder(x)
    for row, column in ((0, 7), (1, 2)):
        token = 8 * row + column
        assert torch.allclose(features[0, :, row, column], model.quant_proj(tokens[0, token]), atol=1e-6)
        assert torch.equal(model.encode(x)[0, :, token], model.quantizer.encode(features)[0, row, column])
        expanded = model.post_quant_proj(features[0, :, row, column])
        assert torch.allclose(model.expand(features)[0, token], expanded, atol=1e-6)
    model = small()
    ids = model.encode(images(1, 3, 32, 128))
    wide, tall = model.decode(ids, (2, 8)), model.decode(ids, (8, 2))
    assert wide.shape == (1, 3, 32, 128) and tall.shape == (1, 3, 128, 32)
    assert not torch.allclose(wide, tall.transpose(2, 3), atol=1e-3)
    torch.manual_seed(0)
    tokens, shifted = torch.randn(1, 16, 16), torch.zeros(1, 16, 16)
    shifted[0, 7] = 1
    blocks, model.decoder.blocks = model.decoder.blocks, torch.nn.Identity()
    with torch.no_grad():
        change = (model.decoder(tokens + shifted, (2, 8)) - model.decoder(tokens, (2, 8))).abs().amax((0, 1))
    model.decoder.blocks = blocks
    share = change / change.sum()
    row, column = (float((share.sum(1 - d) * torch.arange(share.shape[d])).sum()) for d in (0, 1))
    assert row < 16 and column > 96, "token 7 of a 2 x 8 grid is the last of the first row"


def test_summary_and_processor():
    model = small(image_size=(64, 96))
    assert model.image_size == (64, 96) and model.summary()["tokens"].startswith("24 an image, each of 4 ids below 32")
    assert model.image_processor().size == (64, 96)
    assert [row.shape for row in model.split(model.encode(images(2, 3, 64, 96)))] == [(2, 24)] * 4


def test_batches_do_not_mix():
    model, x = small(), images(3, 3, 32, 48)
    assert torch.equal(model.encode(x)[1:2], model.encode(x[1:2]))


def test_training_output_and_gradients():
    model = small(entropy_weight=0.1).train()
    out = model(images(3, 3, 32, 48), torch.randint(1, 40, (2, 9)), reconstructed=2)
    assert out.images.shape == (2, 3, 32, 48) and out.indices.shape == (3, 4, 6) and out.loss.dim() == 0
    assert out.image_vectors.shape == (3, 12) and out.text_vectors.shape == (2, 12)
    assert float(out.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    logits = out.logit_scale * out.image_vectors @ out.text_vectors.T
    (out.images.square().mean() + logits.square().mean() + out.loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    assert still == []
    assert model(images(1, 3, 16, 16)).text_vectors is None


def test_loss_of_the_quantizer():
    """1.25 mean((q - y)^2) over unit slices, and the entropies of each group's softmax, written out."""
    model, x = small(entropy_weight=0.5).double().train(), images(2, 3, 32, 48).double()
    out = model(x)
    y = F.normalize(model.encode_features(x).flatten(2).unflatten(1, (4, 2)), dim=2)
    loss, tables = 0, F.normalize(model.quantizer.codebooks()[0], dim=-1)
    for g, table in enumerate(tables):
        rows = y[:, g].transpose(1, 2).flatten(0, 1)
        p = (-torch.cdist(rows, table).square() / 0.01).softmax(-1)
        mean = p.mean(0)
        sharp, spread = -(p * p.clamp(min=1e-300).log()).sum(-1).mean(), -(mean * (mean + 1e-7).log()).sum()
        loss += 1.25 * (table[out.indices[:, g].flatten()] - rows).square().mean() + 0.5 * (sharp - spread)
    assert float(out.loss.detach()) == pytest.approx(float(loss.detach()) / 4, rel=1e-6)


def test_fresh_weights():
    model = small(widths=(16, 32), dim=64, code_dim=32, text_width=64)
    bound = 8**-0.5 / 36
    assert 0.9 * bound < float(model.quantizer.codebooks()[0].detach().abs().max()) <= bound
    for layer, std in [
        (model.encoder.blocks[0].mlp.w0, 0.02),
        (model.post_quant_proj.attn.qkv, 0.02),
        (model.encoder.patch_embed["backbone"].pool.proj, (2 / (9 * 64)) ** 0.5),
        (model.decoder.up_conv1.conv, 0.5 * (2 / (9 * (64 + 32))) ** 0.5),
    ]:
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))


def test_a_causal_model_differs():
    x = images(1, 3, 32, 32)
    full, causal = small(), small(projection_causal=True)
    causal.load_state_dict(full.state_dict())
    assert not torch.allclose(causal.encode_features(x), full.encode_features(x))
    features = torch.randn(1, 8, 2, 2)
    assert not torch.allclose(causal.expand(features), full.expand(features))


def test_gradients_against_finite_differences():
    """Through expansion, decoder and vectors, along a random direction; the quantizer's own gradients are its tests'."""
    model = small().double()
    torch.manual_seed(2)
    features, direction = torch.randn(2, 8, 2, 3, dtype=torch.float64), torch.randn(2, 8, 2, 3, dtype=torch.float64)

    def measure(at):
        tokens = model.expand(at)
        return model.decode_features(at).square().mean() + model._image_vectors(tokens).square().mean()

    x = features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(measure(x), x)
    step = 1e-6
    slope = (measure(features + step * direction) - measure(features - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope.detach()), rel=1e-6)


def test_recomputing_in_backward_changes_nothing():
    x, gradients, calls = images(2, 3, 32, 32), [], []
    for enable in (False, True):
        model = small(drop_path=0.3).train()
        model.gradient_checkpointing_enable(enable)
        calls.append([])
        model.encoder.blocks[0].norm1.register_forward_hook(lambda *_: calls[-1].append(1))
        torch.manual_seed(5)
        out = model(x)
        (out.images.mean() + out.loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert float(model.quantizer.codebook.hits.sum()) == 2 * 4 * 4
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))
    assert [len(c) for c in calls] == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_a_break(dtype):
    model, x = small(depth=1).to(dtype).train(), images(2, 3, 32, 48)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x).indices, model(x).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"projection": "linear"}, {"projection_causal": True, "groups": 1}])
def test_half_precision_keeps_one_definition_of_tokens(changes, dtype):
    """Tokens of a half model are those of its tokens' projection in float32, by a float32 twin of the projection."""
    model, x = small(**changes), images(2, 3, 32, 32)
    half = small(**changes).to(dtype)
    assert half.quantizer.codebooks()[0].dtype == torch.float32
    assert all(p.dtype == dtype for p in half.quant_proj.parameters())
    twin = copy.deepcopy(half.quant_proj).float()
    features, rows = half.encode_features(x), twin(half.encoder(x.to(dtype)).float())
    assert features.dtype == torch.float32 and torch.equal(features.flatten(2).transpose(1, 2), rows)
    assert features.to(dtype).float().ne(features).any(), "rounded before the search"
    assert torch.equal(half.encode(x), half._by_group(half.quantizer.encode(features)))
    assert half.decode(half.encode(x)).dtype == torch.float32
    assert all(p.dtype == dtype for p in half.quant_proj.parameters())
    half.train()(x).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in half.quant_proj.parameters())
    with torch.autocast("cpu", dtype):
        features = model.encode_features(x)
        assert features.dtype == torch.float32 and model.encoder(x).dtype == dtype
        assert torch.equal(model.encode(x), model._by_group(model.quantizer.encode(features)))
        assert model(x).loss.dtype == torch.float32


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda m: m.encode(torch.zeros(1, 3, 40, 32)), ValueError, r"multiples of 16, got \[1, 3, 40, 32\]"),
    (lambda m: m.encode(torch.zeros(3, 32, 32)), ValueError, "wanted"),
    (lambda m: m.encode(torch.zeros(1, 3, 0, 16)), ValueError, "wanted"),
    (lambda m: m.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), TypeError, "got torch.uint8"),
    (lambda m: m.encode(torch.zeros(1, 3, 32, 32).numpy()), TypeError, "got ndarray"),
    (lambda m: m.decode(torch.zeros(1, 3, 4, dtype=torch.int64)), ValueError, r"wanted \[B, 4, L\], got \[1, 3, 4\]"),
    (lambda m: m.decode(torch.zeros(1, 4, 6, dtype=torch.int64)), ValueError, r"h \* w = 6, got None"),
    (lambda m: m.decode(torch.zeros(1, 4, 6, dtype=torch.int64), (2, 2)), ValueError, r"h \* w = 6, got \(2, 2\)"),
    (lambda m: m.decode(torch.zeros(1, 4, 6, dtype=torch.int64), (2.0, 3.0)), ValueError, r"got \(2.0, 3.0\)"),
    (lambda m: m.decode(torch.zeros(1, 4, 0, dtype=torch.int64)), ValueError, r"h \* w = 0, got None"),
    (lambda m: m.decode(torch.full((1, 4, 4), 32)), ValueError, "32"),
    (lambda m: m.decode(torch.zeros(1, 4, 4)), TypeError, "float32"),
    (lambda m: m.decode_features(torch.zeros(1, 4, 2, 2)), ValueError, r"wanted \[B, 8, h, w\]"),
    (lambda m: m.encode_text(torch.zeros(1, 9)), TypeError, "wanted integers"),
    (lambda m: m.encode_text(torch.zeros(1, 10, dtype=torch.int64)), ValueError, r"L in 1..9, got \[1, 10\]"),
    (lambda m: UniTok(dataclasses.replace(UNITOK, projection="mlp")), ValueError, "projection: wanted one of attention"),
    (lambda m: UniTok(dataclasses.replace(UNITOK, image_size=40)), ValueError, "image_size: wanted multiples of 16, got 40"),
    (lambda m: UniTok(dataclasses.replace(UNITOK, heads=3)), ValueError, "heads: wanted a divisor of dim 16"),
    (lambda m: UniTok.from_preset("unitok-xl"), ValueError, "unitok-b"),
    (lambda m: read(FOLDER / "unitok_model.json"), ValueError, "wanted"),
])  # fmt: skip
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call(small())
