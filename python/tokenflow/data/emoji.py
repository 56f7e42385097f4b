"""Fluent Emoji 3D with captions, through the npm client: 3,372 rendered illustrations on white."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from tokenflow.data.pictures import Pictures, hide_pairs, read_picture, split_by_base
from tokenflow.errors import Missing

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "unicode-emoji-json@0.9.0")
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
VARIATION_SELECTOR = 0xFE0F
HIDDEN_PAIRS = 47
OR_A_FOLDER = "point the demo at a folder of images instead: tokenflow demo --data DIR"


def fluent_emoji(cache_dir: Path) -> Pictures:
    """Fetch the packages once and read the pictures straight from the tarballs.

    Pictures are 64 x 64, composited on white. Caption = name and skin tone ("scientist, dark skin tone"). About one base
    name in nine is held out, and 47 (base, tone) pairs are hidden from the generator.

    Args:
        cache_dir: where the tarballs lie, or are put.

    Raises:
        Missing: npm is missing or could not fetch a package, or a tarball is torn; one sentence that names a way out.

    Source: the npm packages @lobehub/fluent-emoji-3d (MIT) and unicode-emoji-json (MIT).
    """
    pictures, names = (fetch(package, cache_dir) for package in PACKAGES)
    try:
        return _read(pictures, names)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise Missing(
            f"the pictures in {cache_dir} are torn ({error}): remove that folder's *.tgz, or {OR_A_FOLDER}"
        ) from error


def _read(pictures: Path, names: Path) -> Pictures:
    """The pictures of two tarballs."""
    with tarfile.open(names) as tar:
        table = json.load(tar.extractfile("package/data-by-emoji.json"))
    known = {strip_selector(map(ord, emoji)): entry for emoji, entry in table.items()}
    images, bases, tones, groups, skipped = [], [], [], [], []
    seen = set()
    with tarfile.open(pictures) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".webp")]
        for member in tqdm(members, desc="reading pictures", unit="picture"):
            points = code_points(Path(member.name).stem)
            # Some files differ only in zero padding or in the variation selector.
            if points in seen:
                continue
            seen.add(points)
            toned = [p for p in points if p in TONES]
            entry = known.get(points) or known.get(tuple(p for p in points if p not in TONES))
            if entry is None:
                skipped.append(f"{Path(member.name).name}: no name is listed for it")
                continue
            try:
                images.append(read_picture(tar.extractfile(member).read()))
            except OSError as error:
                skipped.append(f"{Path(member.name).name}: {error}")
                continue
            bases.append(entry["name"])
            tones.append(TONES[toned[0]] if toned else "")
            groups.append(entry["group"])
    captions = [f"{base}, {tone} skin tone" if tone else base for base, tone in zip(bases, tones, strict=True)]
    split = hide_pairs(bases, tones, split_by_base(bases, groups), HIDDEN_PAIRS)
    return Pictures(torch.stack(images), captions, bases, tones, groups, split, skipped)


def fetch(package: str, cache_dir: Path) -> Path:
    """Path of the package's tarball in `cache_dir`, fetched by `npm pack` when it is not there yet.

    Raises:
        Missing: npm is missing, or it failed.
    """
    name, version = package.lstrip("@").replace("/", "-").rsplit("@", 1)
    tarball = cache_dir / f"{name}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise Missing(
            "the default pictures come from an npm package and npm is not on the PATH: install npm, or " + OR_A_FOLDER
        )
    cache_dir.mkdir(parents=True, exist_ok=True)
    # npm writes under the final name: what it was killed in must not be taken for the package.
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        done = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
        fetched = Path(folder, tarball.name)
        if done.returncode or not fetched.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Missing(f"npm could not fetch {package} ({reason}): check the network, or {OR_A_FOLDER}")
        fetched.replace(tarball)
    return tarball


def code_points(stem: str) -> tuple[int, ...]:
    """Code points of a file name such as "1f468-200d-1f4bb", without the variation selector.

    >>> code_points("0023-fe0f-20e3") == code_points("23-20e3")
    True
    """
    return strip_selector(int(part, 16) for part in re.split("[-_]", stem))


def strip_selector(points) -> tuple[int, ...]:
    """The points without U+FE0F, which only chooses between text and picture style."""
    return tuple(p for p in points if p != VARIATION_SELECTOR)
