"""The command line: demo, train, ablation, reconstruct, encode, evaluate, generate, info."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tokenflow.errors import Missing
from tokenflow.memory import keep_freed_memory
from tokenflow.training import command as training

OUT = Path("runs/demo")


@dataclass
class RunOptions:
    """How the model runs over the pictures."""

    batch: int = 32
    """Pictures at once."""
    workers: int = 0
    """Processes that read and decode pictures; 0 does it in the main one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the networks; the quantizer always works in float32."""
    device: str | None = None
    """Where the model runs; by default this process's GPU where there is one."""
    resize: Literal["area", "bicubic", "model"] = "area"
    """How pictures are made small: averaged, bicubic, or as the model's authors do (UniTok: bilinear to 9/8, then the middle)."""


@dataclass
class Demo:
    """Train a tokenizer and a generator on real pictures in about ten minutes and write a page about them.

    The pictures are Fluent Emoji 3D, fetched through npm, or those of a folder. Stopped and started again with the same options,
    it goes on from its last checkpoint.
    """

    data: Path | None = None
    """Folder of images instead of the emoji; captions come from its captions.csv (columns file, caption) or from the file names."""
    out: Path = OUT
    """Folder for checkpoints, models, numbers.json, result.png and index.html."""
    cache: Path = Path(".cache/tokenflow")
    """Folder for fetched packages."""
    seconds: float = 370.0
    """Training time of the tokenizer."""
    generator_seconds: float = 230.0
    """Training time of the generator."""
    steps: int | None = None
    """Training steps of each, instead of the times: a second run then gives the same tokens."""
    seed: int = 0
    """Seed of everything random."""

    def run(self) -> None:
        from tokenflow.demo import Plan, run_demo

        run_demo(Plan(**vars(self)))


@dataclass
class Ablation:
    """Train the rows of the paper's ablation in small and write a table and a page about them.

    One distilled codebook, with shared mapping, with several scales: the same pictures, seed and training for each. Stopped and
    started again with the same options, it goes on from its last checkpoint.
    """

    data: Path | None = None
    """Folder of images instead of the emoji, as for the demo."""
    out: Path = Path("runs/ablation")
    """Folder for checkpoints, models, ablation.json and index.html."""
    cache: Path = Path(".cache/tokenflow")
    """Folder for fetched packages."""
    seconds: float = 240.0
    """Training time of each row."""
    steps: int | None = None
    """Training steps of each row, instead of the time."""
    seed: int = 0
    """Seed of everything random."""
    further: bool = False
    """Also train two rows that are not in the paper: both halves weighted 1, and the other start of the codebook."""

    def run(self) -> None:
        from tokenflow.ablation import Plan, run_ablation

        run_ablation(Plan(**vars(self)))


@dataclass
class Reconstruct:
    """Encode pictures, decode the tokens, and write original and reconstruction side by side."""

    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, folders, or tar shards."""
    model: str = str(OUT / "tokenizer")
    """Folder of a trained tokenizer, a released checkpoint file, or a name on the Hugging Face hub."""
    out: Path = Path("reconstructed")
    """Folder for the results, one PNG a picture, in sub-folders as the pictures are."""
    running: RunOptions = field(default_factory=RunOptions)

    def run(self) -> None:
        from tokenflow.commands import open_tokenizer
        from tokenflow.encoding import Running
        from tokenflow.reconstructing import reconstruct

        reconstruct(open_tokenizer(self.model), self.pictures, self.out, Running(**vars(self.running)))


@dataclass
class Encode:
    """Write the token ids of a data set as safetensors shards, or of a few pictures as JSON lines.

    A data set is a folder of images or of webdataset's tar shards, or one such shard. Stopped and started again, the command
    goes on behind the last whole shard; under torchrun every process writes its share of the shards. Of a few image files it
    writes one line a picture, one list a scale.
    """

    data: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A folder, a tar shard, or image files."""
    model: str = str(OUT / "tokenizer")
    """Folder of a trained tokenizer, a released checkpoint file, or a name on the Hugging Face hub."""
    out: Path | None = None
    """Folder for the shards; of image files, file for the lines, standard output without it."""
    shard_size: int = 1024
    """Pictures a shard: what a stop can lose at most."""
    running: RunOptions = field(default_factory=RunOptions)

    def run(self) -> None:
        from tokenflow.commands import encode
        from tokenflow.encoding import Running

        running = Running(**vars(self.running))
        encode(self.data, self.model, self.out, running, shard_size=self.shard_size)


