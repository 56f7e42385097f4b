"""The tokenizer: shapes and bad input, its files, training that repeats and resumes, and the measures."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenflow.evaluation.probe import balanced_probe
from tokenflow.evaluation.reconstruction import code_use, psnr
from tokenflow.evaluation.retrieval import Ranks, TextRegression, ranks_of_diagonal
from tokenflow.evaluation.text import bag_of_words
from tokenflow.losses import st_lpips
from tokenflow.models.tokenflow import Config, TokenFlow
from tokenflow.teacher import teacher_targets
from tokenflow.training.recipes import TINY
from tokenflow.training.run import Stage, WeightAverage
from tokenflow.training.tokenizer import train_tokenizer
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TokenFlow.from_preset("tokenflow-tiny").eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_prefixes(model, images):
    indices = model.encode(images)
    assert indices.shape == (3, 341) and indices.dtype == torch.int64 and 0 <= indices.min() and indices.max() < 2048
    assert torch.equal(model.reconstruct(images), model.decode(indices))
    assert model.features(images).shape == (3, 32, 16, 16)
    for length in (1, 5, 21, 85, 341):
        decoded = model.decode(indices[:, :length])
        assert decoded.shape == images.shape and decoded.abs().max() <= 1
    out = model(images)
    assert out.images.shape == images.shape and out.semantic.shape == (3, 128, 8, 8) and out.loss.dim() == 0
    assert model.encode(images[:0]).shape == (0, 341) and model.reconstruct(images[:0]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda m: m.encode(torch.zeros(1, 3, 32, 32)), ValueError, r"wanted \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"),
    (lambda m: m.encode(torch.zeros(3, 64, 64)), ValueError, "wanted"),
    (lambda m: m.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), TypeError, "got torch.uint8"),
    (lambda m: m.decode(torch.zeros(1, 7, dtype=torch.int64)), ValueError, "7"),
    (lambda m: m.decode(torch.full((1, 341), 2048)), ValueError, "2048"),
    (lambda m: m.decode_features(torch.zeros(1, 8, 16, 16)), ValueError, r"wanted \[B, 32, h, w\]"),
    (lambda m: TokenFlow.from_preset("tokenflow-huge"), ValueError, "tokenflow-tiny"),
    (lambda m: TokenFlow.from_pretrained("nowhere"), FileNotFoundError, "config.json"),
])  # fmt: skip
def test_bad_input_is_a_sentence(model, call, kind, words):
    with pytest.raises(kind, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_saved_and_loaded_model_gives_the_same_tokens(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    again = TokenFlow.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode(images), model.encode(images))
    values = json.loads((tmp_path / "config.json").read_text())
    first = "model image_size scales semantic_dim pixel_dim codebook_size pixel_weight commitment_weight decay scale_dropout"
    first = {name: values[name] for name in f"{first} dead_code_threshold widths teacher_dim".split()}
    (tmp_path / "config.json").write_text(json.dumps(first))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert TokenFlow.from_pretrained(tmp_path).config == model.config, "folders from before the published sizes"
    (tmp_path / "config.json").write_text('{"model": "another"}')
    with pytest.raises(ValueError, match="another"):
        TokenFlow.from_pretrained(tmp_path)


def test_autocast_does_not_reach_the_quantizer(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_features(images)
        indices = model.encode(images)
    assert features.dtype == torch.bfloat16
    assert torch.equal(indices, model.quantizer.encode(features.float()))


def small_training(run_dir, *, steps=6, model_hook=None, seed=3, **changes):
    torch.manual_seed(seed)
    model = TokenFlow(Config(codebook_size=64, widths=(8, 16, 32), teacher_dim=8))
    if model_hook is not None:
        model.register_forward_hook(model_hook)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (24, 3, 1, 1), generator=generator).expand(24, 3, 64, 64).byte()
    targets = torch.randn(24, 8, 8, 8, generator=generator)
    recipe = replace(
        TINY,
        loss=replace(TINY.loss, perceptual=0.0),
        optimizer=replace(TINY.optimizer, **{"batch": 8, "rate": 5e-3, "warmup": 2, **changes}),
    )
    return train_tokenizer(model, pictures, targets, run_dir, steps=steps, seed=seed, recipe=recipe, key="test")


def test_training_by_steps_repeats_and_lowers_the_loss(tmp_path):
    first, stage = small_training(tmp_path / "a", steps=11)
    second, _ = small_training(tmp_path / "b", steps=11)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert stage.history["PSNR"][-1][1] > stage.history["PSNR"][0][1]
    assert stage.history["semantic"][-1][1] < stage.history["semantic"][0][1]
    assert stage.finished and stage.step == 11


def test_zero_means_the_same_as_in_tokenflow_train(tmp_path):
    """No clipping, no warm-up, revival to the end."""
    model, stage = small_training(tmp_path, steps=11, clip=0.0, warmup=0, revive_until=0.0)
    assert model.quantizer.quantizer.codebook.dead_code_threshold > 0
    assert stage.history["PSNR"][-1][1] > stage.history["PSNR"][0][1]


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    whole, _ = small_training(tmp_path / "whole")
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        small_training(tmp_path / "cut", model_hook=stop)
    (tmp_path / "cut" / "tokenizer.ckpt.part").write_bytes(b"half a checkpoint")
    resumed, stage = small_training(tmp_path / "cut")
    assert stage.step == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    again, stage = small_training(tmp_path / "cut")
    assert stage.step == 6 and all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    with pytest.raises(ValueError, match="other settings .seed 4 instead of 3"):
        small_training(tmp_path / "cut", seed=4)


def test_stage_rate_and_time_budget(tmp_path):
    stage = Stage("clock", tmp_path, seconds=0.05, seed=0, parts={"m": nn.Linear(1, 1)})
    assert stage.rate(1.0, warmup=10) == pytest.approx(0.1)
    rates = [stage.rate(1.0, warmup=1) for _ in stage]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False)) and stage.elapsed >= 0.05
    assert stage.rate(1.0, warmup=1) == pytest.approx(0.02)


def test_weight_average_follows_its_equation():
    layer = nn.Linear(1, 1, bias=False)
    average = WeightAverage(layer, decay=0.5)
    start = layer.weight.item()
    with torch.no_grad():
        layer.weight.add_(1.0)
    average.update()
    assert average.average["weight"].item() == pytest.approx(0.1 * start + 0.9 * (start + 1))


def test_teacher_targets_are_fitted_on_training_pictures_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 12, 4, 4, generator=generator)
    rows = torch.arange(12)
    targets, kept = teacher_targets(features, rows, dim=5)
    assert targets.shape == (20, 5, 8, 8) and 0 < kept < 1
    features[12:] *= 7
    changed, same = teacher_targets(features, rows, dim=5)
    assert torch.equal(changed[:12], targets[:12]) and same == kept
    whole, all_kept = teacher_targets(features, rows, dim=12)
    assert all_kept == pytest.approx(1.0)
    centred = features[:12] - features[:12].mean((0, 2, 3))[:, None, None]
    small = torch.nn.functional.interpolate(centred, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole[:12].square().sum(1), small.square().sum(1), rtol=1e-3, atol=1e-3)


def test_psnr_and_code_use():
    x = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(torch.stack([x[0] + 0.2, x[0] + 0.02]), x), torch.tensor([20.0, 40.0]))
    hits, share, perplexity = code_use(torch.arange(8).repeat(3), 16)
    assert hits.tolist() == [3] * 8 + [0] * 8 and share == 0.5 and perplexity == pytest.approx(8.0)


def test_probe_reads_a_class_and_not_noise():
    generator = torch.Generator().manual_seed(0)
    groups = [("a", "b", "c")[i % 3] for i in range(240)]
    noise = torch.randn(240, 6, generator=generator)
    told = noise.clone()
    told[:, 0] += torch.tensor([6.0 * (i % 3) for i in range(240)])
    result = balanced_probe(told[:180], groups[:180], told[180:], groups[180:])
    assert result.balanced > 0.95 and result.classes == 3 and result.smallest == 20
    assert balanced_probe(noise[:180], groups[:180], noise[180:], groups[180:]).balanced < 0.6
    assert balanced_probe(noise[:180], [""] * 180, noise[180:], [""] * 60) is None


def test_retrieval_finds_a_planted_map():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 20, generator=generator), torch.randn(20, 8, generator=generator)
    vectors = torch.nn.functional.normalize(x @ weight, dim=1)
    regression = TextRegression(x[:250], vectors[:250], [f"base {i}" for i in range(250)])
    ranks = ranks_of_diagonal(regression.scores(x[250:], vectors[250:]))
    assert Ranks.of(ranks, 50).recall[1] > 0.8
    assert ranks_of_diagonal(torch.ones(4, 4)).tolist() == [4, 4, 4, 4]
    assert Ranks.chance(50).recall == {1: 0.02, 5: 0.1, 10: 0.2} and Ranks.chance(50).median == 25.5


def test_bag_of_words_is_unit_and_rare_words_weigh_more():
    vectors = bag_of_words(["red car", "red apple", "red bus"])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert (vectors[0] @ vectors[1]).item() < 0.5


@pytest.fixture
def metric():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "slice1.0": (64, 3, 11, 11),
        "slice2.5": (192, 64, 5, 5),
        "slice3.9": (384, 192, 3, 3),
        "slice4.11": (256, 384, 3, 3),
        "slice5.13": (256, 256, 3, 3),
    }
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for level, (name, shape) in enumerate(shapes.items()):
        state[f"net.{name}.weight"] = torch.randn(shape, generator=generator) * (shape[1] * shape[2] ** 2) ** -0.5
        state[f"net.{name}.bias"] = torch.zeros(shape[0])
        state[f"lin{level}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    return st_lpips.STLPIPS(state)


def test_st_lpips_is_a_distance_with_gradient(metric, images):
    a, b = images[:2], images[1:]
    assert metric(a, a).abs().max() == 0
    torch.testing.assert_close(metric(a, b), metric(b, a))
    assert (metric(a, b) > 0).all()
    x = a.clone().requires_grad_()
    metric(x, b).sum().backward()
    y = a.clone().requires_grad_()
    metric(b, y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert x.grad.abs().sum() > 0 and [f.shape[-1] for f in metric.features(a)] == [30, 15, 8, 8, 8]


def test_st_lpips_is_none_without_its_package(monkeypatch):
    monkeypatch.setattr(st_lpips.importlib.util, "find_spec", lambda name: None)
    assert st_lpips.STLPIPS.installed() is None
