"""`tokenflow evaluate`: one pass over a data set, every measure that the model, the data and the weights at hand allow."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.data.entries import DataSet, Entry, data_set, read_columns
from tokenflow.data.loading import Crop, loaded
from tokenflow.data.pictures import stable_order
from tokenflow.encoding import Running, digest
from tokenflow.errors import Missing
from tokenflow.evaluation.classes import ProbeMeter
from tokenflow.evaluation.distribution import DistributionMeter
from tokenflow.evaluation.features import LiteFeatures
from tokenflow.evaluation.inception import Inception, installed_weights
from tokenflow.evaluation.measure import Measure, Meter, PairMeter, Seen, rounded
from tokenflow.evaluation.reconstruction import psnr
from tokenflow.evaluation.ssim import WINDOW, ssim
from tokenflow.evaluation.usage import UsageMeter
from tokenflow.evaluation.words import TEMPLATES, WordsMeter
from tokenflow.losses import perceptual, st_lpips
from tokenflow.losses.perceptual import LPIPS
from tokenflow.losses.st_lpips import STLPIPS
from tokenflow.models import Tokenizer, UniTok
from tokenflow.models.text import TextTokenizer
from tokenflow.models.tokenizer import full
from tokenflow.models.unitok import grid_of

SHOWN = 24
FLOAT = "mean over the pictures, unrounded values"


@dataclass(frozen=True)
class Brought:
    """What the user brings, and how much is measured.

    Attributes:
        limit: pictures at most, the first in the order of a hash of their names; None for all.
        lpips: VGG16's weights and LPIPS's heads.
        inception: torch-fidelity's weight file; None looks where torch-fidelity puts it.
        words: tokenizer.json of the text tower.
        classes: CSV file with the columns class and name.
        templates: sentences around a class's name.
        probe: pictures in the linear probe at most, 0 for none.
    """

    limit: int | None = None
    lpips: tuple[Path, Path] | None = None
    inception: Path | None = None
    words: Path | None = None
    classes: Path | None = None
    templates: tuple[str, ...] = TEMPLATES
    probe: int = 10000

    def __post_init__(self) -> None:
        for name, value, least in (("limit", self.limit, 2), ("probe", self.probe, 0)):
            if value is not None and value < least:
                raise ValueError(f"evaluate: {name}: wanted at least {least}, got {value}")
        if not self.templates:
            raise ValueError("evaluate: templates: wanted at least one, got none")
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"evaluate: templates: wanted {{}} for the class in each, got {template!r}")


@dataclass
class Evaluation:
    """What was found.

    Attributes:
        model: its name as the user gave it, and `Tokenizer.summary`.
        protocol: what holds for every number: data, number of pictures, crop, reference, type.
        measures: the numbers.
        missing: a sentence about each measure that was not taken.
        skipped: a sentence about each picture that could not be read.
        shown: (name, original, reconstruction, dB) of some pictures, uint8 [3, H, W].
        hits: part of the tokens -> hits of each id [K].
        conditions: machine, versions, seconds.
    """

    model: dict[str, str]
    protocol: dict[str, str]
    measures: list[Measure]
    missing: list[str]
    skipped: list[str]
    shown: list[tuple[str, Tensor, Tensor, float]]
    hits: dict[str, Tensor]
    conditions: dict[str, str] = field(default_factory=dict)

    def common(self) -> str:
        """The protocol as a line."""
        return "; ".join(self.protocol.values())

    def text(self) -> str:
        """The numbers as JSON."""
        numbers = [{**asdict(m), "shown": str(m), "protocol": f"{self.common()}; {m.protocol}"} for m in self.measures]
        about = {name: getattr(self, name) for name in ("model", "protocol", "conditions", "missing", "skipped")}
        return json.dumps({**about, "measures": numbers}, indent=2) + "\n"

    def table(self) -> str:
        """The numbers as a terminal shows them: what holds for all, then one line each."""
        width = max(len(m.name) for m in self.measures)
        wide = max(len(str(m)) for m in self.measures)
        lines = [f"{name}: {value}" for name, value in {**self.model, **self.protocol}.items()]
        lines += [f"{m.name:<{width}}  {m!s:>{wide}}  {m.protocol}" for m in self.measures]
        return "\n".join([*lines, *(f"not measured: {m}" for m in self.missing)])


def meters(
    model: Tokenizer, entries: Sequence[Entry], brought: Brought, size: tuple[int, int]
) -> tuple[list[Meter], list[str]]:
    """What can be measured, and a sentence about each measure that cannot.

    Raises:
        FileNotFoundError, Missing, ValueError: a file that the user names does not hold what it should.
    """
    device = next(model.parameters()).device
    found: list[Meter] = [PairMeter("PSNR", psnr, f"range 1, {FLOAT}", "dB", 2)]
    missing = []
    if min(size) >= WINDOW:
        found.append(PairMeter("SSIM", ssim, f"range 1, uniform 7 x 7 window, {FLOAT}"))
        authors = lambda a, b: ssim(a, b, data_range=2.0)  # noqa: E731
        found.append(
            PairMeter("SSIM, range 2 as published", authors, f"range 2 on values in [0, 1], else the same, {FLOAT}")
        )
    else:
        missing.append(f"SSIM: needs sides of at least {WINDOW}")
    distances: list[tuple[str, nn.Module | None, int, str]] = [
        (
            "LPIPS (VGG16)",
            LPIPS.from_files(*brought.lpips) if brought.lpips else None,
            perceptual.SMALLEST,
            "--lpips TRUNK HEADS",
        ),
        ("ST-LPIPS (AlexNet)", STLPIPS.installed(), st_lpips.SMALLEST, "pip install --no-deps stlpips-pytorch"),
    ]
    for name, metric, smallest, way in distances:
        if min(size) < smallest:
            missing.append(f"{name}: needs sides of at least {smallest}")
        elif metric is None:
            missing.append(f"{name}: {way}")
        else:
            found.append(PairMeter(name, metric.to(device), FLOAT))
    weights = brought.inception or installed_weights()
    if weights is None:
        missing.append("rFID: --inception FILE with torch-fidelity's weights")
    else:
        network, file = Inception.from_file(weights).to(device), Path(weights).name
        found.append(
            DistributionMeter("rFID", network, f"FID's Inception at 299 x 299 with {file}, 2048 features, 8 bits")
        )
    try:
        lite = LiteFeatures(size, device)
        found.append(DistributionMeter("KID on EfficientNet-Lite0", lite, f"{lite}, 8 bits, cubic kernel", kernel=True))
    except Missing as error:
        missing.append(f"KID on EfficientNet-Lite0: {error}")
    found.append(UsageMeter(model))
    probe = ProbeMeter(model, entries, most=brought.probe)
    if probe.possible:
        found.append(probe)
    elif brought.probe:
        missing.append("linear probe: needs two classes (sub-folders, or .cls in shards) of several pictures each")
    if isinstance(model, UniTok):
        if brought.words is None:
            missing.append("zero-shot and retrieval: --words FILE with CLIP's tokenizer.json")
        else:
            names = read_columns(brought.classes, "class", "name") if brought.classes else {}
            words = TextTokenizer(brought.words, model.config.context)
            found.append(WordsMeter(model, words, entries, names, brought.templates))
    elif brought.words is not None:
        missing.append(f"zero-shot and retrieval: a {type(model).__name__} has no text tower")
    return found, missing


def chosen(data: DataSet, limit: int | None) -> list[Entry]:
    """The entries that take part, in their own order."""
    if limit is None or limit >= len(data.entries):
        return data.entries
    kept = set(stable_order([entry.key for entry in data.entries])[:limit])
    return [entry for entry in data.entries if entry.key in kept]


@torch.no_grad()
def evaluate_data_set(model: Tokenizer, name: str, data: Path, running: Running, brought: Brought) -> Evaluation:
    """One pass over the pictures of `data`, which are their own reference.

    Raises:
        FileNotFoundError: the data or a file of weights is missing.
        ValueError: no readable picture, or a file holds something else.
    """
    begun = time.perf_counter()
    found = data_set(data)
    entries, skipped = chosen(found, brought.limit), list(found.broken)
    about = {"file": name, **model.summary(), "digest": digest(model)}
    model, crop = running.place(model), Crop.of(model, running.resize)
    taken, missing = meters(model, entries, brought, crop.size)
    usage = next(meter for meter in taken if isinstance(meter, UsageMeter))
    wanted = set(stable_order([entry.key for entry in entries])[:SHOWN])
    shown, count = [], 0
    batches = [range(i, min(i + running.batch, len(entries))) for i in range(0, len(entries), running.batch)]
    with tqdm(total=len(entries), desc="evaluating", unit="picture") as bar:
        for rows, batch in zip(batches, loaded(entries, batches, crop, workers=running.workers), strict=True):
            skipped += batch.broken
            bar.update(len(rows))
            if not batch.rows:
                continue
            seen = round_trip(model, batch.rows, running.images(model, batch.images))
            for meter in taken:
                meter.update(seen)
            count += len(batch.rows)
            for place, row in enumerate(batch.rows):
                if entries[row].key in wanted:
                    one = slice(place, place + 1)
                    quality = float(psnr(seen.images[one], seen.originals[one]))
                    shown.append((entries[row].key, batch.images[place], rounded(seen.images[place]).cpu(), quality))
    if not count:
        reason = f", the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"evaluate: data: wanted at least one readable picture, got none in {data}{reason}")
    protocol = {
        "pictures": f"{count} of {data}"
        + (f", chosen by a hash of their names from {len(found.entries)}" if brought.limit else ""),
        "crop": str(crop),
        "reference": "the same pictures cropped",
        "type": f"{running.dtype} networks, float32 quantizer",
    }
    measures = []
    for meter in taken:
        numbers = meter.measures()
        measures += numbers
        if not numbers:
            missing.append(f"{meter.name}: too few readable pictures, or without classes or captions")
    conditions = {
        "torch": torch.__version__,
        "device": str(next(model.parameters()).device),
        "threads": str(torch.get_num_threads()),
        "seconds": f"{time.perf_counter() - begun:.1f}",
    }
    return Evaluation(about, protocol, measures, missing, skipped, shown, usage.hits, conditions)


@torch.no_grad()
def round_trip(model: Tokenizer, rows: list[int], images: Tensor) -> Seen:
    """Images, their tokens and what the tokens say, encoded once."""
    indices = model.encode(images)
    codes = model.codes(indices, grid_of(images)) if isinstance(model, UniTok) else model.codes(indices)
    return Seen(rows, images, full(model.decode_features(codes)).clamp(-1, 1), indices, codes)
