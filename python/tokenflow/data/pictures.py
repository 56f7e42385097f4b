"""The picture set that every stage of the demo reads: images, captions and the split."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tokenflow.models.image_processor import as_shown

SIZE = 64
HELD_OUT = 0.115


@dataclass
class Pictures:
    """N pictures in memory, with what is known of each.

    Attributes:
        images: uint8 [N, 3, 64, 64], RGB on white.
        captions: one text a picture.
        bases: the name without its tone; the unit of the split, because tone variants are near-duplicates.
        tones: skin tone, "" where there is none.
        groups: class for the probe, "" where unknown.
        split: "train", "test" (base never trained on) or "pair" (base and tone are known apart from each other, their
            combination is not: hidden from the generator, not from the tokenizer).
        skipped: what could not be read, one sentence each.

    Example:
        >>> p = Pictures(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["a cat", "a dog"], ["cat", "dog"],
        ...              ["", ""], ["", ""], ["train", "test"])
        >>> len(p.select("test")), p.select("test").captions
        (1, ['a dog'])
    """

    images: Tensor
    captions: list[str]
    bases: list[str]
    tones: list[str]
    groups: list[str]
    split: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    def rows(self, *names: str) -> Tensor:
        """Positions of the pictures whose split is one of `names`: int64 [n]."""
        return torch.tensor([i for i, s in enumerate(self.split) if s in names], dtype=torch.int64)

    def one_per_base(self, *names: str) -> dict[str, int]:
        """base -> row of its picture without a tone, else of its first, among the pictures of those splits."""
        chosen: dict[str, int] = {}
        for row in self.rows(*names).tolist():
            if self.bases[row] not in chosen or not self.tones[row]:
                chosen[self.bases[row]] = row
        return chosen

    def take(self, rows: Tensor | Sequence[int]) -> Pictures:
        """The pictures at `rows` [n], in that order."""
        rows = [int(r) for r in rows]
        pick = lambda values: [values[r] for r in rows]  # noqa: E731
        return Pictures(
            self.images[rows],
            pick(self.captions),
            pick(self.bases),
            pick(self.tones),
            pick(self.groups),
            pick(self.split),
            list(self.skipped),
        )

    def select(self, *names: str) -> Pictures:
        """The pictures whose split is one of `names`."""
        return self.take(self.rows(*names))

    def float_images(self, rows: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """float32 [n, 3, H, W] in [-1, 1]."""
        return self.images[rows].float().div_(127.5).sub_(1.0)

    def fingerprint(self) -> str:
        """Twelve hex digits that name the images, captions and split."""
        digest = hashlib.sha256(self.images.contiguous().numpy().tobytes())
        digest.update("\n".join([*self.captions, *self.split]).encode())
        return digest.hexdigest()[:12]


def opened(source: Path | bytes) -> Image.Image:
    """The picture of a path, or of encoded bytes, as a viewer shows it (see `as_shown`); of an animation, the first frame.

    Raises:
        OSError: it is broken, too large to be true, or of an unknown format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torn metadata and large pictures, which are read all the same
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
                return as_shown(image)
    except UnidentifiedImageError:
        # Pillow's own words name the buffer's address, which differs from run to run.
        raise OSError("no picture of a known format") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise OSError(
            f"picture too large: {pixels[0] if pixels else error} pixels, more than {2 * Image.MAX_IMAGE_PIXELS} "
            "(twice PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except OSError:
        raise
    except Exception as error:  # decoders raise anything on torn files
        raise OSError(f"broken picture: {error}") from error


def read_picture(source: Path | bytes, size: int | tuple[int, int] = SIZE) -> Tensor:
    """One image as uint8 [3, h, w]: as shown on white, cropped to the shape around its centre, area-averaged down.

    Args:
        source: a path, or the encoded bytes.
        size: side of the result in pixels, or its height and width.

    Raises:
        OSError: the picture is broken or of an unknown format.
    """
    return fitted(opened(source), size if isinstance(size, tuple) else (size, size))


def fitted(
    image: Image.Image, size: tuple[int, int], share: float = 1.0, place: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """A crop of an RGB picture, resized by area (enlarged bicubically): uint8 [3, h, w].

    Args:
        image: the picture.
        size: h and w.
        share: side of the crop over that of the largest one of this shape.
        place: where between top and bottom, left and right the crop lies, in [0, 1].
    """
    height, width = size
    scale = min(image.width / width, image.height / height) * share
    crop = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = int((image.width - crop[0]) * place[1]), int((image.height - crop[1]) * place[0])
    image = image.crop((left, top, left + crop[0], top + crop[1]))
    if crop != (width, height):
        image = image.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def skipped_sentence(skipped: Sequence[str], *, most: int = 20) -> str:
    """How many pictures were left out, and which, `most` of them by name.

    >>> skipped_sentence(["a.png: broken"])
    '1 picture was skipped: a.png: broken'
    """
    named = "; ".join(skipped[:most]) + (f"; and {len(skipped) - most} more" if len(skipped) > most else "")
    return f"{len(skipped)} picture{' was' if len(skipped) == 1 else 's were'} skipped: {named}"


def stable_order(names: Sequence[str]) -> list[str]:
    """The distinct names in an order that looks random and is the same on every machine."""
    return sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())


def split_by_base(bases: Sequence[str], groups: Sequence[str], share: float = HELD_OUT) -> list[str]:
    """ "train" or "test" for each picture, so that no base name is in both.

    In every group the first `share` of the bases in `stable_order` is held out, and at least one where a group has two, so that
    each class of the probe has test pictures. The split depends on the names alone: numbers of two runs are about the same pictures.

    Args:
        bases: base name of each picture.
        groups: group of each picture.
        share: share of the base names that is held out.
    """
    by_group: dict[str, list[str]] = {}
    for base, group in zip(bases, groups, strict=True):
        by_group.setdefault(group, []).append(base)
    held_out = set()
    for names in by_group.values():
        order = stable_order(names)
        held_out.update(order[: max(len(order) > 1, round(share * len(order)))])
    return ["test" if base in held_out else "train" for base in bases]


def hide_pairs(bases: Sequence[str], tones: Sequence[str], split: Sequence[str], count: int) -> list[str]:
    """`split` with `count` toned training pictures marked "pair", at most one a base, the tones in turn.

    Every hidden base keeps its other tones in training and every hidden tone is trained on other bases.
    """
    split = list(split)
    rows = {(b, t): i for i, (b, t) in enumerate(zip(bases, tones, strict=True)) if t and split[i] == "train"}
    kinds = sorted({t for _, t in rows})
    hidden = 0
    for base in stable_order([b for b, _ in rows]):
        if hidden == count:
            break
        tone = kinds[hidden % len(kinds)]
        if (base, tone) in rows and sum((base, t) in rows for t in kinds) > 1:
            split[rows[base, tone]] = "pair"
            hidden += 1
    return split
