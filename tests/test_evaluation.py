"""The measures against their formulas in float64, and `tokenflow evaluate` from pictures to page."""

import copy
import json
import re

import inception_weights
import pytest
import torch
from drawn import drawn_folder
from PIL import Image
from safetensors.torch import save_file
from small_models import CLIP, one_of_each, small
from tokenflow.cli import main
from tokenflow.data.entries import Entry, data_set
from tokenflow.data.loading import Crop, as_float
from tokenflow.encoding import Running
from tokenflow.evaluation import features as lite
from tokenflow.evaluation import run
from tokenflow.evaluation.classes import ProbeMeter
from tokenflow.evaluation.distribution import DistributionMeter, frechet, kid
from tokenflow.evaluation.measure import PairMeter, Seen, rounded
from tokenflow.evaluation.reconstruction import code_use, psnr
from tokenflow.evaluation.run import Brought, evaluate_data_set, round_trip
from tokenflow.evaluation.ssim import ssim
from tokenflow.evaluation.usage import UsageMeter
from tokenflow.evaluation.words import WordsMeter, class_vectors
from tokenflow.losses.perceptual import random_weights
from tokenflow.models import TokenFlow
from tokenflow.report.evaluation import evaluation_page

pytestmark = pytest.mark.usefixtures("one_thread")


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_its_formula_window_by_window(data_range):
    x, y = rand(2, 3, 9, 11) * 2 - 1, rand(2, 3, 9, 11, seed=1) * 2 - 1
    y = 0.7 * x + 0.3 * y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for b in range(2):
        values = []
        for c in range(3):
            for i in range(3):
                for j in range(5):
                    p, q = ((t[b, c, i : i + 7, j : j + 7].flatten() + 1) / 2 for t in (x, y))
                    cov = torch.cov(torch.stack([p, q]))
                    top = (2 * p.mean() * q.mean() + c1) * (2 * cov[0, 1] + c2)
                    values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
        torch.testing.assert_close(ssim(x, y, data_range=data_range)[b], torch.stack(values).mean(), rtol=1e-10, atol=0)


def test_ssim_of_flat_pictures_and_of_none():
    flat = torch.full((1, 3, 8, 8), 0.2, dtype=torch.float32)
    c1 = 1e-4
    a, b = 0.6, 0.5
    want = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(flat, flat - 0.2).item() == pytest.approx(want, rel=1e-6)
    assert ssim(flat[:0], flat[:0]).shape == (0,)
    assert ssim(flat, flat - 0.2, data_range=2.0) > ssim(flat, flat - 0.2)
    for bad in (torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 9, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match="ssim: images: wanted"):
            ssim(bad, flat)
    for bad in (flat[0], flat.expand(2, -1, -1, -1)):  # which would be compared by broadcasting
        with pytest.raises(ValueError, match="psnr: images: wanted two"):
            psnr(bad, flat)


@pytest.fixture(scope="module")
def models():
    return one_of_each()


