"""The image processor: against its formula and against transformers, what it reads and what it refuses."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_unitok
from tokenflow.data.loading import Crop
from tokenflow.models import ImageProcessor


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (40, 90), (32, 32), (20, 25)])
def test_pictures_are_resized_cropped_and_normalised(width, height):
    image = picture(width, height)
    values = ImageProcessor(32)(image).pixel_values
    short = 32 / min(width, height)
    grown = image.resize((max(32, round(width * short)), max(32, round(height * short))), Image.Resampling.BICUBIC)
    left, top = (grown.width - 32) // 2, (grown.height - 32) // 2
    expected = np.asarray(grown, dtype=np.float64)[top : top + 32, left : left + 32] / 127.5 - 1
    torch.testing.assert_close(values[0].double(), torch.from_numpy(expected).permute(2, 0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "height"), [(100, 64), (101, 60), (33, 90), (200, 31), (41, 41), (32, 32), (20, 27)])
@pytest.mark.parametrize("kind", ["default", "unitok"])
def test_image_processor_is_transformers(kind, width, height, tmp_path):
    """UniTok's: bilinear to a shorter side of 36 = 32 * 9/8, then 32 x 32 of the middle; sizes whose longer side is rounded, too."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    ours = ImageProcessor(32) if kind == "default" else small_unitok(image_size=32).image_processor()
    assert ours.cover == ((32, 32) if kind == "default" else (36, 36))
    ours.save_pretrained(tmp_path)
    image = picture(width, height)
    try:
        expected = theirs.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    torch.testing.assert_close(ours(image).pixel_values, expected, atol=1e-6, rtol=0)
    again = ImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == ours.to_dict() and torch.equal(again(image).pixel_values, ours(image).pixel_values)


def test_unitoks_preprocessing_is_said_and_saved(tmp_path):
    model = small_unitok(image_size=256)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"shortest_edge": 288} and saved["crop_size"] == {"height": 256, "width": 256}
    assert saved["resample"] == Image.Resampling.BILINEAR
    words = "resized to cover 288 x 288, centre crop 256 x 256, bilinear with antialiasing"
    assert str(Crop.of(model, "model")) == words
    assert str(Crop.of(model, "bicubic")) == "centre crop 256 x 256, bicubic with antialiasing"
    assert str(Crop.of(model, "area")) == "centre crop 256 x 256, area-averaged"
    content = io.BytesIO()
    picture(300, 420).save(content, "PNG")
    crops = {resize: Crop.of(model, resize)(content.getvalue()) for resize in ("area", "bicubic", "model")}
    assert torch.equal(crops["model"], model.image_processor().pixels(picture(300, 420)))
    assert len({crop.numpy().tobytes() for crop in crops.values()}) == 3
    wide = small_unitok(image_size=(64, 96)).image_processor()
    assert wide.size == (64, 96) and wide.cover == (72, 108)
    wide.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path).cover == (72, 108)
    assert wide(picture(200, 50)).pixel_values.shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="Crop: processor: wanted the model's, of size"):
        Crop((64, 64), "model")


@pytest.mark.parametrize("side", [(50_000, 1), (1, 50_000), (1, 1), (30_000, 3)])
def test_a_line_of_pixels_does_not_fill_the_memory(side, monkeypatch):
    resize, made = Image.Image.resize, []

    def watched(self, size, *args, **keywords):
        made.append(size[0] * size[1])
        return resize(self, size, *args, **keywords)

    monkeypatch.setattr(Image.Image, "resize", watched)
    image = Image.new("RGB", side, "red")
    image.paste((0, 0, 255), (0, 0, side[0] // 2, side[1]))
    pixels = ImageProcessor(64, cover=72).pixels(image).float()
    assert pixels.shape == (3, 64, 64) and max(made) < 32 * 72 * 72
    if side == (50_000, 1):  # the border between blue and red, which is wider than the result, is in the middle of it
        assert pixels[2, :, 0].min() > 200 > 55 > pixels[2, :, -1].max()
        assert float(pixels[2, :, 31:33].mean()) == pytest.approx(127.5, abs=4)


def test_image_processor_reads_and_refuses():
    processor, image = ImageProcessor((16, 24)), picture(50, 40)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    values = processor([image, array, tensor]).pixel_values
    assert values.shape == (3, 3, 16, 24) and torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert torch.equal(processor(tensor[None]).pixel_values, values[:1]) and len(processor([]).pixel_values) == 0
    clear = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    assert processor(clear).pixel_values.min() == 1
    again = processor(processor.postprocess(values)).pixel_values
    assert torch.equal(again, values)
    for bad, kind in (
        (torch.zeros(3, 8, 8), TypeError),
        ("a.png", TypeError),
        (torch.zeros(4, 8, 8).byte(), ValueError),
    ):
        with pytest.raises(kind, match="ImageProcessor: images: wanted"):
            processor(bad)
    with pytest.raises(ValueError, match="return_tensors"):
        processor(image, return_tensors="np")
    with pytest.raises(ValueError, match="size"):
        ImageProcessor((1, 2, 3))
    with pytest.raises(ValueError, match="cover: wanted at least the size"):
        ImageProcessor(32, cover=31)
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        ImageProcessor.from_pretrained("nowhere")
