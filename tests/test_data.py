"""Reading pictures: folders, captions, the emoji tarballs, the split, and what is said when something is missing."""

import contextlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from drawn import drawn_folder
from PIL import Image
from tokenflow.data import Pictures, emoji, fluent_emoji, image_folder
from tokenflow.data.entries import Entry, caption_of, data_set
from tokenflow.data.folder import bases_of
from tokenflow.data.loading import Crop
from tokenflow.data.pictures import hide_pairs, opened, read_picture, split_by_base
from tokenflow.errors import Missing
from tokenflow.models import ImageProcessor

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}


def encoded(colour, size=(40, 40), form="PNG", alpha=255):
    buffer = io.BytesIO()
    Image.new("RGBA", size, (*colour, alpha)).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def make_folder(path, count=36):
    path.mkdir()
    for i in range(count):
        name, colour = list(COLOURS.items())[i % 3]
        (path / f"{name}_square-{i:02d}.png").write_bytes(encoded(colour))
    return path


def test_read_picture_composites_on_white_and_cuts_the_centre_square():
    clear = read_picture(encoded((0, 0, 0), alpha=0))
    assert clear.shape == (3, 64, 64) and clear.dtype == torch.uint8 and (clear == 255).all()
    wide = Image.new("RGB", (120, 40), "white")
    wide.paste((255, 0, 0), (0, 0, 40, 40))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    assert (read_picture(buffer.getvalue(), 20) == 255).all()


def test_sixteen_bits_of_grey_become_eight():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    read = read_picture(content.getvalue(), 16)
    assert torch.equal(read, torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16))
    assert torch.equal(ImageProcessor(16).pixels(Image.open(content)), read)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


GREY16 = Image.fromarray(np.full((20, 20), 200 * 257, dtype=np.uint16))
RED = Image.new("RGB", (20, 20), (250, 40, 10))


@pytest.mark.parametrize(("content", "wanted"), [
    (saved(RED.convert("CMYK"), "JPEG"), (250, 40, 10)),
    (saved(RED.convert("CMYK"), "TIFF"), (250, 40, 10)),
    (saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), (250, 40, 10)),
    (saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=0), (255, 255, 255)),
    (saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=bytes([128] * 256)), (252, 147, 132)),
    (saved(RED, "PNG", transparency=(250, 40, 10)), (255, 255, 255)),
    (saved(Image.new("LA", (20, 20), (0, 128)), "PNG"), (127, 127, 127)),
    (saved(Image.new("1", (20, 20), 0), "PNG"), (0, 0, 0)),
    (saved(GREY16, "PNG"), (200, 200, 200)),
    (saved(GREY16, "TIFF"), (200, 200, 200)),
    (saved(GREY16.convert("I"), "PPM"), (200, 200, 200)),
    (saved(GREY16, "PNG", transparency=300), (200, 200, 200)),
    (saved(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")]), (250, 40, 10)),
    (saved(RED, "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")]), (250, 40, 10)),
    (saved(Image.new("RGB", (1, 1), "green"), "PNG"), (0, 128, 0)),
    (saved(Image.new("RGB", (1, 3000), "green"), "PNG"), (0, 128, 0)),
])  # fmt: skip
@pytest.mark.parametrize("resize", ["area", "bicubic"])
def test_pictures_of_every_kind(resize, content, wanted):
    found = Crop((16, 16), resize)(content).float().flatten(1).mean(1)
    assert (found - torch.tensor(wanted)).abs().max() < 4


def test_values_of_unknown_range_are_no_picture():
    for values in (np.ones((9, 9), dtype=np.float32), np.ones((9, 9), dtype=np.int32)):
        with pytest.raises(OSError, match="broken picture: wanted a picture of 8 or 16 bits, got 32"):
            read_picture(saved(Image.fromarray(values), "TIFF"))
        with pytest.raises(ValueError, match="wanted a picture of 8 or 16 bits"):
            ImageProcessor(8)(Image.fromarray(values))


def test_warnings_about_metadata_stay_away(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    read_picture(saved(RED, "PNG"))
    assert not recwarn.list


# The corner of the upright picture whose red quarter each orientation stores at the top left.
CORNERS = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left",
           5: "top left", 6: "top right", 7: "bottom right", 8: "bottom left"}  # fmt: skip


