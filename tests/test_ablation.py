"""The ablation on a folder of small pictures: its rows, going on after a stop, the verdict, and the model with one codebook."""

import json
import re
from dataclasses import replace

import pytest
import tokenflow.ablation as ablation
import torch
from drawn import drawn_folder
from tokenflow.cli import main
from tokenflow.models.tokenflow import PRESETS, Config, TokenFlow
from tokenflow.report.ablation import table, verdict


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny layers gain nothing from a second thread, and lose much where another process wants the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_teacher(images):
    """Stands in for the teacher's features [N, 160, 4, 4]: a fixed random projection of patches."""
    patches = torch.nn.functional.unfold(images.float() / 255, 16, stride=16).view(len(images), -1, 4, 4)
    weight = torch.randn(patches.shape[1], 160, generator=torch.Generator().manual_seed(0))
    return torch.einsum("nchw,cd->ndhw", patches, weight / 30).bfloat16()


class RandomFeatures:
    """Stands in for the features of the kernel distance."""

    def __init__(self, size):
        self.side = size[0]

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(ablation, "teacher_features", random_teacher)
    monkeypatch.setattr(ablation, "LiteFeatures", RandomFeatures)
    monkeypatch.setattr(ablation.STLPIPS, "installed", lambda: None)


def test_three_rows_one_page_and_going_on_after_a_stop(stand_ins, tmp_path, monkeypatch, capsys):
    folder, out = drawn_folder(tmp_path / "pictures"), tmp_path / "out"
    arguments = ["ablation", "--data", str(folder), "--out", str(out), "--steps", "2"]
    trained, whole = [], ablation.train_tokenizer

    def stopped_in_the_second(model, *rest, **options):
        trained.append(model.config)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return whole(model, *rest, **options)

    monkeypatch.setattr(ablation, "train_tokenizer", stopped_in_the_second)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 130 and "goes on from the last checkpoint" in capsys.readouterr().err
    first = (out / "distilled" / "tokenizer.ckpt").stat().st_mtime_ns
    monkeypatch.setattr(ablation, "train_tokenizer", whole)
    measured = ablation.measured
    names = []
    monkeypatch.setattr(
        ablation, "measured", lambda model, *rest: names.append(model.config.scales) or measured(model, *rest)
    )
    main(arguments)
    assert (out / "distilled" / "tokenizer.ckpt").stat().st_mtime_ns == first
    assert names == [(16,), (1, 2, 4, 8, 16)], "the first row was measured before the stop"

    said = capsys.readouterr().out
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [r["tokens"] for r in rows.values()] == [256, 256, 341]
    assert all(r["steps"] == 2 and 0 < r["codes used"] <= 1 and r["ST-LPIPS"] is None for r in rows.values())
    assert rows["distilled"]["parameters"] < rows["shared"]["parameters"] == rows["multi-scale"]["parameters"]
    for name, row in rows.items():
        model = TokenFlow.from_pretrained(out / name / "tokenizer")
        assert model.config == replace(PRESETS["tokenflow-tiny"], **ablation.VARIANTS[name].changes)
        assert row["title"] in said
    page = (out / "index.html").read_text()
    sources = re.findall(r"<img[^>]*src='([^']*)'", page)
    held_out = min(ablation.SHOWN, len(set(sources)))
    assert len(sources) % 4 == 0 and held_out > 1 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "<script" not in page and "https://" not in page and all(r["title"] in page for r in rows.values())


def rows_of(*numbers):
    empty = dict.fromkeys(("teacher cosine", "tokens", "codes used", "perplexity", "steps", "seconds"), 0)
    return {
        name: ablation.Row(variant, {**empty, **values}, torch.zeros(0))
        for (name, variant), values in zip(ablation.VARIANTS.items(), numbers, strict=True)
    }


def test_the_verdict_says_what_came_out():
    values = [(20.0, 0.3, 0.02, 0.50), (22.0, 0.2, 0.01, 0.52), (24.0, 0.1, 0.005, 0.51)]
    same = rows_of(*({"PSNR": p, "ST-LPIPS": s, "KID": k, "probe": a} for p, s, k, a in values))
    assert len(verdict(same)) == 2 and "the same order." in verdict(same)[0] and "about equal too" in verdict(same)[1]
    same["multi-scale"].numbers.update(KID=0.015, probe=0.40)
    said = verdict(same)
    assert "not the same order in KID." in said[0] and "worse than the first by 0.100" in said[1] and len(said) == 3
    for row in same.values():
        row.numbers.update({"ST-LPIPS": None, "probe": None})
    assert "ST-LPIPS" not in verdict(same)[0] and "Understanding" not in " ".join(verdict(same))
    lines = table(same).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "24.00" in lines[3]


def test_one_codebook_is_a_value_of_the_config(tmp_path):
    """The pixel decoder reads the semantic codes, and its loss reaches the one encoder."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    small = Config(codebook_size=64, widths=(8, 16, 32), teacher_dim=8, pixel_dim=0, scales=(4, 16), kmeans_init=True)
    model = TokenFlow(small)
    assert model.encode_features(images).shape == (2, 24, 16, 16) and len(model.quantizer.codebooks()) == 1
    with torch.no_grad():  # the decoder's branches start at zero
        model.pixel_decoder[-2].weight.normal_()
    before = model.quantizer.codebooks()[0].clone()
    out = model(images)
    assert out.images.shape == images.shape and out.semantic.shape == (2, 8, 8, 8) and out.indices.shape == (2, 272)
    assert not torch.equal(model.quantizer.codebooks()[0], before), "k-means placed the codes"
    out.images.square().mean().backward()
    assert model.semantic_encoder.body[1].weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    again = TokenFlow.from_pretrained(tmp_path)
    assert again.config == small and torch.equal(again.reconstruct(images), model.reconstruct(images))