def seen_of(model, count=4, seed=3, rows=None):
    images = torch.rand(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return round_trip(model, list(range(count)) if rows is None else rows, images)


@pytest.mark.parametrize("kind", ["tokenflow", "vqvae", "unitok"])
def test_a_round_trip_is_encode_and_decode(kind, models):
    seen = seen_of(models[kind])
    assert torch.equal(seen.indices, models[kind].encode(seen.originals))
    assert torch.equal(seen.images, models[kind].reconstruct(seen.originals))
    assert torch.equal(seen.codes, models[kind].features(seen.originals))


@pytest.mark.parametrize("kind", ["tokenflow", "vqvae", "unitok"])
def test_usage_counts_scales_together_and_codebooks_apart(kind, models):
    model, meter = models[kind], UsageMeter(models[kind])
    first, second = seen_of(model), seen_of(model, 3, seed=4)
    meter.update(first)
    meter.update(second)
    found = {m.name: m for m in meter.measures()}
    indices = torch.cat([first.indices, second.indices])
    if kind == "unitok":
        parts = [code_use(indices[:, g], 32) for g in range(2)]
        names = ["codebook 1", "codebook 2"]
        use, perplexity = (sum(p[i] for p in parts) / 2 for i in (1, 2))
    else:
        parts = [code_use(part, model.config.codebook_size) for part in model.split(indices)]
        names = [f"scale {part.shape[1]} x {part.shape[2]}" for part in model.split(indices)]
        _, use, perplexity = code_use(indices, model.config.codebook_size)
    assert found["codebook use"].value == pytest.approx(use) and found["perplexity"].value == pytest.approx(perplexity)
    for name, (hits, _, value) in zip(names, parts, strict=True):
        assert torch.equal(meter.hits[name], hits) and found[f"perplexity, {name}"].value == pytest.approx(value)


def test_pairs_and_distributions_over_batches_are_those_of_everything(models):
    whole = seen_of(models["tokenflow"], 6)
    parts = [whole._replace(originals=o, images=i) for o, i in zip(whole.originals.split(4), whole.images.split(4))]
    pairs = PairMeter("PSNR", psnr, "", "dB", 2)
    look = lambda t: t.float().mean((2, 3))  # noqa: E731
    distances = [DistributionMeter("d", look, "look", kernel=kernel) for kernel in (False, True)]
    for part in parts:
        for meter in (pairs, *distances):
            meter.update(part)
    (value,) = pairs.measures()
    quality = psnr(whole.images, whole.originals).double()
    assert value.value == pytest.approx(quality.mean().item()) and value.error == pytest.approx(
        quality.std().item() / 6**0.5
    )
    x, y = (look(rounded(t)) for t in (whole.originals, whole.images))
    assert distances[0].measures()[0].value == pytest.approx(frechet(x, y))
    assert "6 pictures for 3 dimensions: biased" in distances[0].measures()[0].protocol
    assert distances[1].measures()[0].value == pytest.approx(kid(x, y)[0])
    assert rounded(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist() == [0, 0, 128, 255]


def test_probe_is_on_pictures_of_other_names_and_reads_a_planted_class(models):
    model = models["tokenflow"]
    entries = [Entry(f"{g}/thing {i}.png", "", group=g) for g in ("dark", "light") for i in range(20)]
    meter = ProbeMeter(model, entries, most=100)
    assert meter.possible and not ProbeMeter(model, entries[:20], most=100).possible
    assert not ProbeMeter(model, entries, most=0).possible and len(ProbeMeter(model, entries, most=30).about) == 30
    # A picture without a class and a class with one picture take no part.
    entries += [Entry(f"thing {i}.png", "") for i in range(7)] + [Entry("rare/thing.png", "", group="rare")]
    meter = ProbeMeter(model, entries, most=100)
    for start in range(0, 48, 8):
        seen = seen_of(model, 8, seed=start, rows=list(range(start, start + 8)))
        level = torch.tensor([-0.5 if entries[r].group == "dark" else 0.5 for r in seen.rows])[:, None, None, None]
        meter.update(seen._replace(originals=0.2 * seen.originals + level))
    found = {m.name: m for m in meter.measures()}
    assert found["linear probe, pixels, 8 x 8"].value == 1.0
    assert found["linear probe, semantic half, 8 x 8"].value < 0.95
    assert re.search(
        "2 classes .chance 0.500.*fitted on 36 of the pictures, tested on 4 of other names",
        found["linear probe, pixels, 8 x 8"].protocol,
    )


def words(texts):
    """A word is a letter: enough for a text tower."""
    return torch.tensor([[38, *[(ord(c) % 30) + 1 for c in (t + "zzzzzzz")[:7]], 39] for t in texts])


def test_zero_shot_and_retrieval_are_their_formulas(models):
    model = models["unitok"]
    entries = [Entry(f"{'ab'[i % 2]}/{i}.png", "", group="ab"[i % 2], caption=f"{i // 2} c") for i in range(10)]
    templates = ("{} x", "y {}")
    meter = WordsMeter(model, words, entries, {"a": "cat"}, templates)
    assert meter.classes == ["a", "b"] and meter.names == ["cat", "b"]
    seen = seen_of(model, 10)
    for part in (slice(0, 7), slice(7, 10)):
        meter.update(Seen(seen.rows[part], *(t[part] for t in seen[1:])))
    found = {m.name: m.value for m in meter.measures()}
    images = model.encode_image(seen.originals, normalize=True)
    classes = []
    for name in ("cat", "b"):
        vectors = torch.stack([model.encode_text(words([t.format(name)]), normalize=True)[0] for t in templates])
        classes.append(vectors.mean(0) / vectors.mean(0).norm())
    torch.testing.assert_close(class_vectors(model, words, ["cat", "b"], templates), torch.stack(classes))
    guess = (images @ torch.stack(classes).T).argmax(1)
    right = (guess == torch.arange(10) % 2).double()
    assert found["zero-shot accuracy"] == pytest.approx(right.mean().item())
    assert found["zero-shot accuracy, balanced"] == pytest.approx((right[::2].mean() + right[1::2].mean()).item() / 2)
    texts = model.encode_text(words([f"{i} c" for i in range(5)]), normalize=True)
    scores = images[::2] @ texts.T
    for way, table in (("picture to caption", scores), ("caption to picture", scores.T)):
        ranks = torch.tensor([(table[i] >= table[i, i]).sum() for i in range(5)])
        assert found[f"recall@1, {way}"] == pytest.approx((ranks == 1).double().mean().item())
        assert found[f"recall@5, {way}"] == 1.0
    with pytest.raises(ValueError, match="wanted {} for the class in each"):
        class_vectors(model, words, ["a"], ["no place"])


class Stand(torch.nn.Module):
    """Stands in for EfficientNet-Lite0: twenty numbers of a picture."""

    def extract_features(self, x):
        weight = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 50
        return torch.nn.functional.conv2d(x, weight.to(x), stride=32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    path = drawn_folder(tmp_path_factory.mktemp("pictures"))
    (path / "torn.png").write_bytes(b"\x89PNG nothing")
    return path


@pytest.fixture
def files(tmp_path, models, monkeypatch):
    """A saved model, LPIPS's two files, and no real teacher."""
    monkeypatch.setattr(lite, "load_teacher", Stand)
    monkeypatch.setattr(run, "installed_weights", lambda: None)
    models["tokenflow"].save_pretrained(tmp_path / "model")
    for name, state in zip(("trunk", "heads"), random_weights(2), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path


def test_the_command_writes_table_numbers_and_page(files, pictures, capsys):
    lpips = [str(files / f"{name}.safetensors") for name in ("trunk", "heads")]
    main(
        [
            "evaluate",
            str(pictures),
            "--model",
            str(files / "model"),
            "--out",
            str(files / "out"),
            "--batch",
            "16",
            "--lpips",
            *lpips,
        ]
    )
    said = capsys.readouterr()
    written = json.loads((files / "out" / "evaluation.json").read_text())
    found = {m["name"]: m for m in written["measures"]}
    page = (files / "out" / "index.html").read_text()
    model = TokenFlow.from_pretrained(files / "model")
    entries = [e for e in data_set(pictures).entries if e.key != "torn.png"]
    x = as_float(torch.stack([Crop((64, 64))(entry.read()) for entry in entries]))
    y = model.reconstruct(x)
    assert found["PSNR"]["value"] == pytest.approx(psnr(y, x).double().mean().item(), rel=1e-5)
    assert found["SSIM"]["value"] == pytest.approx(ssim(y, x).mean().item(), rel=1e-4)
    assert found["SSIM, range 2 as published"]["value"] == pytest.approx(
        ssim(y, x, data_range=2.0).mean().item(), rel=1e-4
    )
    assert found["SSIM, range 2 as published"]["value"] > found["SSIM"]["value"]
    names = [
        "LPIPS (VGG16)",
        "KID on EfficientNet-Lite0",
        "codebook use",
        "perplexity, scale 16 x 16",
        "linear probe, pixels, 8 x 8",
    ]
    assert set(names) <= set(found) and "rFID" not in found
    for measure in written["measures"]:
        for words in ("40 of ", "centre crop 64 x 64, area-averaged", "the same pictures cropped", "float32 networks"):
            assert words in measure["protocol"]
        assert measure["name"] in said.out and measure["shown"] in said.out and measure["name"] in page
    assert "pictures: 40 of" in said.out and "not measured: rFID: --inception FILE" in said.out
    assert (
        "1 picture was skipped: torn.png" in said.err
        and "torn.png" in page
        and written["skipped"][0].startswith("torn.png")
    )
    assert page.count("<img") == 48 and "<script" not in page and "http" not in page
    assert "nan" not in re.sub(r"base64,[^']*", "", page) and page.count("<svg") == 5


def test_inception_and_a_limit(files, pictures, models):
    save_file(inception_weights.state(), files / "inception.safetensors")
    brought = Brought(limit=6, inception=files / "inception.safetensors", probe=0)
    found = evaluate_data_set(models["tokenflow"], "m", pictures, Running(batch=4), brought)
    values = {m.name: m for m in found.measures}
    assert values["rFID"].value > 0 and "inception.safetensors" in values["rFID"].protocol
    assert "6 pictures for 2048 dimensions: biased upward" in values["rFID"].protocol
    assert re.search("6 of .*chosen by a hash of their names from 41", found.common())
    again = evaluate_data_set(models["tokenflow"], "m", pictures, Running(batch=6), Brought(limit=6, probe=0))
    assert [key for key, *_ in again.shown] == [key for key, *_ in found.shown]
    assert {m.name: m.value for m in again.measures}["PSNR"] == pytest.approx(values["PSNR"].value, rel=1e-6)


@pytest.mark.parametrize("kind", ["vqvae", "unitok"])
def test_every_kind_of_tokenizer_can_be_evaluated(kind, files, pictures, models, monkeypatch):
    monkeypatch.setattr(run, "TextTokenizer", lambda path, context: words)
    (files / "classes.csv").write_text("class,name\nring,a ring\n")
    brought = Brought(words=files, classes=files / "classes.csv", probe=20)
    found = evaluate_data_set(models[kind], "m", pictures, Running(batch=16, resize="model"), brought)
    names = {m.name for m in found.measures}
    assert ("zero-shot accuracy" in names) == (kind == "unitok") == ("linear probe, image vector" in names)
    assert ("zero-shot and retrieval: a VQVAE has no text tower" in found.missing) == (kind == "vqvae")
    assert {"PSNR", "linear probe, codes, 8 x 8", "perplexity"} <= names
    crop = (
        "resized to cover 72 x 36, centre crop 64 x 32, bilinear"
        if kind == "unitok"
        else "centre crop 32 x 48, bicubic"
    )
    assert crop in found.common()
    assert evaluation_page(found).endswith("</html>") and all(m.value == m.value for m in found.measures)


@pytest.mark.parametrize("kind", ["tokenflow", "vqvae", "unitok"])
def test_bfloat16_networks(kind, files, pictures, models):
    half = copy.deepcopy(models[kind])
    brought = Brought(limit=8, probe=0)
    found = evaluate_data_set(half, "m", pictures, Running(batch=8, dtype="bfloat16"), brought)
    full = evaluate_data_set(models[kind], "m", pictures, Running(batch=8), brought)
    assert half.dtype == torch.bfloat16 and "bfloat16 networks, float32 quantizer" in found.common()
    assert [m.name for m in found.measures] == [m.name for m in full.measures]
    a, b = (e.measures[0].value for e in (found, full))
    assert a != b and a == pytest.approx(b, abs=1.0)


def test_what_could_not_be_measured_after_all_is_said(files, models, monkeypatch):
    """One readable picture, the probe's torn, no captions: known only when everything has been read."""
    monkeypatch.setattr(run, "TextTokenizer", lambda path, context: words)
    for group in ("a", "b"):
        for i in range(4):
            (files / group).mkdir(exist_ok=True)
            (files / group / f"{i}.png").write_bytes(b"torn")
    Image.new("RGB", (9, 9), "red").save(files / "whole.png")
    found = evaluate_data_set(models["unitok"], "m", files, Running(), Brought(words=files, probe=4))
    assert {m.name for m in found.measures} >= {"PSNR", "codebook use"}
    for name in ("KID on EfficientNet-Lite0", "linear probe", "zero-shot and retrieval"):
        assert f"{name}: too few readable pictures, or without classes or captions" in found.missing


def test_pictures_too_small_for_a_measure_are_measured_by_the_others(files, pictures):
    lpips = tuple(files / f"{name}.safetensors" for name in ("trunk", "heads"))
    found = evaluate_data_set(small(CLIP), "m", pictures, Running(), Brought(limit=3, lpips=lpips))
    assert {m.name for m in found.measures} >= {"PSNR", "SSIM", "LPIPS (VGG16)"}  # of 16 x 16
    assert "ST-LPIPS (AlexNet)" not in {m.name for m in found.measures}
    assert "ST-LPIPS (AlexNet): needs sides of at least 21" in found.missing


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["absent"], "absent, which does not exist"),
    (["{pictures}", "--limit", "1"], "evaluate: limit: wanted at least 2, got 1"),
    (["{pictures}", "--inception", "absent.pth"], "absent.pth"),
    (["{pictures}", "--lpips", "absent.pth", "absent.pth"], "absent.pth"),
    (["{files}"], "wanted at least one readable picture, got none"),
    (["{pictures}", "--batch", "0"], "batch: wanted at least 1, got 0"),
    (["{pictures}", "--templates"], "evaluate: templates: wanted at least one, got none"),
    (["{pictures}", "--templates", "a photo"], "evaluate: templates: wanted {} for the class in each, got 'a photo'"),
    (["{pictures}", "--out", "{files}/config.json"], "config.json: File exists"),
    (["{pictures}", "--device", "moon"], "device: wanted one that this machine has, got moon"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(arguments, wanted, files, pictures, capsys):
    arguments = [a.format(pictures=pictures, files=files / "model") for a in arguments]
    out = [] if "--out" in arguments else ["--out", str(files / "out")]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments, "--model", str(files / "model"), *out])
    said = capsys.readouterr().err.strip().splitlines()
    assert wanted.endswith("got none") or len(said) == 1  # nothing was evaluated first
    assert caught.value.code == 1 and wanted in said[-1] and said[-1].startswith("tokenflow: ")
