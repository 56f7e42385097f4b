"""The models' parts at small sizes: towers against transformers, positions, other sizes, training, files, the hub, pictures."""

import doctest
import importlib
import json
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
from PIL import Image
from released_files import small_file
from tokenflow.errors import Missing
from tokenflow.models import VQVAE, ImageProcessor, TokenFlow, Tokenizer, vit
from tokenflow.models.semantic import Tower
from tokenflow.models.tokenflow import PRESETS, Config

SIZES = {"semantic_dim": 6, "pixel_dim": 2, "codebook_size": 64, "pixel_weight": 1.0, "update": "gradient",
         "dead_code_threshold": 0.0, "latent": 8, "teacher_dim": 10, "decoder_depth": 1, "decoder_heads": 2,
         "widths": (8, 8, 16), "decoder_widths": (8, 8, 16), "decoder_grid": 4}  # fmt: skip
CLIP = Config(image_size=16, scales=(1, 2, 4), **SIZES,
              tower=Tower("clip", width=24, depth=2, heads=3, hidden=40, patch=4, grid=4))  # fmt: skip
SIGLIP = Config(image_size=23, scales=(1, 2, 3, 4), **SIZES,
                tower=Tower("siglip", width=24, depth=2, heads=3, hidden=40, patch=5, grid=4))  # fmt: skip
VITAMIN = Config(image_size=64, scales=(1, 2, 4), **{**SIZES, "widths": (8, 8, 8, 8, 16), "decoder_widths": (8, 8, 8, 8, 16)},
                 tower=Tower("vitamin", width=24, depth=2, heads=3, hidden=48, patch=16, grid=4, stages=(8, 16)))  # fmt: skip
CONFIGS = {"clip": CLIP, "siglip": SIGLIP, "vitamin": VITAMIN}


def small(config):
    torch.manual_seed(0)
    return TokenFlow(config).eval()


def images_of(model, batch=2):
    return torch.rand(batch, 3, *model.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1


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


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name, tmp_path):
    size = (32, 64) if name == "vitamin" else (20, 30)
    model = small(CONFIGS[name]).resize(size, scales=(1, (2, 3)))
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert type(again) is TokenFlow and again.config == model.config and not again.training
    assert torch.equal(again.encode(images_of(model)), model.encode(images_of(model)))
    assert ImageProcessor.from_pretrained(tmp_path).size == size
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(ValueError, match="wanted fields of a Config, got colour"):
        TokenFlow.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "model": "other"}))
    with pytest.raises(ValueError, match="wanted a tokenflow or .*vqvae.* model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("config.json", b"{", "wanted JSON in .*config.json"),
    ("config.json", b"[]", "got another in"),
    ("config.json", b'{"model": ["vqvae"]}', "got another in"),
    ("config.json", b'{"model": "vqvae", "dim": {"a": 1}}', "dim: wanted a plain value"),
    ("config.json", b'{"model": "vqvae", "image_size": 32, "scales": [2], "widths": [8, 16]}', "describes, got .*Missing key"),
    ("model.safetensors", b"", "got .*header too small"),
    ("model.safetensors", None, "got .*not fully covered"),
])  # fmt: skip
def test_a_broken_folder_is_a_sentence(name, content, words, tmp_path):
    VQVAE(VQVAE.config_type(image_size=32, scales=(1, 2), dim=4, codebook_size=8, widths=(8, 8))).save_pretrained(
        tmp_path
    )
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match=f"from_pretrained: .*{words}") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_saving_that_dies_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    model = VQVAE(VQVAE.config_type(image_size=32, scales=(1, 2), dim=4, codebook_size=8, widths=(8, 8)))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def dying(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenflow.models.model.save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


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


def test_a_repository_of_the_hub_from_its_cache(tmp_path):
    pytest.importorskip("huggingface_hub")
    model, commit = small(CLIP), "0" * 40
    home = tmp_path / "models--owner--small"
    model.save_pretrained(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    again = TokenFlow.from_pretrained("owner/small", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(again.encode(images_of(model)), model.encode(images_of(model)))
    with pytest.raises(FileNotFoundError, match="got owner/absent") as caught:
        TokenFlow.from_pretrained("owner/absent", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_without_the_hubs_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Missing, match="pip install huggingface_hub"):
        TokenFlow.from_pretrained("owner/small")
    with pytest.raises(FileNotFoundError, match="config.json"):
        TokenFlow.from_pretrained(tmp_path / "owner")


def test_push_to_the_hub(monkeypatch):
    class HfApi:
        sent = []

        def __init__(self, token):
            self.token = token

        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            again = TokenFlow.from_pretrained(folder_path)
            self.sent.append((repo_id, again.config, self.token))

    monkeypatch.setitem(sys.modules, "huggingface_hub", type("hub", (), {"HfApi": HfApi}))
    assert small(CLIP).push_to_hub("owner/small", token="secret") == "https://hub/owner/small"
    assert HfApi.sent == [("owner/small", CLIP, "secret")]


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (40, 90), (32, 32), (20, 25)])
def test_pictures_are_resized_cropped_and_normalised(width, height):
    image = picture(width, height)
    values = ImageProcessor(32)(image).pixel_values
    short = 32 / min(width, height)
    grown = image.resize((max(32, round(width * short)), max(32, round(height * short))), Image.Resampling.BICUBIC)
    left, top = (grown.width - 32) // 2, (grown.height - 32) // 2
    expected = np.asarray(grown, dtype=np.float64)[top : top + 32, left : left + 32] / 127.5 - 1
    torch.testing.assert_close(values[0].double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-6, rtol=0)


def test_image_processor_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    ours = ImageProcessor(32)
    ours.save_pretrained(tmp_path)
    try:
        theirs = kind.from_pretrained(tmp_path)
        expected = theirs(picture(100, 64), return_tensors="pt").pixel_values
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    torch.testing.assert_close(ours(picture(100, 64)).pixel_values, expected, atol=1e-6, rtol=0)


def test_image_processor_reads_and_refuses():
    processor, image = ImageProcessor((16, 24)), picture(50, 40)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    values = processor([image, array, tensor]).pixel_values
    assert values.shape == (3, 3, 16, 24) and torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert torch.equal(processor(tensor[None]).pixel_values, values[:1]) and len(processor([]).pixel_values) == 0
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    assert processor(clear).pixel_values.min() == 1
    again = processor(processor.postprocess(values)).pixel_values
    assert torch.equal(again, values)
    for bad, kind in (
        (torch.zeros(3, 8, 8), TypeError),
        ("a.png", TypeError),
        (torch.zeros(4, 8, 8).byte(), ValueError),
    ):
        with pytest.raises(kind, match="ImageProcessor: images: wanted"):
            processor(bad)
    with pytest.raises(ValueError, match="return_tensors"):
        processor(image, return_tensors="np")
    with pytest.raises(ValueError, match="size"):
        ImageProcessor((1, 2, 3))
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        ImageProcessor.from_pretrained("nowhere")
