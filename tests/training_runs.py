"""Minuscule training runs for the tests: models of a few thousand weights on pictures of 16 x 16 pixels."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # what optimisers import when the first is made: forked children find it loaded
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from tokenflow.training.config import Config
from tokenflow.training.engine import train
from tokenflow.training.recipes import RECIPES

MODELS = {
    "tokenflow-tiny": "image_size=16 scales=(1,2,4) widths=(8,8,8) codebook_size=16 semantic_dim=4 pixel_dim=4 teacher_dim=8",
    "tokenflow-b": "image_size=32 scales=(1,2) tower.width=32 tower.depth=1 tower.heads=2 tower.hidden=64 tower.grid=2 "
    "widths=(32,32,32,32,32) decoder_widths=(32,32,32,32,32) latent=32 decoder_grid=2 decoder_depth=1 decoder_heads=2 "
    "codebook_size=32 encoder_blocks=1 decoder_blocks=1 teacher_dim=24",
    "unitok-b": "image_size=32 widths=(8,16) dim=32 depth=1 heads=2 groups=2 codebook_size=16 code_dim=8 projection_heads=4 "
    "embed_dim=24 text_width=16 text_heads=2 text_depth=1 vocabulary=99 context=8",
    "var-vqvae": "image_size=16 scales=(1,2,4) dim=4 codebook_size=16 widths=(32,32,32) encoder_blocks=1 decoder_blocks=1",
}
"""Fields of the presets' configs that make them small."""


def pictures(folder: Path, count: int = 24, side: int = 24, captions: bool = False) -> Path:
    """A folder of smooth random pictures, with a text file beside each where captions are wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        image = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((side, side + 4))
        image.save(folder / f"p{i:03}.png")
        if captions:
            (folder / f"p{i:03}.txt").write_text(f"picture {i % 5}")
    return folder


def vocabulary(path: Path) -> Path:
    """A tokenizer.json of a few words."""
    words = {"<|startoftext|>": 0, "picture": 1, "[UNK]": 2, **{str(i): 3 + i for i in range(10)}, "<|endoftext|>": 98}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


GROUPS = ("picture", "loss", "adversary", "optimizer", "log")


def small(preset: str, data: Path, out: Path, **changes) -> Config:
    """The preset's recipe on a minuscule model, without what needs files; `changes` are fields of any group."""
    config = RECIPES[preset]
    values = {
        "steps": 6, "batch": 4, "precision": "float32", "workers": 0, "perceptual": 0.0, "semantic": 0.0, "log_every": 1,
        "save_every": 2, "pictures_every": 0, "pictures": 2, "tensorboard": False, "patchgan_width": 16, "patchgan_layers": 1,
        "discriminator": "patchgan", "patchgan_norm": "group", "checkpointing": False, "cpu": True, **changes,
    }  # fmt: skip
    for name in GROUPS:
        group = getattr(config, name)
        own = {key: values.pop(key) for key in list(values) if hasattr(group, key)}
        config = replace(config, **{name: replace(group, **own)})
    model = (*MODELS[preset].split(), *values.pop("model", ()))
    return replace(config, data=data, out=out, model=model, **values)


def curve(out: Path) -> list[dict]:
    """The lines of a run's log, without what the clock decides."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pictures_per_second"} for line in lines]


def child(config: Config) -> None:
    """Train in a process of its own."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that a killed process leaves behind
    train(config)
