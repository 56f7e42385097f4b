"""The image processor: against its formula and against transformers, what it reads and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
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


def test_image_processor_is_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    ours = ImageProcessor(32)
    ours.save_pretrained(tmp_path)
    try:
        theirs = kind.from_pretrained(tmp_path)
        expected = theirs(picture(100, 64), return_tensors="pt").pixel_values
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    torch.testing.assert_close(ours(picture(100, 64)).pixel_values, expected, atol=1e-6, rtol=0)


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
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        ImageProcessor.from_pretrained("nowhere")
