"""What a run shows: a bar with the time left, log.jsonl, tensorboard, and grids of pictures; of rank 0 alone."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenflow.data.loading import as_float
from tokenflow.errors import Missing
from tokenflow.files import replacing
from tokenflow.models import Tokenizer
from tokenflow.report.pixels import pil_image
from tokenflow.training.config import Config
from tokenflow.training.folder import Folder

ON_THE_BAR = ("loss", "psnr", "semantic", "contrastive", "perceptual", "adversarial")


class Monitor:
    """Bar, log and pictures.

    Args:
        config: of the run.
        folder: of the run.
        first: the step it goes on from.
        shown: whether this rank shows anything.

    Raises:
        Missing: tensorboard is asked for and not installed.
    """

    def __init__(self, config: Config, folder: Folder, first: int, shown: bool) -> None:
        self.config, self.folder, self.first, self.shown = config, folder, first, shown
        self.writer: Any = None
        if shown and config.log.tensorboard:
            check_tensorboard(config)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first + 1 if first else None)

    @contextlib.contextmanager
    def watching(self) -> Iterator[tqdm]:
        """The bar, in which to `update` a step."""
        total = self.config.optimizer.steps
        bar = tqdm(
            total=total, initial=self.first, desc="training", unit="step", disable=not self.shown, dynamic_ncols=True
        )
        try:
            with bar:
                yield bar
        finally:
            self._write(lambda writer: writer.close())

    def scalars(self, step: int, values: Mapping[str, float], bar: tqdm) -> None:
        """One line of the log."""
        if not self.shown:
            return
        bar.set_postfix_str(", ".join(f"{n} {values[n]:.3g}" for n in ON_THE_BAR if n in values), refresh=False)
        with _spared("the log"):
            self.folder.append({"step": step, **values})
        for name, value in values.items():
            self._write(lambda writer: writer.add_scalar(name, value, step))

    @torch.no_grad()
    def grid(self, step: int, model: Tokenizer, samples: Tensor) -> None:
        """Originals above their reconstructions, as a PNG and in tensorboard.

        Args:
            step: in the name.
            model: in eval mode.
            samples: uint8 [n, 3, H, W].
        """
        if not (self.shown and len(samples)):
            return
        images = as_float(samples)
        device = next(model.parameters()).device
        decoded = torch.cat([model.reconstruct(image[None].to(device)).cpu() for image in images])
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in (images, decoded)], dim=1)
        path = self.folder.path / "pictures" / f"step-{step:08}.png"
        with _spared(str(path)):
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                pil_image(sheet).save(temporary, "PNG")
        picture = sheet.add(1).div(2).clamp(0, 1)
        self._write(lambda writer: writer.add_image("original above reconstruction", picture, step))

    def _write(self, call: Callable[[Any], None]) -> None:
        """What tensorboard's thread could not write, it raises in the next call, and in every one from then on."""
        if self.writer is None:
            return
        try:
            call(self.writer)
        except OSError as error:
            self.writer = None
            tell(f"tensorboard's files could not be written ({error}); the run goes on without them")


@contextlib.contextmanager
def _spared(what: str) -> Iterator[None]:
    """What cannot be written here is said; it must not end a run, whose checkpoints matter more."""
    try:
        yield
    except OSError as error:
        tell(f"{what} could not be written ({error})")


def tell(sentence: str) -> None:
    """A sentence on standard error, above the bar."""
    tqdm.write(f"tokenflow: {sentence}", file=sys.stderr)


def check_tensorboard(config: Config) -> None:
    """Raises Missing where tensorboard is asked for and not installed."""
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise Missing(
            "train: tensorboard is not installed: pip install tensorboard; --no-tensorboard trains without it"
        )
