"""Pictures as PNG: inline for the page, and as one sheet for a README."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, SOFT, LINE = (28, 29, 34), (98, 101, 111), (227, 228, 233)


def pil_image(image: Tensor) -> Image.Image:
    """A picture [3, H, W], uint8 or float in [-1, 1]."""
    if image.is_floating_point():
        image = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def data_uri(image: Tensor) -> str:
    """A picture [3, H, W] as the text of a PNG data URI."""
    buffer = io.BytesIO()
    pil_image(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet(rows: Sequence[tuple[str, Sequence[Tensor], Sequence[str]]], *, cell: int = 96) -> Image.Image:
    """Rows of pictures on white: each row has a heading, pictures [3, H, W] and a caption under each ("" for none).

    Args:
        rows: (heading, pictures, captions).
        cell: side of a picture in pixels.
    """
    gap, left = 10, 16
    columns = max(len(pictures) for _, pictures, _ in rows)
    heading, small = ImageFont.load_default(size=17), ImageFont.load_default(size=11)
    heights = [30 + cell + (34 if any(captions) else 6) + 8 for _, _, captions in rows]
    image = Image.new("RGB", (2 * left + columns * (cell + gap) - gap, sum(heights) + 20), "white")
    draw = ImageDraw.Draw(image)
    y = 12
    for (title, pictures, captions), height in zip(rows, heights, strict=True):
        draw.text((left, y), title, fill=INK, font=heading)
        for i, picture in enumerate(pictures):
            x = left + i * (cell + gap)
            image.paste(pil_image(picture).resize((cell, cell), Image.Resampling.BICUBIC), (x, y + 28))
            draw.rectangle((x - 1, y + 27, x + cell, y + 28 + cell), outline=LINE)
            if i < len(captions):
                draw.multiline_text(
                    (x, y + 31 + cell), wrapped(captions[i], small, cell), fill=SOFT, font=small, spacing=1
                )
        y += height
    return image


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 2) -> str:
    """The text in at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if not out[-1] or font.getlength(longer) <= width:
            out[-1] = longer
        elif len(out) < lines:
            out.append(word)
        else:
            out[-1] += " …"
            break
    return "\n".join(out)
