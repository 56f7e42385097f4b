"""Pictures of any size as the images a tokenizer reads: what transformers calls an image processor, without torchvision.

resize the shorter side  ->  crop the centre  ->  x / 255  ->  (x - mean) / std
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tokenflow.files import write_whole

FILE = "preprocessor_config.json"
LONGEST = 32
"""Sides of the result that a resized picture is long at most before only its middle is computed."""


class Batch(dict):
    """A dict whose entries are attributes as well.

    Example:
        >>> Batch(pixel_values=torch.zeros(1)).to(torch.float64).pixel_values.dtype
        torch.float64
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, *args: Any, **keywords: Any) -> Batch:
        """Every tensor moved or converted as `Tensor.to` does."""
        return Batch({name: value.to(*args, **keywords) for name, value in self.items()})


class ImageProcessor:
    """Resize, crop and normalise to [-1, 1].

    Args:
        size: side of the images, or height and width.
        cover: side, or height and width, that the resized picture covers before the middle of it is cut out; by default `size`.
            A square one is the resized picture's shorter side.
        resample: a filter of Pillow; bicubic by default.
        image_mean: subtracted from values in [0, 1].
        image_std: divides the rest.

    Example:
        >>> processor = ImageProcessor(32)
        >>> processor(Image.new("RGB", (64, 48), "white")).pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        cover: int | Sequence[int] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"ImageProcessor: size: wanted a side, or height and width, got {size}")
        cover = self.size if cover is None else cover
        self.cover = (cover, cover) if isinstance(cover, int) else tuple(cover)
        if len(self.cover) != 2 or any(c < s for c, s in zip(self.cover, self.size)):
            raise ValueError(f"ImageProcessor: cover: wanted at least the size {self.size}, got {cover}")
        self.resample = Image.Resampling(resample)
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    def preprocess(self, images: Any, return_tensors: str = "pt") -> Batch:
        """Images as `pixel_values` [B, 3, H, W], float32.

        Args:
            images: one or a list of: a picture of Pillow (see `as_shown`), uint8 [3, H, W] (or a batch of them) as a
                tensor, uint8 [H, W, 3] as an array.
            return_tensors: "pt".

        Raises:
            TypeError, ValueError: something else.
        """
        if return_tensors != "pt":
            raise ValueError(f'ImageProcessor: return_tensors: wanted "pt", got {return_tensors!r}')
        if not isinstance(images, list | tuple) and not (hasattr(images, "ndim") and images.ndim == 4):
            images = [images]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.image_mean, self.image_std))
        if len(images) == 0:
            return Batch(pixel_values=torch.zeros(0, 3, *self.size))
        pixels = torch.stack([self.pixels(image) for image in images])
        return Batch(pixel_values=(pixels.float() / 255 - mean) / std)

    __call__ = preprocess

    def pixels(self, image: Any) -> Tensor:
        """One picture resized and cropped, uint8 [3, H, W], before it is normalised."""
        image, (height, width), (high, wide) = _picture(image), self.size, self.cover
        # Whole pixels as transformers counts them: the longer side is rounded down.
        if high * image.width >= wide * image.height:
            grown = (max(wide, high * image.width // image.height), high)
        else:
            grown = (wide, max(high, wide * image.height // image.width))
        left, top = (grown[0] - width) // 2, (grown[1] - height) // 2
        box = (left, top, left + width, top + height)
        if max(grown) > LONGEST * max(self.cover):  # of a line of pixels, the whole would fill the memory
            across, down = image.width / grown[0], image.height / grown[1]
            around = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            image = image.resize((width, height), self.resample, box=around)
        else:
            image = (image if grown == image.size else image.resize(grown, self.resample)).crop(box)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def __str__(self) -> str:
        """What is done to a picture, as a protocol says it.

        >>> str(ImageProcessor(256, cover=288, resample=Image.Resampling.BILINEAR))
        'resized to cover 288 x 288, centre crop 256 x 256, bilinear with antialiasing'
        """
        before = "" if self.cover == self.size else "resized to cover {} x {}, ".format(*self.cover)
        return f"{before}centre crop {self.size[0]} x {self.size[1]}, {self.resample.name.lower()} with antialiasing"

    def postprocess(self, images: Tensor) -> list[Image.Image]:
        """Pictures of Pillow from images [B, 3, H, W] of `decode`."""
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.image_mean, self.image_std))
        pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()
        return [Image.fromarray(p.permute(1, 2, 0).cpu().contiguous().numpy()) for p in pixels]

    def to_dict(self) -> dict[str, Any]:
        """The settings under transformers' names."""
        height, width = self.size
        high, wide = self.cover
        return {
            "image_processor_type": type(self).__name__,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": high} if high == wide else {"height": high, "width": wide},
            "resample": int(self.resample),
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageProcessor:
        """The processor that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder lacks preprocessor_config.json.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: folder: wanted a folder with {FILE}, got {folder}")
        values = json.loads(path.read_text())
        crop, cover = values["crop_size"], values["size"]
        cover = cover.get("shortest_edge") or (cover["height"], cover["width"])
        names = ("resample", "image_mean", "image_std")
        return cls((crop["height"], crop["width"]), cover=cover, **{name: values[name] for name in names})


def as_shown(image: Image.Image) -> Image.Image:
    """A picture of any mode as a viewer shows it on a white page: RGB, 8 bits, turned as its EXIF says, transparency filled.

    Raises:
        ValueError: its values have 32 bits.

    >>> camera = Image.new("RGB", (30, 20))
    >>> camera.getexif()[0x0112] = 6  # held upright
    >>> as_shown(camera).size, as_shown(Image.new("I;16", (1, 1), 128 * 257)).getpixel((0, 0))
    ((20, 30), (128, 128, 128))
    """
    image = _upright(_eight_bits(image))
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture in 8 bits, which Pillow would clip to white; any other as it is."""
    # Pillow reads a 16-bit PGM as "I", and older releases a 16-bit PNG.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        small = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        small.info.pop("transparency", None)  # a grey of 16 bits, which would be taken for one of 8
        return small
    if image.mode in ("I", "F"):
        raise ValueError(
            f"wanted a picture of 8 or 16 bits, got 32 (mode {image.mode}), whose black and white are not known"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # torn EXIF raises anything, and the pixels are there
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Tensor):
        image = image.movedim(0, -1).cpu().contiguous().numpy() if image.ndim == 3 else image
    if not isinstance(image, Image.Image):
        if not hasattr(image, "dtype") or str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3:
            what = f"{image.dtype} {list(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
            raise TypeError(
                f"ImageProcessor: images: wanted pictures of Pillow or uint8 with three channels, got {what}"
            )
        if image.shape[2] != 3:
            raise ValueError(f"ImageProcessor: images: wanted three channels, got an image {list(image.shape)}")
        image = Image.fromarray(image)
    return as_shown(image)
