"""`tokenflow reconstruct`: of files, folders and shards, by any tokenizer, and where the results go."""

import io
import tarfile

import numpy as np
import pytest
import torch
from drawn import drawn_folder
from PIL import Image
from small_models import one_of_each
from tokenflow.cli import main
from tokenflow.data.entries import Entry, data_set
from tokenflow.data.loading import Crop, as_float
from tokenflow.evaluation.reconstruction import psnr
from tokenflow.reconstructing import targets

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    return one_of_each()


@pytest.fixture
def saved(models, tmp_path):
    models["tokenflow"].save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("kind", ["tokenflow", "vqvae", "unitok"])
def test_a_folder_with_every_kind_of_tokenizer(kind, models, tmp_path, capsys):
    model, data = models[kind], drawn_folder(tmp_path / "data", 1)
    (data / "ring" / "torn.png").write_bytes(b"torn")
    model.save_pretrained(tmp_path / "model")
    main(["reconstruct", str(data), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "r"), "--batch", "3"])
    said = capsys.readouterr()
    entries = [e for e in data_set(data).entries if "torn" not in e.key]
    assert sorted(p.relative_to(tmp_path / "r").as_posix() for p in (tmp_path / "r").rglob("*.png")) == [
        entry.key for entry in entries
    ]
    height, width = model.image_size
    originals = torch.stack([Crop(model.image_size)(entry.read()) for entry in entries])
    x = as_float(originals)
    y = model.reconstruct(x)
    for entry, original, image in zip(entries, originals, y, strict=True):
        both = torch.from_numpy(np.array(Image.open(tmp_path / "r" / entry.key))).permute(2, 0, 1)
        assert both.shape == (3, height, 2 * width) and torch.equal(both[:, :, :width], original)
        assert (both[:, :, width:].float() - ((image + 1) * 127.5)).abs().mean() < 1
    tokens = model.encode(x).shape[-1]
    assert (
        said.out.count(f" {tokens} tokens") == len(entries) + 1 and "1 picture was skipped: ring/torn.png" in said.err
    )
    quality = float(said.out.split("tokens each, ")[1].split(" dB")[0])
    assert quality == pytest.approx(float(psnr(y, x).mean()), abs=0.02)


def test_results_replace_no_picture_and_no_other(saved, tmp_path, capsys):
    for name in ("a.png", "b/a.png", "b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    for pictures, out, words in (
        (["a.png"], ".", "wanted a file of its own for"),
        (["a.png", "b/a.png"], "out", "wanted a file of its own for"),
        (["b/a.png", "a.png"], "b", "wanted a file of its own for"),
        (["b", "a.png"], "out", "wanted a file of its own for"),
        (["b"], "b", "wanted another folder than that of the pictures"),
    ):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        with pytest.raises(SystemExit) as caught:
            main(
                ["reconstruct", *(str(tmp_path / p) for p in pictures), "--model", saved, "--out", str(tmp_path / out)]
            )
        assert caught.value.code == 1 and words in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    main(["reconstruct", str(tmp_path / "b" / "c.jpg"), "--model", saved, "--out", str(tmp_path / "b")])
    assert (tmp_path / "b" / "c.png").is_file()


def test_pictures_of_one_name_keep_their_suffix(saved, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "a.jpg", "b.jpg"):
        Image.new("RGB", (9, 9), "red").save(data / name)
    main(["reconstruct", str(data), "--model", saved, "--out", str(tmp_path / "r")])
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["a.jpg.png", "a.png.png", "b.png"]
    Image.new("RGB", (9, 9), "red").save(data / "a.jpg.png")
    with pytest.raises(ValueError, match="wanted a file of its own"):
        targets(data_set(data).entries, tmp_path / "r")


def test_a_folder_with_the_results_of_before(saved, tmp_path, capsys):
    data = drawn_folder(tmp_path / "data", 1)
    command = ["reconstruct", str(data), "--model", saved, "--out", str(data / "results")]
    main(command)
    first = {path: path.read_bytes() for path in (data / "results").rglob("*.png")}
    main(command)
    assert {path: path.read_bytes() for path in (data / "results").rglob("*.png")} == first
    assert f"{len(first)} pictures in {data / 'results'}, where the results go, are left out" in capsys.readouterr().err


def test_members_of_a_tar_file_stay_in_the_folder(saved, tmp_path, capsys):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../../up.png", "/root.png", "in/side.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    main(["reconstruct", str(tmp_path / "a.tar"), "--model", saved, "--out", str(tmp_path / "x" / "y")])
    found = {p.relative_to(tmp_path / "x" / "y").as_posix() for p in (tmp_path / "x").rglob("*.png")}
    assert found == {"a.tar/up.png", "a.tar/root.png", "a.tar/in/side.png"} and not (tmp_path / "up.png").exists()
    assert "3 pictures in" in capsys.readouterr().out


def test_what_the_user_can_mend_is_one_sentence(saved, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"torn")
    for path, words in (
        ("absent", "which does not exist"),
        ("empty", "wanted at least one, got none in"),
        ("torn.png", "wanted at least one readable picture"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["reconstruct", str(tmp_path / path), "--model", saved, "--out", str(tmp_path / "r")])
        assert caught.value.code == 1 and words in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "r").exists()


def test_entries_of_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted image files, got .*, which does not exist"):
        Entry.of(tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError, match="wanted image files, got "):
        Entry.of(tmp_path)