def turned(orientation, form, side=(48, 32)):
    """A file whose upper left quarter is red as stored, and which says how it is to be turned."""
    image = Image.new("RGB", side, "blue")
    image.paste((255, 0, 0), (0, 0, side[0] // 2, side[1] // 2))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_pictures_stand_upright(orientation, form):
    content = turned(orientation, form)
    shown = opened(content)
    assert shown.size == ((48, 32) if orientation < 5 else (32, 48)) and shown.mode == "RGB"
    size = shown.size[::-1]
    for read in (
        read_picture(content, size),
        Crop(size, "bicubic")(content),
        ImageProcessor(size).pixels(Image.open(io.BytesIO(content))),
    ):
        red = read[0].float() - read[2].float() > 0
        rows, columns = (red.float().mean(d) for d in (1, 0))
        high, left = (
            rows[: size[0] // 2].sum() > rows[size[0] // 2 :].sum(),
            columns[: size[1] // 2].sum() > columns[size[1] // 2 :].sum(),
        )
        assert f"{'top' if high else 'bottom'} {'left' if left else 'right'}" == CORNERS[orientation]
        assert float(red.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_torn_exif_is_no_broken_picture():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "JPEG", exif=b"Exif\0\0II*\0nonsense that ends")
    assert (read_picture(buffer.getvalue(), 8)[0] > 250).all()


def test_a_picture_too_large_to_be_true_is_an_os_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match="picture too large: 1600 pixels, more than 200 "):
        read_picture(encoded((1, 2, 3)))


@pytest.mark.parametrize("content", [b"", b"not a picture", encoded((1, 2, 3))[:60], b"GIF89a\x00"])
def test_a_broken_picture_is_an_os_error(content):
    with pytest.raises(OSError):
        read_picture(content)


def test_folder_captions_from_names_and_broken_pictures_named(tmp_path):
    folder = make_folder(tmp_path / "in")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "cut.jpg").write_bytes(encoded((5, 5, 5))[:70])
    pictures = image_folder(folder)
    assert len(pictures) == 36 and set(pictures.captions) == {"red square", "green square", "blue square"}
    assert [s.split(":")[0] for s in pictures.skipped] == ["broken.png", "cut.jpg"]
    assert pictures.images.shape == (36, 3, 64, 64)
    row = pictures.captions.index("red square")
    assert pictures.images[row, :, 5, 5].tolist() == list(COLOURS["red"])


def test_folder_captions_from_csv_and_groups_from_sub_folders(tmp_path):
    folder = make_folder(tmp_path / "in")
    (folder / "shapes").mkdir()
    (folder / "shapes" / "x.png").write_bytes(encoded((9, 9, 9)))
    (folder / "captions.csv").write_text("file,caption\nshapes/x.png,a grey thing\nred_square-00.png,first\n")
    pictures = image_folder(folder)
    assert {"a grey thing", "first"} <= set(pictures.captions)
    assert pictures.groups[pictures.captions.index("a grey thing")] == "shapes"


@pytest.mark.parametrize(("make", "kind", "words"), [
    (lambda p: p / "absent", FileNotFoundError, "does not exist"),
    (lambda p: (p / "file.txt").write_text("x") and p / "file.txt", ValueError, "got the file"),
    (lambda p: make_folder(p / "few", 3), ValueError, "at least 32 readable pictures, got 3"),
    (lambda p: (make_folder(p / "csv") / "captions.csv").write_text("name,text\n") and p / "csv", ValueError, "columns file and caption, got name, text"),
    (lambda p: (make_folder(p / "csv") / "captions.csv").write_bytes(b"file,caption\na,\xe9\n") and p / "csv", ValueError, "captions.csv: wanted a CSV file in UTF-8"),
])  # fmt: skip
def test_a_bad_folder_is_one_sentence(tmp_path, make, kind, words):
    with pytest.raises(kind, match=words) as caught:
        image_folder(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_written_among_the_pictures_is_none_of_them(tmp_path):
    folder = make_folder(tmp_path / "in")
    (folder / "runs").mkdir()
    (folder / "runs" / "result.png").write_bytes(encoded((9, 9, 9)))
    assert len(image_folder(folder, without=folder / "runs")) == 36 and len(image_folder(folder)) == 37


def test_caption_of_a_file_name():
    assert caption_of("red_apple-03") == "red apple" and caption_of("007") == "007"


def test_split_keeps_bases_together_and_every_group_in_both():
    bases = [f"base {i // 3}" for i in range(300)]
    groups = ["a" if i < 200 else "b" for i in range(300)]
    split = split_by_base(bases, groups)
    assert split == split_by_base(bases, groups)
    train, test = ({b for b, s in zip(bases, split, strict=True) if s == name} for name in ("train", "test"))
    assert not train & test and 0.05 < len(test) / 100 < 0.2
    assert {g for g, s in zip(groups, split, strict=True) if s == "test"} == {"a", "b"}


def test_classes_whose_pictures_have_one_caption_are_split_by_picture():
    """A tree like ImageNet's: the class is in every file's name, and the caption is what is left of it."""
    names = [f"n{c:08}" for c in range(12)]
    entries = [Entry(f"{name}/{name}_{i}.JPEG", "", group=name) for name in names for i in range(20)]
    entries += [
        Entry(f"mixed/{colour} thing {i}.png", "", group="mixed") for colour in ("red", "blue") for i in range(9)
    ]
    assert len({entry.text for entry in entries}) == 14
    split = split_by_base(bases_of(entries), [entry.group for entry in entries])
    held = [sum(s == "test" for s, e in zip(split, entries, strict=True) if e.group == name) for name in names]
    assert held == [2] * 12
    assert sorted(split[-18:-9] + split[-9:]) == ["test"] * 9 + ["train"] * 9 and len({*split[-9:]}) == 1


def test_hidden_pairs_leave_base_and_tone_in_training():
    tones = ["", "light", "medium", "dark"]
    bases, kinds = zip(*[(f"base {i}", t) for i in range(30) for t in tones], strict=True)
    split = hide_pairs(bases, kinds, ["train"] * 120, 9)
    hidden = [(b, t) for b, t, s in zip(bases, kinds, split, strict=True) if s == "pair"]
    assert len(hidden) == 9 and len({b for b, _ in hidden}) == 9 and "" not in {t for _, t in hidden}
    assert {t: sum(k == t for _, k in hidden) for t in tones[1:]} == {"light": 3, "medium": 3, "dark": 3}


def test_pictures_select_take_and_float():
    images = torch.arange(3 * 3 * 64 * 64).view(3, 3, 64, 64).remainder(256).byte()
    pictures = Pictures(images, ["a", "b", "c"], ["a", "b", "c"], [""] * 3, ["g"] * 3, ["train", "test", "pair"])
    assert pictures.select("train", "pair").captions == ["a", "c"] and pictures.rows("test").tolist() == [1]
    floats = pictures.float_images([2])
    assert floats.shape == (1, 3, 64, 64) and floats.min() >= -1 and floats.max() <= 1
    assert pictures.fingerprint() != pictures.take([0, 1]).fingerprint() == pictures.take([0, 1]).fingerprint()


def put(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_emoji_from_tarballs(tmp_path):
    webp = lambda colour: encoded(colour, (256, 256), "WEBP")  # noqa: E731
    table = {"\u2764\ufe0f": {"name": "red heart", "group": "Smileys"}, "\U0001f44b": {"name": "waving hand", "group": "People"},
             "#\ufe0f\u20e3": {"name": "keycap #", "group": "Symbols"}}  # fmt: skip
    put(tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz", {
        "assets/2764-fe0f.webp": webp((200, 0, 0)), "assets/1f44b.webp": webp((250, 200, 0)), "assets/1f44b-1f3ff.webp": webp((90, 60, 30)),
        "assets/0023-fe0f-20e3.webp": webp((0, 0, 200)), "assets/23-fe0f-20e3.webp": webp((0, 200, 0)),
        "assets/1f9ff.webp": webp((1, 1, 1)), "assets/1f44b-1f3fb.webp": b"broken", "README.md": b"x"})  # fmt: skip
    put(tmp_path / "unicode-emoji-json-0.9.0.tgz", {"data-by-emoji.json": json.dumps(table).encode()})
    pictures = fluent_emoji(tmp_path)
    assert pictures.captions == ["red heart", "waving hand", "waving hand, dark skin tone", "keycap #"]
    assert pictures.tones == ["", "", "dark", ""] and pictures.bases[2] == "waving hand"
    assert pictures.images[3, :, 30, 30].tolist() == [0, 0, 200]
    assert [s.split(":")[0] for s in pictures.skipped] == ["1f9ff.webp", "1f44b-1f3fb.webp"]


def test_without_npm_one_sentence_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Missing, match=r"npm is not on the PATH.*tokenflow demo --data DIR") as caught:
        fluent_emoji(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_failing_npm_is_one_sentence(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'first line' >&2\necho 'no such host' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(npm))
    with pytest.raises(Missing, match=r"could not fetch .*\(no such host\)") as caught:
        fluent_emoji(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_what_npm_was_killed_in_is_not_taken_for_the_package(tmp_path, monkeypatch):
    npm, name = tmp_path / "npm", "unicode-emoji-json-0.9.0.tgz"
    monkeypatch.setattr(emoji.shutil, "which", lambda name: str(npm))
    for code in (1, 0):
        npm.write_text(f"#!/bin/sh\necho whole > {name}\nexit {code}\n")
        npm.chmod(0o755)
        with contextlib.suppress(Missing):
            emoji.fetch(emoji.PACKAGES[1], tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ([] if code else [name])
    put(tmp_path / "cache" / "lobehub-fluent-emoji-3d-1.1.0.tgz", {})
    (tmp_path / "cache" / name).write_bytes(b"\x1f\x8b\x08\x00torn")
    with pytest.raises(Missing, match=r"are torn .*remove that folder's \*.tgz, or point the demo at a folder"):
        fluent_emoji(tmp_path / "cache")


def test_captions_beside_pictures_and_in_a_table(tmp_path):
    drawn_folder(tmp_path, 1)
    (tmp_path / "ring" / "red_ring-0.txt").write_text("a red ring \n")
    (tmp_path / "captions.csv").write_text("file,caption\nring/blue_ring-0.png,a blue one\n")
    found = {entry.key: entry for entry in data_set(tmp_path).entries}
    assert found["ring/red_ring-0.png"].caption == "a red ring"
    assert found["ring/blue_ring-0.png"].caption == "a blue one"
    assert found["ring/green_ring-0.png"].caption == "" and found["ring/green_ring-0.png"].text == "green ring"
    assert all(entry.read()[:4] == b"\x89PNG" for entry in found.values())


def test_tar_members_that_are_no_files_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        member = tarfile.TarInfo("x/real.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    (entry,) = data_set(tmp_path / "a.tar").entries
    assert entry.key == "a.tar/x/real.png" and entry.group == "x" and entry.read() == b"abc"


def test_links_to_folders_are_followed_once_and_those_in_the_tree_not(tmp_path):
    """Trees of classes are often links to where the pictures lie."""
    picture = encoded((1, 2, 3))
    for folder in ("elsewhere/a", "elsewhere/b", "data/c"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(picture)
    data = tmp_path / "data"
    for name, target in (
        ("a", "elsewhere/a"),
        ("again", "elsewhere/a"),
        ("inside", "data/c"),
        ("around", "."),
        ("b", "elsewhere/b"),
    ):
        (data / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "b" / "back").symlink_to(data)
    (tmp_path / "elsewhere" / "b" / "round").symlink_to(tmp_path / "elsewhere" / "b")
    assert [(e.key, e.group) for e in data_set(data).entries] == [("a/x.png", "a"), ("b/x.png", "b"), ("c/x.png", "c")]
    assert [e.key for e in data_set(data / "a").entries] == ["x.png"]


def test_what_leads_nowhere_is_named_and_ends_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded((1, 2, 3)))
    for name in ("a.txt", "b.tar"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    found = data_set(tmp_path)
    assert [(e.key, e.caption) for e in found.entries] == [("a.png", "")]
    assert found.broken == [
        "a.png: its caption cannot be read (No such file or directory)",
        "b.tar: broken behind 0 pictures (No such file or directory)",
    ]
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    assert data_set(tmp_path).broken[0] == "closed: Permission denied"
