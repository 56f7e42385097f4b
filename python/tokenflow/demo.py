"""The demo: pictures in, a trained tokenizer, a trained generator and one page out.

    pictures -> teacher targets -> tokenizer -> tokens -> evaluation -> generator -> figures -> page

Every stage leaves one whole file under the output folder, so the same call after a stop goes on where it was. A file names what
it was made from and is made anew when that has changed.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenflow.data import Pictures, fluent_emoji, image_folder
from tokenflow.data.pictures import skipped_sentence
from tokenflow.evaluation.tokenizer import codes_of, evaluate, tokens_of
from tokenflow.files import write_whole
from tokenflow.generator.figures import figures
from tokenflow.generator.model import Generator
from tokenflow.generator.train import features_of, train_generator
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.report.page import write_page
from tokenflow.teacher import teacher_features, teacher_targets
from tokenflow.training.run import Stage, write_atomically
from tokenflow.training.tokenizer import train_tokenizer

PRESET = "tokenflow-tiny"


@dataclass(frozen=True)
class Plan:
    """What the demo is asked for.

    Attributes:
        data: a folder of images; None fetches Fluent Emoji 3D through npm.
        out: where everything is written.
        cache: where fetched packages lie.
        seconds: training time of the tokenizer.
        generator_seconds: training time of the generator.
        steps: training steps of each instead of the times, for a result that a second run repeats.
        seed: of everything random.
    """

    data: Path | None = None
    out: Path = Path("runs/demo")
    cache: Path = Path(".cache/tokenflow")
    seconds: float = 370.0
    generator_seconds: float = 230.0
    steps: int | None = None
    seed: int = 0


@dataclass
class Results:
    """Everything that the page shows."""

    plan: Plan
    pictures: Pictures
    model: TokenFlow
    stage: Stage
    indices: Tensor
    numbers: dict[str, Any]
    generator: Generator
    generator_stage: Stage
    figures: dict[str, Any]
    explained: float
    conditions: dict[str, Any] = field(default_factory=dict)


def cached(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """What `make` returned when `path` was written for `key`; made and written where it was not."""
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            return saved["value"]
    value = make()
    write_atomically({"key": key, "value": value}, path)
    return value


def run_demo(plan: Plan) -> Path:
    """Run or continue the demo; returns the page's path.

    Raises:
        Missing: npm or the teacher is missing.
        FileNotFoundError: the folder of images is missing.
        ValueError: the folder holds too few pictures, or the output folder belongs to another run.
    """
    start, times = time.perf_counter(), {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        before = time.perf_counter()
        value = make()
        times[name] = time.perf_counter() - before
        return value

    plan.out.mkdir(parents=True, exist_ok=True)
    pictures = timed(
        "reading pictures",
        lambda: fluent_emoji(plan.cache) if plan.data is None else image_folder(plan.data, without=plan.out),
    )
    print(
        f"{len(pictures)} pictures, {len(pictures.rows('test'))} of them held out; everything goes to {plan.out}",
        flush=True,
    )
    key = pictures.fingerprint()
    train = pictures.rows("train", "pair")

    features = timed(
        "teacher features", lambda: cached(plan.out / "teacher.pt", key, lambda: teacher_features(pictures.images))
    )
    targets, explained = teacher_targets(features, train)
    torch.manual_seed(plan.seed)
    model, stage = timed(
        "tokenizer",
        lambda: train_tokenizer(
            TokenFlow.from_preset(PRESET),
            pictures.images[train],
            targets[train],
            plan.out,
            seconds=plan.seconds,
            steps=plan.steps,
            seed=plan.seed,
            key=key,
        ),
    )
    model.save_pretrained(plan.out / "tokenizer")

    key = f"{key}-{plan.seed}-{stage.step}-{stage.elapsed:.3f}"
    indices = timed("tokens", lambda: cached(plan.out / "tokens.pt", key, lambda: tokens_of(model, pictures)))
    f_hat = codes_of(model, indices)
    torch.manual_seed(plan.seed)
    numbers = timed(
        "evaluation",
        lambda: cached(plan.out / "evaluation.pt", key, lambda: evaluate(model, pictures, indices, f_hat, targets)),
    )
    generator, generator_stage = timed(
        "generator",
        lambda: train_generator(
            model,
            pictures,
            indices,
            features_of(model, pictures),
            plan.out,
            plan.generator_seconds,
            plan.seed,
            steps=plan.steps,
            key=key,
        ),
    )
    generator.save_pretrained(plan.out / "generator")
    shown = timed("generator figures", lambda: figures(generator, model, pictures, indices, seed=plan.seed))

    results = Results(
        plan,
        pictures,
        model,
        stage,
        indices,
        numbers,
        generator,
        generator_stage,
        shown,
        explained,
        conditions(plan, stage, generator_stage, start, times),
    )
    page = write_page(results)
    write_numbers(results)
    if pictures.skipped:
        print(skipped_sentence(pictures.skipped))
    print(f"PSNR {numbers['psnr']:.2f} dB on {len(pictures.rows('test'))} held-out pictures; open {page}")
    return page


def conditions(
    plan: Plan, stage: Stage, generator_stage: Stage, start: float, times: dict[str, float]
) -> dict[str, Any]:
    """Under which the numbers were measured: machine, versions, steps, seconds and peak memory."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": plan.seed,
        "tokenizer": {"steps": stage.step, "seconds": stage.elapsed, "dtypes": stage.dtypes},
        "generator": {
            "steps": generator_stage.step,
            "seconds": generator_stage.elapsed,
            "dtypes": generator_stage.dtypes,
        },
        "seconds of this call": {**times, "all": time.perf_counter() - start},
        "peak memory, GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_numbers(results: Results) -> None:
    """numbers.json in the output folder, through a temporary name."""
    path = results.plan.out / "numbers.json"
    numbers = {name: value for name, value in results.numbers.items() if name != "found"}
    values = {
        "conditions": results.conditions,
        "tokenizer": numbers,
        "generator": results.figures["numbers"],
        "sampling": results.figures["sampling"],
        "skipped": results.pictures.skipped,
    }
    write_whole(path, json.dumps(values, indent=2) + "\n")
