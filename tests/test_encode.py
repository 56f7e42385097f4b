"""Data sets of folders and tar shards, and their tokens in shards: stopped by a kill, written by two ranks, read back."""

import contextlib
import json
import os
import signal
import tarfile
import time

import pytest
import safetensors.torch
import torch
from drawn import drawn_folder, drawn_tar
from PIL import Image
from tokenflow import encoding
from tokenflow.cli import main
from tokenflow.data.entries import Entry, data_set
from tokenflow.data.loading import Crop, Loaded, as_float, loaded
from tokenflow.data.pictures import read_picture
from tokenflow.data.tokens import read_tokens, start
from tokenflow.encoding import Running, batches, encode_data_set
from tokenflow.files import write_whole
from tokenflow.models import TokenFlow, UniTok
from tokenflow.models.unitok import Config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TokenFlow.from_preset("tokenflow-tiny").eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty pictures, and two files that are none."""
    path = drawn_folder(tmp_path_factory.mktemp("pictures"))
    (path / "ring" / "torn.png").write_bytes(b"\x89PNG nothing")
    (path / "cut.jpg").write_bytes((path / "ring" / "red_ring-0.png").read_bytes()[:150])
    return path


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(pictures, saved, tmp_path_factory):
    """An uninterrupted run of the command: seven shards of six pictures in batches of four."""
    out = tmp_path_factory.mktemp("tokens") / "whole"
    main(["encode", str(pictures), "--model", saved, "--out", str(out), "--shard-size", "6", "--batch", "4"])
    return out


def test_every_readable_picture_has_the_tokens_of_its_own(whole, pictures, model):
    shards = list(read_tokens(whole))
    keys = [key for shard in shards for key in shard.keys]
    assert [len(shard.keys) for shard in shards] == [6, 6, 5, 6, 5, 6, 6]
    assert keys == sorted(keys) and len(set(keys)) == 40
    assert sorted(s.split(":")[0] for shard in shards for s in shard.skipped) == ["cut.jpg", "ring/torn.png"]
    for shard in shards:
        assert shard.groups == [key.split("/")[0] for key in shard.keys] and shard.captions == [""] * len(shard.keys)
        images = torch.stack([read_picture(pictures / key, 64) for key in shard.keys])
        assert shard.indices.dtype == torch.int64 and torch.equal(shard.indices, model.encode(as_float(images)))
    about = json.loads((whole / "encode.json").read_text())
    assert about["pictures"] == 42 and about["shards"] == 7 and "centre crop 64 x 64" in about["crop"]


def forked(run, **environment):
    """A process of its own that runs, and ends without a word."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.environ.update(environment)
            run()
            status = 0
        os._exit(status)
    return child


