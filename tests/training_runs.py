"""Minuscule training runs for the tests: models of a few thousand weights on pictures of 16 x 16 pixels."""

import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # what optimisers import when the first is made: forked children find it loaded
from PIL import Image
from tokenflow.training import engine
from tokenflow.training.config import Config
from tokenflow.training.engine import train
from tokenflow.training.recipes import RECIPES
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

MODELS = {
    "tokenflow-tiny": "image_size=16 scales=(1,2,4) widths=(16,16,16) codebook_size=16 semantic_dim=4 pixel_dim=4 teacher_dim=8",
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
        "save_every": 100, "pictures_every": 0, "pictures": 2, "tensorboard": False, "patchgan_width": 16, "patchgan_layers": 1,
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


def rank(config: Config, number: int, world: int, port: int, stop_at: int, keep: bool) -> None:
    """One rank of a run: leaves its weights in rank-NUMBER.pt beside the run's folder; at a step the last rank alone is told
    to stop."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    step = engine.Step.__call__

    def watched(self, at, batches):
        told = step(self, at, batches)
        if at + 1 == stop_at and number == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if keep:
            torch.save(self.bare.state_dict(), f"{config.out}-rank-{number}.pt")
        return told

    engine.Step.__call__ = watched
    with contextlib.suppress(KeyboardInterrupt):
        child(config)


def on_ranks(context, config: Config, world: int = 2, stop_at: int = 0, keep: bool = True) -> list[dict]:
    """Train on some gloo ranks; the weights of each when it ended, if they are kept."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = [context.Process(target=rank, args=(config, number, world, port, stop_at, keep)) for number in range(world)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(f"{config.out}-rank-{number}.pt", weights_only=True) for number in range(world) if keep]


@contextlib.contextmanager
def fork_server():
    """A context of processes whose server has imported everything: a run starts in a fraction of a second."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs"])
    try:
        yield context
    finally:
        multiprocessing.forkserver._forkserver._stop()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
