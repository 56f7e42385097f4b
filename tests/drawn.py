"""Small drawn pictures for tests that need a data set."""

import io
import tarfile

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "orange": (240, 150, 20)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")


def draw(path, shape, colour, shift):
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    box = (12 + shift, 12, 50 + shift, 50)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(box[0], box[3]), (box[2], box[3]), (31 + shift, box[1])], fill=colour)
    elif shape == "cross":
        pen.line(box, fill=colour, width=9)
        pen.line((box[0], box[3], box[2], box[1]), fill=colour, width=9)
    else:
        pen.ellipse(box, outline=colour, width=8)
    image.save(path)


def drawn_folder(path, numbers=2):
    """Every shape in every colour, `numbers` times, in a folder a shape."""
    for shape in SHAPES:
        (path / shape).mkdir(parents=True)
        for name, colour in COLOURS.items():
            for number in range(numbers):
                draw(path / shape / f"{name}_{shape}-{number}.png", shape, colour, 3 * number)
    return path


def drawn_tar(path, folder, files):
    """A webdataset shard of pictures of a drawn folder: for each a member .png, .txt (caption) and .cls (class)."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            parts = {
                "png": (folder / file).read_bytes(),
                "txt": f"a {file.stem}".encode(),
                "cls": file.parent.name.encode(),
            }
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
