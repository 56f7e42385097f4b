"""The demo on a folder of small pictures, end to end: its page, going on after a stop, and the commands that use its result."""

import json
import re

import pytest
import tokenflow.demo as demo
import torch
from certified.residuals import compare
from drawn import drawn_folder
from PIL import Image
from tokenflow.cli import main
from tokenflow.data import image_folder
from tokenflow.models.precision import fast_dtype
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.report.charts import bar_chart, line_chart, ticks
from tokenflow.report.pixels import data_uri, sheet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = drawn_folder(tmp_path_factory.mktemp("pictures"))
    (path / "torn.png").write_bytes(b"\x89PNG nothing")
    return path


def random_teacher(images):
    """Stands in for the teacher, whose weights the tests do not need: a fixed random projection of patches."""
    patches = torch.nn.functional.unfold(images.float() / 255, 16, stride=16).view(len(images), -1, 4, 4)
    weight = torch.randn(patches.shape[1], 160, generator=torch.Generator().manual_seed(0))
    return torch.einsum("nchw,cd->ndhw", patches, weight / 30).bfloat16()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished demo: its plan and the page's text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "teacher_features", random_teacher)
        plan = demo.Plan(data=folder, out=tmp_path_factory.mktemp("runs") / "demo", steps=3)
        page = demo.run_demo(plan)
        yield plan, page.read_text()


def test_page_is_whole_and_needs_nothing_else(finished):
    plan, text = finished
    assert (
        "<script" not in text
        and "http://" not in text
        and "https://" not in text
        and "nan" not in re.sub(r"base64,[^']*", "", text)
    )
    sources = re.findall(r"<img[^>]*src='([^']*)'", text)
    assert len(sources) > 40 and all(s.startswith("data:image/png;base64,") for s in sources)
    for words in (
        "Reconstructions",
        "Coarse to fine",
        "Use of the codebook",
        "Training",
        "Captions find pictures",
        "Pictures from captions",
        "Numbers",
    ):
        assert f">{words}" in text
    assert "1 picture was skipped: torn.png" in text
    with Image.open(plan.out / "result.png") as image:
        assert image.width > 400 and image.height > 400


def test_numbers_are_written_with_their_conditions(finished):
    plan, text = finished
    numbers = json.loads((plan.out / "numbers.json").read_text())
    tokenizer = numbers["tokenizer"]
    assert len(tokenizer["psnr of prefixes"]) == 5 and tokenizer["psnr"] == tokenizer["psnr of prefixes"][-1]
    assert 0 < tokenizer["codebook use"] <= 1 and 1 <= tokenizer["perplexity"] <= 2048
    conditions = numbers["conditions"]
    assert conditions["tokenizer"]["steps"] == conditions["generator"]["steps"] == 3
    dtype = str(fast_dtype("cpu")).removeprefix("torch.")
    assert conditions["tokenizer"]["dtypes"] == conditions["generator"]["dtypes"] == [dtype]
    assert f"Trained the tokenizer in {dtype} and the generator in {dtype}." in text
    assert numbers["skipped"][0].startswith("torn.png")


def test_certified_search_on_the_residuals_of_its_model(finished, folder):
    plan, _ = finished
    model = TokenFlow.from_pretrained(plan.out / "tokenizer").eval()
    searched, rows = compare(model, image_folder(folder).float_images())
    # The model's own search, then seven of every row: three metrics of two tables and the shared index.
    assert rows == 40 * 341 and searched.int8 + searched.full >= 8 * rows and searched.int8 > 4 * rows, searched


def test_started_again_it_trains_nothing_anew(finished, monkeypatch):
    plan, _ = finished
    monkeypatch.setattr(demo, "teacher_features", lambda images: pytest.fail("computed again"))
    monkeypatch.setattr(demo, "tokens_of", lambda *_: pytest.fail("computed again"))
    before = [(plan.out / f"{name}.ckpt").stat().st_mtime_ns for name in ("tokenizer", "generator")]
    demo.run_demo(plan)
    assert before == [(plan.out / f"{name}.ckpt").stat().st_mtime_ns for name in ("tokenizer", "generator")]


def test_another_seed_in_the_same_folder_is_one_sentence(finished, capsys):
    plan, _ = finished
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--data", str(plan.data), "--out", str(plan.out), "--steps", "3", "--seed", "1"])
    assert caught.value.code == 1
    assert re.search(r"^tokenflow: tokenizer: .*seed 1 instead of 0.*$", capsys.readouterr().err, re.M)


def test_reconstruct_encode_and_generate(finished, folder, tmp_path, capsys):
    plan, _ = finished
    picture, model = str(folder / "ring" / "red_ring-0.png"), str(plan.out / "tokenizer")
    main(["reconstruct", picture, str(folder / "torn.png"), "--model", model, "--out", str(tmp_path / "r")])
    assert "1 picture was skipped" in capsys.readouterr().err
    with Image.open(tmp_path / "r" / "red_ring-0.png") as image:
        assert image.size == (128, 64)
    main(["encode", picture, "--model", model, "--out", str(tmp_path / "tokens.jsonl")])
    line = json.loads((tmp_path / "tokens.jsonl").read_text())
    assert line["scales"] == [1, 2, 4, 8, 16] and [len(s) for s in line["indices"]] == [1, 4, 16, 64, 256]
    for out in ("a", "b"):
        main(["generate", "red ring", "zebra", "--run-dir", str(plan.out), "--out", str(tmp_path / out), "--seed", "5"])
    assert "never seen: zebra" in capsys.readouterr().out
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["00-red-ring.png", "01-zebra.png"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_info_describes_the_model(finished, capsys):
    plan, _ = finished
    main(["info", "--model", str(plan.out / "tokenizer")])
    said = capsys.readouterr().out
    assert "M parameters" in said and "torch" in said


@pytest.mark.parametrize(("arguments", "words"), [
    (["demo", "--data", "no/such/folder"], "no/such/folder, which does not exist"),
    (["reconstruct", "absent.png"], "config.json"),
    (["encode", "absent.png"], "config.json"),
    (["generate", "a cat", "--run-dir", "absent"], "config.json"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 1 and words in said and "\n" not in said and said.startswith("tokenflow: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([c, "--help"] for c in ("demo", "ablation", "reconstruct", "encode", "evaluate", "generate", "info")),
    ],
)
def test_every_command_has_help(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0 and "usage: tokenflow" in capsys.readouterr().out


def test_charts_and_sheets():
    line = line_chart([(0, 1.0), (10, 0.5), (20, 0.25)], title="a & b", x_label="step", marks=[(10, "here")])
    assert line.startswith("<svg") and line.endswith("</svg>") and "a &amp; b" in line and line.count("<polyline") == 2
    assert bar_chart([3.0, 1.0], title="bars", labels=["x", "y"]).count("<rect") == 2
    assert line_chart([(0, 1.0)], title="one", x_label="step").endswith("</svg>")
    assert ticks(0, 100)[0] == 0 and ticks(0, 100)[-1] == 100 and len(ticks(-1e-3, 1e-3)) >= 3
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert data_uri(picture).startswith("data:image/png;base64,")
    assert (
        sheet([("title", [picture] * 3, ["a caption that is much too long for one narrow line of text"] * 3)]).size[0]
        > 300
    )
