"""The models' parts at small sizes: towers against transformers, positions, other sizes, half precision, examples."""

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tokenflow.models
import torch
import torch.nn.functional as F
from released_files import small_file
from small_models import CLIP, CONFIGS, SIGLIP, VITAMIN, images_of, small
from tokenflow.models import VQVAE, TokenFlow, Tokenizer, vit
from tokenflow.models.semantic import Tower
from tokenflow.models.tokenflow import PRESETS, Config


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(tokenflow.models.__path__)])
def test_examples(name):
    module = importlib.import_module(f"tokenflow.models.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_models_are_found_in_the_package_itself():
    for name in tokenflow.__all__:
        assert getattr(tokenflow, name) is getattr(tokenflow.models, name)
    assert sorted(tokenflow.__all__) == sorted(tokenflow.models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = tokenflow.other
    alone = "import sys, tokenflow; assert 'torch' not in sys.modules; from tokenflow import UniTok; UniTok.presets"
    subprocess.run(
        [sys.executable, "-c", alone], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def transformers_tower(name):
    """A random vision tower of transformers of our small size, SigLIP's with the block that is never read."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
    if name == "clip":
        config = transformers.CLIPVisionConfig(
            image_size=16, patch_size=4, num_hidden_layers=2, hidden_act="quick_gelu", **sizes
        )
        theirs = transformers.CLIPVisionModel(config).eval()
    else:
        config = transformers.SiglipVisionConfig(image_size=23, patch_size=5, num_hidden_layers=3, **sizes)
        theirs = transformers.SiglipVisionModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers_are_those_of_transformers_and_start_from_their_files(name, prefix, tmp_path):
    theirs, model = transformers_tower(name), small(CONFIGS[name])
    state = {prefix + key.removeprefix("vision_model."): value for key, value in theirs.state_dict().items()}
    torch.save(
        {**state, "text_model.final_layer_norm.weight": torch.zeros(3), "logit_scale": torch.zeros(())},
        tmp_path / "x.pt",
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_tower(tmp_path / "x.pt")
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith("semantic_encoder.tower.")}
    x = torch.randn(2, 3, *model.image_size)
    with torch.no_grad():
        out = theirs(x, output_hidden_states=True)
        expected = out.hidden_states[-2]
        if name == "clip":
            norm = next(m for n, m in theirs.named_modules() if n.endswith("post_layernorm"))
            expected = norm(out.last_hidden_state[:, 1:])
        torch.testing.assert_close(model.semantic_encoder.tower(x).flatten(1, 2), expected, atol=1e-4, rtol=1e-4)


def test_a_tower_that_does_not_fit_is_a_sentence(tmp_path):
    torch.save(transformers_tower("siglip").state_dict(), tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="load_tower: path: wanted the weights of a VisionTransformer.*missing"
    ) as caught:
        small(CLIP).load_tower(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="small networks"):
        TokenFlow.from_preset("tokenflow-tiny").load_tower(tmp_path / "x.pt")


def cubic_rows(count, side, ratio):
    """[count, side]: bicubic weights (a = -0.75, clamped border) at (i + 0.5) / ratio - 0.5, float64."""
    weights, a = torch.zeros(count, side, dtype=torch.float64), -0.75
    for i in range(count):
        x = (i + 0.5) / ratio - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - j)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(j, 0), side - 1)] += w
    return weights


def test_positions_stretch_by_a_tenth_more():
    positions = torch.randn(14, 14, 5)
    assert vit.stretch(positions, (14, 14)) is positions
    for grid in ((16, 16), (9, 20)):
        rows, columns = (cubic_rows(n, 14, (n + 0.1) / 14) for n in grid)
        expected = torch.einsum("hi,wj,ijd->hwd", rows, columns, positions.double()).float()
        torch.testing.assert_close(vit.stretch(positions, grid), expected, atol=2e-5, rtol=0)
        plain = F.interpolate(positions.permute(2, 0, 1)[None], grid, mode="bicubic")[0].permute(1, 2, 0)
        assert (vit.stretch(positions, grid) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_model(name):
    model = small(CONFIGS[name])
    images = images_of(model)
    indices = model.encode(images)
    tokens = sum(s * s for s in model.config.scales)
    assert indices.shape == (2, tokens) and [m.shape[1] for m in model.split(indices)] == list(model.config.scales)
    assert model.features(images).shape == (2, 8, 4, 4) and model.reconstruct(images).shape == images.shape
    for length in (1, 5, tokens):
        assert model.decode(indices[:, :length]).shape == images.shape
    assert torch.equal(model.encode(images[1:]), indices[1:])
    assert model.encode(images[:0]).shape == (0, tokens) and model.reconstruct(images[:0]).shape[0] == 0
    out = model.train()(images)
    assert out.images.shape == images.shape and out.semantic.shape == (2, 10, 4, 4)
    (out.images.square().mean() + out.semantic.square().mean() + out.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_pixels_are_seen_at_four_a_cell_whatever_the_patch():
    model = small(SIGLIP)
    images = images_of(model)
    seen = F.interpolate(images, (16, 16), mode="bicubic", align_corners=False)
    features = model.encode_features(images)
    torch.testing.assert_close(features[:, 6:], model.pixel_encoder(seen))
    decoded = model.pixel_decoder(features[:, 6:])
    expected = F.interpolate(decoded, (23, 23), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.decode_features(features), expected)
    assert decoded.shape[2:] == (16, 16)


def test_vitamin_sees_clips_normalisation():
    encoder = small(VITAMIN).semantic_encoder
    x = torch.rand(1, 3, 32, 48)
    mean, deviation = (
        torch.tensor(v).view(1, 3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    rows = encoder.head(encoder.tower((x - mean) / deviation))
    torch.testing.assert_close(encoder(2 * x - 1), rows.view(1, 2, 3, 6).permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


def test_siglip_sees_clamped_images_and_clip_sees_them_as_they_are():
    for name, same in (("siglip", True), ("clip", False)):
        encoder = small(CONFIGS[name]).semantic_encoder
        x = 2 * torch.randn(1, 3, 23, 23)
        assert torch.equal(encoder(x), encoder(x.clamp(-1, 1))) == same


@pytest.mark.parametrize("name", CONFIGS)
def test_other_sizes_and_scales(name):
    model = small(CONFIGS[name])
    patch = model.config.tower.patch
    assert model.resize(6 * patch).grid == (6, 6) and model.config.scales[-1] == 6
    more = 0 if name == "vitamin" else 1
    model.resize((3 * patch, 6 * patch + more), scales=[1, (2, 3), (3, 6)])
    images = images_of(model)
    indices = model.encode(images)
    assert indices.shape == (2, 1 + 6 + 18) and model.reconstruct(images).shape == images.shape
    assert model.decode(indices[:, :7]).shape == images.shape and model.features(images).shape == (2, 8, 3, 6)
    assert model.decode_semantic(model.features(images)).shape == (2, 10, 3, 6)
    model.resize((6 * patch, 3 * patch))
    assert model.config.scales == ((1, 1), (3, 2), (6, 3))
    before = small(CONFIGS[name])
    there_and_back = small(CONFIGS[name]).resize(6 * patch).resize(before.config.image_size, before.config.scales)
    assert torch.equal(there_and_back.encode(images_of(before)), before.encode(images_of(before)))
    for size, scales, words in (
        (patch - 1, None, "at least|multiples"),
        (4 * patch, (1, 5), "1 to 4 x 4"),
        (4 * patch, (), "wanted"),
    ):
        with pytest.raises(ValueError, match=words):
            model.resize(size, scales)


def test_vqvae_at_other_sizes():
    model = VQVAE(VQVAE.recognise(small_file("var_vqvae"))).eval()
    model.resize((32, 64), scales=(1, (1, 2), (2, 2), (2, 4)))
    images = images_of(model)
    assert model.encode(images).shape == (2, 1 + 2 + 4 + 8) and model.reconstruct(images).shape == images.shape
    assert model.quantizer.phi_assignment == [0, 1, 2, 3] and model.train()(images).loss.requires_grad
    assert model.encode(images[:0]).shape == (0, 15) and model.reconstruct(images[:0]).shape == (0, 3, 32, 64)
    with pytest.raises(ValueError, match="multiples of 16"):
        model.resize(40)
    with pytest.raises(ValueError, match=r"wanted \[B, 4, h, w\]"):
        model.decode_features(torch.zeros(1, 5, 2, 4))


def test_the_demos_model_keeps_its_size():
    model = TokenFlow.from_preset("tokenflow-tiny")
    for size, scales in ((128, None), (64, (1, 2))):
        with pytest.raises(ValueError, match="the size of this model"):
            model.resize(size, scales)


def test_half_precision_keeps_the_quantizer_and_the_last_layer_in_float32():
    model = small(CLIP)
    images = images_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_features(images)
        assert features.dtype == torch.float32
        assert torch.equal(model.encode(images), model.quantizer.encode(features))
        assert features.bfloat16().float().ne(features).any()
    half = small(CLIP).bfloat16()
    assert half.encode(images).dtype == torch.int64 and half.reconstruct(images).dtype == torch.float32
    assert half.quantizer.codebooks()[0].dtype == torch.float32 and half.dtype == torch.bfloat16


def test_sizes_that_cannot_be_are_told_when_the_model_is_made():
    tiny = TokenFlow.from_preset("tokenflow-tiny")
    for scales, words in (((), "a list of at least one"), (16, "a list of at least one"), ((True, 16), "an integer")):
        with pytest.raises(ValueError, match=f"TokenFlow: scales: wanted {words}"):
            tiny.resize(64, scales=scales)
    for changes, words in (
        ({"scales": (1, 5)}, "TokenFlow: scales: wanted sides of 1 to 4 x 4 cells"),
        ({"image_size": 3}, "TokenFlow: image_size: wanted at least 4 x 4"),
        ({"image_size": (16, 16, 3)}, "TokenFlow: image_size: wanted an integer, or height and width"),
        ({"image_size": 16.0}, "TokenFlow: image_size: wanted an integer, or height and width"),
        ({"scales": (1, (2, 2, 2))}, "TokenFlow: scales: wanted an integer, or height and width"),
    ):
        with pytest.raises(ValueError, match=words):
            TokenFlow(replace(CLIP, **changes))
    with pytest.raises(ValueError, match=r"TokenFlow: scales: wanted an even side at the end, got \(1, 2, 5\)"):
        TokenFlow(Config(image_size=20, scales=(1, 2, 5)))
    with pytest.raises(ValueError, match="VQVAE: image_size: wanted multiples of 16"):
        VQVAE(replace(VQVAE.presets["var-vqvae"], image_size=250))


def test_presets_are_listed():
    published = {
        "tokenflow-tiny",
        "tokenflow-l",
        "tokenflow-b",
        "tokenflow-b-enhanced",
        "tokenflow-b-256",
        "tokenflow-xl",
    }
    assert published <= set(PRESETS)
    with pytest.raises(ValueError, match="tokenflow-tiny, .*tokenflow-xl, .*var-vqvae"):
        Tokenizer.from_preset("tokenflow-xxl")
    assert type(Tokenizer.from_preset("tokenflow-tiny")) is TokenFlow
    with pytest.raises(ValueError, match="wanted one of clip, siglip, vitamin"):
        Tower("resnet", 8, 1, 1, 8, 4, 4).build()
