"""The documentation holds: its Python runs, its links lead somewhere, no public name is missing."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tokenflow_ext.compat
import tokenflow_ext.quantize
from tokenflow_ext.quantize import VectorQuantizer

ROOT = Path(__file__).parents[1]
QUANTIZERS = sorted((ROOT / "docs" / "quantizers").glob("*.md"))
PAGES = [*QUANTIZERS, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```(\w*)\n(.*?)```", re.S)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples(path: Path) -> list[str]:
    return [code for language, code in CODE.findall(path.read_text()) if language == "python"]


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", QUANTIZERS, ids=name)
def test_code_runs(path):
    blocks = examples(path)
    assert blocks or path.name == "index.md"
    for block in blocks:
        exec(compile(block, name(path), "exec"), {})


def test_code_of_living_codebooks_runs():
    """The examples of docs/codebooks.md, on a model that has what they take for granted."""
    model, sharded = nn.Module(), []
    model.encoder, model.quantizer = nn.Linear(8, 8), VectorQuantizer(8, 64, kmeans_init=True)
    given = {
        "torch": torch, "model": model, "many_images": torch.randn(256, 8),
        "fully_shard": lambda module, ignored_params: sharded.append(ignored_params),
    }  # fmt: skip
    placing, sharding = examples(ROOT / "docs" / "codebooks.md")
    exec(placing, given)
    assert not model.quantizer.codebook.needs_init
    exec(sharding, given)
    assert sharded == [set(model.quantizer.parameters())]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for link in LINK.findall(CODE.sub("", path.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name(path)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(path)}: {link}"


def test_every_public_name_has_a_page():
    text = "\n".join(path.read_text() for path in QUANTIZERS)
    names = [*tokenflow_ext.quantize.__all__, *(f"compat.{module}" for module in tokenflow_ext.compat.__all__)]
    missing = [n for n in names if not re.search(rf"\b{re.escape(n)}\b", text)]
    assert not missing


def test_every_page_is_in_the_index_and_has_a_picture():
    index = (ROOT / "docs" / "quantizers" / "index.md").read_text()
    for path in QUANTIZERS:
        if path.name == "index.md":
            continue
        assert f"({path.name})" in index, path.name
        if path.name != "compat.md":
            assert ".svg)" in path.read_text(), path.name


def test_pictures_are_small_and_drawn_by_the_script():
    folder = ROOT / "docs" / "quantizers"
    drawn = re.search(r"^PICTURES = \((.*?)\)", (folder / "pictures.py").read_text(), re.M | re.S)
    files = {path.stem: path for path in folder.glob("*.svg")}
    assert set(files) == set(re.findall(r"\w+", drawn[1]))
    for path in files.values():
        assert path.stat().st_size < 60_000, path


def test_code_of_training_runs(tmp_path):
    """docs/training.md's example, on a model of its own on pictures made here."""
    from training_runs import pictures

    given = {"pictures": pictures(tmp_path / "pictures"), "folder": tmp_path / "run"}
    (code,) = examples(ROOT / "docs" / "training.md")
    exec(code, given)
    assert (given["model_folder"] / "model.safetensors").exists()


def test_commands_of_training_are_read():
    """Every `tokenflow train` of docs/training.md, but the one that goes on."""
    from tokenflow.training.command import parse

    text = (ROOT / "docs" / "training.md").read_text()
    commands = re.findall(r"tokenflow train ((?!--resume)\S+ --data [^#\n]+)", text)
    assert len(commands) == 2
    assert [parse(command.split()).config.preset for command in commands] == ["tokenflow-tiny", "tokenflow-b"]
