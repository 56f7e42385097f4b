"""Whole published tokenizers: values that the published implementations produced, in stages, and every name of their files.

Stages, because one other code changes all that follows it: image -> features; the stored features -> codes; the stored codes ->
images and what the teacher would say.
"""

import golden_values as golden
import pytest
import torch
import torch.nn.functional as F
from released_files import shapes
from tokenflow.models import VQVAE, TokenFlow, checkpoint
from tokenflow.models.tokenflow import PRESETS

B256 = "tokenflow-b-256"


def built(cls, name):
    """The model that the golden values came from, through the reader of released names."""
    state = {key: torch.from_numpy(golden.value(key, shape, 1)) for key, shape in shapes(name).items()}
    config = cls.recognise(state)
    model = cls(config).eval()
    checkpoint.fit(cls.convert(state, config), model, name)
    return model


def check_images(case, images, crop):
    """Reconstructions against the stored block means, statistics and a crop."""
    case.check("reconstruction", F.avg_pool2d(images, 8), case["rec_down8"])
    case.check("reconstruction", images.mean((2, 3)), case["rec_mean"])
    case.check("reconstruction", images.std((2, 3), correction=0), case["rec_std"])
    case.check("reconstruction", images[:, :, crop : crop + 32, crop : crop + 32], case["rec_crop"])


@pytest.fixture(scope="module")
def tokenflow_b():
    return built(TokenFlow, "tokenflow_b"), golden.Case("tokenflow_model", "tokenflow_b")


@torch.inference_mode()
def test_tokenflow_b_features(tokenflow_b):
    model, case = tokenflow_b
    image = torch.from_numpy(golden.image("model_image", [1, 3, 224, 224], 8))
    case.check("h", model.encode_features(image), case["h"])


@torch.inference_mode()
def test_tokenflow_b_codes(tokenflow_b):
    model, case = tokenflow_b
    indices = model.quantizer.encode(case["h"])
    case.check_indices(indices)
    torch.testing.assert_close(model.codes(case["idx"]), case["f_hat"], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_tokenflow_b_decoders(tokenflow_b):
    model, case = tokenflow_b
    case.check("semantic", model.decode_semantic(case["f_hat"]).flatten(2).transpose(1, 2), case["semantic"])
    prefix = model.codes(case["idx"][:, :57])
    images = model.decode_features(torch.cat([case["f_hat"], prefix]))
    check_images(case, images[:1], 96)
    case.check("reconstruction", F.avg_pool2d(images[1:], 8), case["prefix_rec_down8"])


@torch.inference_mode()
def test_var_vqvae():
    model, case = built(VQVAE, "var_vqvae"), golden.Case("var_vqvae_model", "var_vqvae")
    image = torch.from_numpy(golden.image("var_image", [1, 3, 256, 256], 2))
    case.check("f", model.encode_features(image), case["f"])
    case.check_indices(model.quantizer.encode(case["f"]))
    torch.testing.assert_close(model.codes(case["idx"]), case["f_hat"], atol=1e-5, rtol=0)
    check_images(case, model.decode(case["idx"]), 112)
    prefix = sum(s * s for s in case.options["scales"][:5])
    case.check("reconstruction", F.avg_pool2d(model.decode(case["idx"][:, :prefix]), 8), case["prefix_rec_down8"])


@pytest.mark.parametrize(("table", "cls", "preset", "parameters", "dropped"), [
    ("tokenflow_b", TokenFlow, "tokenflow-b", 181.9, 1),
    ("tokenflow_b_enhanced", TokenFlow, "tokenflow-b-enhanced", 376.6, 1),
    ("tokenflow_b_enhanced_256", TokenFlow, "tokenflow-b-enhanced", 376.6, 1),
    ("tokenflow_l", TokenFlow, "tokenflow-l", None, 2 + 1),
    ("tokenflow_xl", TokenFlow, "tokenflow-xl", 523.5, 16 + 2 + 11 + 2 + 1),
    ("var_vqvae", VQVAE, "var-vqvae", 108.9, 1),
])  # fmt: skip
def test_names_and_shapes_say_which_model(table, cls, preset, parameters, dropped):
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes(table).items()}
        config = cls.recognise(state)
        model, converted = cls(config), cls.convert(state, config)
        checkpoint.fit(converted, model, table)
    assert config == cls.presets[preset]
    assert sum(len(names) for names in converted.dropped.values()) == dropped
    if parameters is not None:
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == parameters
    # What the file counts beyond the model: what was dropped, less the zero biases that it leaves out.
    kept = sum(v.numel() for v in state.values()) - sum(
        state[n].numel() for why in converted.dropped.values() for n in why
    )
    zeros = config.decoder_depth * config.tower.width if cls is TokenFlow else 0
    assert sum(v.numel() for v in model.state_dict().values()) == kept + zeros


def test_b_at_256_is_enhanced_b_with_more_cells():
    with torch.device("meta"):
        model = TokenFlow.from_preset("tokenflow-b-enhanced")
        assert B256 in model.summary()["also"]
        model.resize(256)
    assert model.config == PRESETS[B256] and model.grid == (16, 16)
    assert model.summary()["tokens"] == "817 an image"


@pytest.mark.parametrize(
    ("preset", "tokens"), [("tokenflow-b", 561), (B256, 817), ("tokenflow-l", 817), ("tokenflow-xl", 2227)]
)
def test_presets_have_the_published_number_of_tokens(preset, tokens):
    config = PRESETS[preset]
    assert sum(s * s for s in config.scales) == tokens
    assert config.scales[-1] == config.image_size // config.tower.patch


@pytest.mark.parametrize("preset", [name for name, config in PRESETS.items() if config.tower is not None])
def test_published_sizes_pass_through_every_network(preset):
    with torch.device("meta"), torch.inference_mode():
        model = TokenFlow.from_preset(preset).eval()
        images = torch.empty(2, 3, *model.image_size)
        features = model.encode_features(images)
        assert features.shape == (2, 40, *model.grid)
        assert model.decode_features(features).shape == images.shape
        assert model.decode_semantic(features).shape == (2, model.config.teacher_dim, *model.grid)