@dataclass
class Evaluate:
    """Measure a tokenizer on a data set: one table, evaluation.json and a page with pictures.

    PSNR, SSIM, codebook use, and what data and weights at hand allow of ST-LPIPS, LPIPS, rFID, KID, a linear probe, zero-shot
    accuracy and retrieval. What decides about a number stands beside it; what is not measured is said, with a way to it.
    """

    data: Annotated[Path, tyro.conf.Positional]
    """A folder of images or of webdataset's tar shards, or one such shard; sub-folders are classes."""
    model: str = str(OUT / "tokenizer")
    """Folder of a trained tokenizer, a released checkpoint file, or a name on the Hugging Face hub."""
    out: Path = Path("runs/evaluation")
    """Folder for evaluation.json and index.html."""
    limit: int | None = None
    """Pictures at most, chosen by a hash of their names."""
    lpips: tuple[Path, Path] | None = None
    """torchvision's vgg16-397923af.pth and weights/v0.1/vgg.pth of the package lpips, for LPIPS."""
    inception: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for rFID; by default where torch-fidelity puts it."""
    words: Path | None = None
    """CLIP's tokenizer.json, for zero-shot accuracy and retrieval of a tokenizer with a text tower."""
    classes: Path | None = None
    """CSV file with the columns class (the sub-folder) and name (its words)."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences around a class's name."""
    probe: int = 10000
    """Pictures in the linear probe at most; 0 leaves it out."""
    running: RunOptions = field(default_factory=RunOptions)

    def run(self) -> None:
        from tokenflow.commands import evaluate
        from tokenflow.encoding import Running
        from tokenflow.evaluation.run import Brought

        running = Running(**vars(self.running))
        brought = Brought(self.limit, self.lpips, self.inception, self.words, self.classes, self.templates, self.probe)
        evaluate(self.data, self.model, self.out, running, brought)


@dataclass
class Generate:
    """Write pictures from captions, one PNG a caption."""

    captions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """What to paint; quote captions of several words."""
    run_dir: Path = OUT
    """Folder of a finished demo, with tokenizer and generator."""
    out: Path = Path("generated")
    """Folder for the results."""
    seed: int = 0
    """Seed of the sampling: the same seed gives the same tokens."""
    guidance: float | None = None
    """Strength of classifier-free guidance; the generator's default without it."""

    def run(self) -> None:
        from tokenflow.commands import generate

        generate(self.captions, self.run_dir, self.out, seed=self.seed, guidance=self.guidance)


@dataclass
class Info:
    """Say what is installed, and describe a checkpoint, or a trained tokenizer if there is one."""

    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    """A released checkpoint file, a folder of a tokenizer or a VAR, or a name on the Hugging Face hub."""
    model: str = str(OUT / "tokenizer")
    """Folder of a trained tokenizer, described where no checkpoint is named."""

    def run(self) -> None:
        from tokenflow.commands import info

        info(self.checkpoint or self.model, required=self.checkpoint is not None)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what the user can mend is one sentence on standard error and exit status 1."""
    # Threads that wait for each other by spinning lose a factor of ten where another process wants the same cores. OpenMP reads
    # this when torch is first imported, which the commands do.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    commands = {
        "demo": Demo,
        "train": training.Train,
        "ablation": Ablation,
        "reconstruct": Reconstruct,
        "encode": Encode,
        "evaluate": Evaluate,
        "generate": Generate,
        "info": Info,
    }
    alone, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["train"]:
            command = training.parse(arguments[1:])
        else:
            command = tyro.extras.subcommand_cli_from_dict(
                commands, prog="tokenflow", args=arguments, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
            )
        if alone and isinstance(command, Reconstruct | Encode | Evaluate):
            keep_freed_memory()
        command.run()
    except (Missing, OSError, ValueError) as error:
        # The system's own errors have a reason and a file; ours are sentences.
        named = isinstance(error, OSError) and error.strerror and error.filename
        print(f"tokenflow: {f'{error.filename}: {error.strerror}' if named else error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        hints = dict.fromkeys((Demo, training.Train, Ablation), "; the same command goes on from the last checkpoint")
        hints[Encode] = "; the same command goes on"
        hint = hints.get(type(command), "")
        print(f"tokenflow: stopped{hint}", file=sys.stderr)
        raise SystemExit(130) from None