def test_killed_in_the_middle_it_goes_on_and_the_shards_are_the_same(whole, pictures, model, tmp_path, monkeypatch):
    out, running = tmp_path / "out", Running(batch=4)
    encode, calls = model.encode, []

    def slow(images):
        calls.append(len(images))
        time.sleep(0.1)
        return encode(images)

    monkeypatch.setattr(model, "encode", slow)
    run = lambda: encode_data_set(model, pictures, out, running, shard_size=6)  # noqa: E731
    for wanted in (2, 4):
        child = forked(run)
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.safetensors"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert wanted <= len(list(out.glob("*.safetensors"))) < 7
        with pytest.raises(FileNotFoundError, match="all 7 shards.*goes on"):
            list(read_tokens(out))
    # What a kill between write and rename leaves behind.
    (out / "tokens-00006.safetensors.part").write_bytes(b"half of a shard")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    run()
    assert files(out) == files(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert sum(calls) <= 6 * (7 - len(before))
    done = len(calls)
    run()
    assert len(calls) == done and files(out) == files(whole)


def test_two_ranks_write_the_shards_of_one(whole, pictures, model, tmp_path):
    out = tmp_path / "out"
    run = lambda: encode_data_set(model, pictures, out, Running(batch=4), shard_size=6)  # noqa: E731
    children = [forked(run, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert files(out) == files(whole)


def test_ranks_that_begin_at_the_same_moment(tmp_path, monkeypatch):
    replace, waiting = os.replace, [1, 2]

    def late(temporary, path):
        # Another rank comes and goes between this one's write and its rename.
        if waiting:
            start(tmp_path, {"pictures": 3}, rank=waiting.pop())
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", late)
    start(tmp_path, {"pictures": 3}, rank=0)
    assert not waiting and [path.name for path in tmp_path.iterdir()] == ["encode.json"]


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    replace, renamed = os.replace, []

    def watched(temporary, path):
        assert not path.exists() and temporary.read_bytes() == b"all of it"
        renamed.append(path)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", watched)
    write_whole(tmp_path / "file", "all of it")
    assert renamed == [tmp_path / "file"] and (tmp_path / "file").read_bytes() == b"all of it"


def test_a_rank_writes_only_its_own(pictures, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    encode_data_set(model, pictures, tmp_path, Running(batch=4), shard_size=6)
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == [
        "tokens-00001.safetensors",
        "tokens-00004.safetensors",
    ]
    assert "rank 1 of 3: tokens of 11 pictures in 2 shards" in capsys.readouterr().out
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    monkeypatch.setattr(encoding, "loaded", lambda entries, batches, *_, **__: (
        Loaded([], torch.zeros(0, 3, 64, 64, dtype=torch.uint8), ["torn"] * len(rows)) for rows in batches
    ))  # fmt: skip
    encode_data_set(model, pictures, tmp_path, Running(batch=4), shard_size=6)  # another rank may have pictures
    assert "tokens of 0 pictures in 2 shards" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="RANK: wanted 0 to 2, for a WORLD_SIZE of 3, got 3"):
        encode_data_set(model, pictures, tmp_path, Running())


def test_workers_change_nothing(whole, pictures, model, tmp_path):
    encode_data_set(model, pictures, tmp_path / "out", Running(batch=4, workers=2), shard_size=6)
    assert files(tmp_path / "out") == files(whole)


def test_another_model_or_crop_in_the_same_folder_is_refused(whole, pictures, saved, capsys):
    before = files(whole)
    for change, words in (
        (["--resize", "bicubic"], "crop centre"),
        (["--dtype", "bfloat16"], "dtype bfloat16 instead"),
    ):
        with pytest.raises(SystemExit):
            main(
                [
                    "encode",
                    str(pictures),
                    "--model",
                    saved,
                    "--out",
                    str(whole),
                    "--shard-size",
                    "6",
                    "--batch",
                    "4",
                    *change,
                ]
            )
        assert words in capsys.readouterr().err
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="model [0-9a-f]{16} instead of"):
        encode_data_set(TokenFlow.from_preset("tokenflow-tiny"), pictures, whole, Running(batch=4), shard_size=6)
    assert files(whole) == before


def test_bfloat16_networks_keep_an_exact_quantizer(pictures, model, tmp_path):
    half = TokenFlow(model.config)
    half.load_state_dict(model.state_dict())
    encode_data_set(half, pictures, tmp_path, Running(dtype="bfloat16"))
    (shard,) = read_tokens(tmp_path)
    assert half.dtype == torch.bfloat16 and half.quantizer.codebooks()[0].dtype == torch.float32
    assert torch.equal(half.quantizer.codebooks()[0], model.quantizer.codebooks()[0])
    images = as_float(torch.stack([read_picture(pictures / key, 64) for key in shard.keys[:32]]))
    assert torch.equal(shard.indices[:32], half.quantizer.encode(half.encode_features(images).float()))


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory):
    """Two tar shards of ten pictures each."""
    path = tmp_path_factory.mktemp("shards")
    names = [p.relative_to(pictures) for p in sorted(pictures.rglob("*-0.png"))]
    drawn_tar(path / "a-000.tar", pictures, names[:10])
    drawn_tar(path / "a-001.tar", pictures, names[10:20])
    return path


def test_tar_shards_give_pictures_captions_and_classes(shards, pictures, saved, model, tmp_path):
    main(["encode", str(shards), "--model", saved, "--out", str(tmp_path / "out")])
    (shard,) = read_tokens(tmp_path / "out")
    names = sorted(pictures.rglob("*-0.png"))
    assert shard.keys == [f"a-00{i}.tar/{j:05d}.png" for i in range(2) for j in range(10)]
    assert shard.captions == [f"a {n.stem}" for n in names] and shard.groups == [n.parent.name for n in names]
    assert torch.equal(shard.indices, model.encode(as_float(torch.stack([read_picture(n, 64) for n in names]))))
    assert [e.key for e in data_set(shards / "a-001.tar").entries] == shard.keys[10:]


@pytest.mark.parametrize("harm", ["cut in data", "cut in header", "header", "no tar"])
def test_a_broken_shard_gives_what_can_be_read_and_is_named(harm, shards, tmp_path):
    content = bytearray((shards / "a-000.tar").read_bytes())
    fourth = data_set(shards / "a-000.tar").entries[3]
    if harm == "cut in data":
        content = content[: fourth.offset + 40]
    elif harm == "cut in header":
        content = content[: fourth.offset - 300]
    elif harm == "header":
        content[fourth.offset - 500 : fourth.offset - 100] = b"\xff" * 400
    else:
        content = b"\xff" * 2000
    (tmp_path / "b.tar").write_bytes(content)
    entries, broken = data_set(tmp_path)
    read = [batch for batch in loaded(entries, [[i] for i in range(len(entries))], Crop((64, 64)))]
    assert sum(len(batch.rows) for batch in read) == (0 if harm == "no tar" else 3)
    assert len(broken) == 1 and broken[0].startswith("b.tar: broken behind")


def test_a_folder_of_images_and_shards_gives_both(shards, pictures, tmp_path):
    (tmp_path / "more").mkdir()
    for shard in shards.iterdir():
        (tmp_path / "more" / shard.name).write_bytes(shard.read_bytes())
    for name in ("a.png", "more/b.png", "z.png"):
        (tmp_path / name).write_bytes(next(pictures.rglob("*-0.png")).read_bytes())
    (tmp_path / "z.txt").write_text("the last")
    with tarfile.open(tmp_path / "backup.tar", "w"):
        pass
    found = data_set(tmp_path)
    inside = [f"more/{entry.key}" for entry in data_set(shards).entries]
    assert [e.key for e in found.entries] == ["a.png", *inside, "more/b.png", "z.png"] and not found.broken
    assert found.entries[-1].caption == "the last" and found.entries[-2].group == "more"


def test_names_of_any_bytes(pictures, saved, tmp_path, capsys):
    content = next(pictures.rglob("*-0.png")).read_bytes()
    data = tmp_path / "data"
    data.mkdir()
    for name in (b"caf\xe9.png", "日本 ☃.PNG".encode(), b"x.heic"):
        (data / os.fsdecode(name)).write_bytes(b"torn" if name == b"x.heic" else content)
    main(["encode", str(data), "--model", saved, "--out", str(tmp_path / "tokens")])
    (shard,) = read_tokens(tmp_path / "tokens")
    assert sorted(shard.keys) == ["caf\\xe9.png", "日本 ☃.PNG"] and shard.skipped[0].startswith("x.heic: ")
    main(["encode", str(data / os.fsdecode(b"caf\xe9.png")), "--model", saved])
    assert '"indices"' in capsys.readouterr().out
    main(["reconstruct", str(data), "--model", saved, "--out", str(tmp_path / "r")])
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["caf\\xe9.png", "日本 ☃.png"]
    capsys.readouterr().out.encode()


def test_a_member_that_ends_early_is_an_error(shards, tmp_path):
    (tmp_path / "a.tar").write_bytes((shards / "a-000.tar").read_bytes())
    last = data_set(tmp_path).entries[-1]
    os.truncate(tmp_path / "a.tar", last.offset + 7)
    with pytest.raises(OSError, match=f"wanted {last.size} bytes of the shard, got 7"):
        last.read()


def test_grouped_ids_keep_their_shape(pictures, tmp_path, capsys):
    torch.manual_seed(0)
    unitok = UniTok(Config(
        image_size=64, widths=(4, 8), dim=16, depth=1, heads=2, groups=2, codebook_size=32, code_dim=8,
        projection_heads=2, embed_dim=12, text_width=16, text_heads=2, text_depth=1, context=9, vocabulary=40,
    )).eval()  # fmt: skip
    encode_data_set(unitok, pictures / "ring", tmp_path, Running(batch=3, resize="model"), shard_size=5)
    protocol = "resized to cover 72 x 72, centre crop 64 x 64, bilinear with antialiasing"
    assert json.loads((tmp_path / "encode.json").read_text())["crop"] == protocol in capsys.readouterr().out
    indices = torch.cat([shard.indices for shard in read_tokens(tmp_path)])
    assert indices.shape == (8, 2, 16) and unitok.decode(indices).shape == (8, 3, 64, 64)
    about = encoding.about_shard(tmp_path / "tokens-00000.safetensors")
    assert about["shapes"] == [[16], [16]]


@pytest.mark.parametrize(("arguments", "words"), [
    (lambda d: [d, d, "--out", "x"], "wanted one data set or several image files, got 2"),
    (lambda d: [d], "wanted a folder for the shards"),
    (lambda d: [f"{d}/empty", "--out", "x"], "wanted at least one picture, got none"),
    (lambda d: [f"{d}/broken", "--out", "x"], "wanted at least one readable picture, got none"),
    (lambda d: [f"{d}.tar", "--out", "x"], "got none in {d}.tar (data.tar: broken behind 0 pictures"),
    (lambda d: [d, "--out", f"{d}.tar"], "{d}.tar: File exists"),
    (lambda d: [f"{d}/red.png", "--out", d], "tokenflow: {d}"),
    (lambda d: [d, "--out", "x", "--shard-size", "0"], "shard_size: wanted at least 1, got 0"),
    (lambda d: [d, "--out", "x", "--batch", "0"], "batch: wanted at least 1, got 0"),
    (lambda d: [d, "--out", "x", "--workers", "-1"], "workers: wanted at least 0, got -1"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(arguments, words, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "empty").mkdir(parents=True)
    (tmp_path / "data" / "broken").mkdir()
    (tmp_path / "data" / "broken" / "torn.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "data.tar").write_bytes(b"no tar at all" * 99)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "data" / "red.png")
    folder = str(tmp_path / "data")
    with pytest.raises(SystemExit) as caught:
        main(["encode", *arguments(folder), "--model", saved])
    assert caught.value.code == 1 and words.replace("{d}", folder) in capsys.readouterr().err


def test_a_broken_shard_of_tokens_is_a_sentence_and_can_be_written_again(pictures, saved, tmp_path, capsys):
    command = ["encode", str(pictures), "--model", saved, "--out", str(tmp_path), "--shard-size", "7"]
    main(command)
    shard = next(iter(sorted(tmp_path.glob("tokens-*"))))
    good = shard.read_bytes()
    for broken in (good[:-5], b"", safetensors.torch.save({"indices": torch.zeros(1)})):
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=f"wanted a shard that tokenflow encode wrote, got {shard}"):
            list(read_tokens(tmp_path))
        with pytest.raises(SystemExit):
            main(command)
        assert str(shard) in capsys.readouterr().err
    shard.unlink()
    main(command)
    assert shard.read_bytes() == good


@pytest.mark.parametrize("content", ["[1", "[1]", "{}", '{"shards": "4"}', b"\xff"])
def test_another_encode_json_is_a_sentence(content, tmp_path):
    (tmp_path / "encode.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="tokens: wanted the encode.json of tokenflow encode, got"):
        read_tokens(tmp_path)
    with pytest.raises(
        ValueError, match="tokens: wanted the encode.json of tokenflow encode|folder or that of the same run"
    ):
        start(tmp_path, {"shards": 4})


def test_a_few_pictures_are_lines_as_the_options_say(saved, model, pictures, tmp_path, capsys):
    paths = [pictures / "cut.jpg", *sorted(pictures.rglob("*-0.png"))[:5]]
    found = []
    for options, crop, dtype in (
        ([], Crop((64, 64)), torch.float32),
        (["--resize", "bicubic", "--batch", "2", "--dtype", "bfloat16"], Crop((64, 64), "bicubic"), torch.bfloat16),
    ):
        main(["encode", *map(str, paths), "--model", saved, *options])
        said = capsys.readouterr()
        lines = [json.loads(line) for line in said.out.splitlines()]
        assert [line["file"] for line in lines] == [str(path) for path in paths[1:]]
        assert f"1 picture was skipped: {paths[0]}: " in said.err
        running = Running(dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
        twin = running.place(TokenFlow.from_pretrained(saved))
        images = as_float(torch.stack([crop(path.read_bytes()) for path in paths[1:]]))
        ids = torch.tensor([sum(line["indices"], []) for line in lines])
        # A batch of another size may round features otherwise.
        assert (ids == twin.encode(images)).float().mean() > 0.99
        found.append(ids)
    assert (found[0] == found[1]).float().mean() < 0.9
    with pytest.raises(SystemExit):
        main(["encode", str(tmp_path / "absent.png"), "--model", saved])
    assert "absent.png, which does not exist" in capsys.readouterr().err


def test_pictures_are_read_batch_by_batch(model, tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.new("RGB", (9, 9), "red").save(path)
    paths[2].write_bytes(b"torn")
    read = batches(model, [Entry.of(path) for path in paths], Running(batch=1), "reading")
    assert [e.path for e in next(read)[0]] == [str(paths[0])]
    paths[1].write_bytes(b"torn by now")
    assert [[e.path for e in found] for found, _ in read] == [[str(paths[3])]]
    assert "2 pictures were skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="wanted at least one readable picture"):
        list(batches(model, [Entry.of(paths[2])], Running(), "reading"))
