"""What a training run is made of, as the command line shows it; nothing here imports torch.

Numbers called "steps or share" are steps from 1 on, and below 1 a share of the whole run: 0.01 of 50,000 steps are 500.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

FREE = {"data", "out", "steps", "workers", "accumulate", "log_every", "save_every", "pictures_every", "keep", "tensorboard", "cpu"}  # fmt: skip
"""What may change when a run goes on. The data may move: its pictures are compared by name."""


@dataclass(frozen=True)
class PictureConfig:
    """Pictures: how they are read."""

    crop: Literal["random", "centre"] = "random"
    """A random square (of the images' shape) in the picture, or its centre."""
    smallest_crop: float = 0.8
    """Smallest random crop, over the largest possible one."""
    flip: bool = True
    """Mirror every second picture."""
    words: Path | None = None
    """CLIP's tokenizer.json, for captions."""
    workers: int = 2
    """Processes a rank that read and decode pictures; 0 does it in the training process."""


@dataclass(frozen=True)
class LossConfig:
    """Loss: weights of the tokenizer's terms; one with weight 0 is not computed."""

    l1: float = 0.0
    """Of mean |x' - x|."""
    mse: float = 1.0
    """Of mean (x' - x)^2, pictures in [-1, 1]."""
    perceptual: float = 1.0
    """Of the perceptual distance."""
    metric: Literal["lpips", "st-lpips"] = "lpips"
    """The perceptual distance: LPIPS with VGG16 from two files (--lpips), or ST-LPIPS from the package stlpips-pytorch."""
    lpips: tuple[Path, Path] | None = None
    """torchvision's vgg16-397923af.pth and weights/v0.1/vgg.pth of the package lpips."""
    perceptual_from: float = 0.0
    """First step with a perceptual term, steps or share."""
    perceptual_pictures: int = 0
    """Pictures of each pass that it looks at, the first ones; 0 for all."""
    perceptual_side: int = 0
    """Smallest height of pictures with a perceptual term."""
    semantic: float = 0.0
    """Of the distillation of the teacher's features."""
    distillation: Literal["cosine", "l2"] = "cosine"
    """How the semantic decoder is compared with the teacher."""
    tower: Path | None = None
    """File of a CLIP, SigLIP or ViTamin. A frozen copy of it is the teacher; without --start, training starts from it as well."""
    quantizer: float = 1.0
    """Of the quantizer's loss, codebook and commitment."""
    entropy: float = 0.0
    """Of the entropy term inside the quantizer's loss."""
    entropy_temperature: float = 0.01
    """Of the softmax in the entropy term."""
    contrastive: float = 0.0
    """Of CLIP's loss between pictures and captions, against the negatives of all ranks."""
    reconstructed: float = 1.0
    """Share of each pass that is decoded; all are contrasted."""


@dataclass(frozen=True)
class AdversaryConfig:
    """Adversary: the discriminator and its game."""

    adversarial: float = 0.0
    """Weight of the tokenizer's adversarial term; 0 trains without a discriminator."""
    discriminator: Literal["patchgan", "dino"] = "patchgan"
    """PatchGAN, or heads on a frozen DINOv2 (--dino)."""
    patchgan_norm: Literal["batch", "group"] = "batch"
    """As published, or a norm with which a picture's value depends on no other picture."""
    patchgan_width: int = 64
    """Channels after PatchGAN's first convolution."""
    patchgan_layers: int = 3
    """How often PatchGAN halves the side."""
    dino: Path | None = None
    """Folder with a copy of facebook/dinov2-small."""
    game: Literal["hinge", "non_saturating"] = "hinge"
    """The adversarial losses."""
    discriminator_weight: float = 1.0
    """Of the discriminator's loss."""
    adversarial_from: float = 0.0
    """First step with an adversarial term and a discriminator that learns, steps or share."""
    adversarial_warmup: float = 0.0
    """Over which its weight rises, steps or share."""
    adaptive: tuple[float, float] | None = None
    """Limits of the adaptive weight, which makes both losses pull equally at the decoder's last layer."""
    blur: float = 0.0
    """Standard deviation in pixels of the blur that the discriminator first looks through."""
    blur_fade: float = 0.0
    """Over which the blur fades, steps or share."""
    augment: bool = False
    """Whether the tokenizer's step shows augmented reconstructions to the discriminator."""
    consistency: float = 0.0
    """Weight of the discriminator's consistency under augmentation."""
    cutout: float = 0.2
    """Side of the holes that the consistency cuts, over the picture's."""
    lecam: float = 0.0
    """Weight of the LeCam regulariser."""
    discriminator_rate: float = 1e-4
    """Learning rate of the discriminator."""
    discriminator_betas: tuple[float, float] = (0.9, 0.95)
    """Of its Adam."""
    discriminator_decay: float = 0.0
    """Its weight decay."""
    discriminator_clip: float = 1.0
    """Largest norm of its gradient; 0 does not clip."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer: steps, rates, precision."""

    steps: int = 1_000_000
    """Steps of the whole run."""
    batch: int = 256
    """Pictures a step, over all ranks and accumulated passes together."""
    accumulate: int = 1
    """Passes whose gradients make one step."""
    rate: float = 1e-4
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam."""
    eps: float = 1e-8
    """Of Adam."""
    weight_decay: float = 0.0
    """Decoupled, as AdamW does it; norms, biases and codebooks have none."""
    matrix_rate: float = 0.0
    """Learning rate of Muon, which then moves the weights of linear layers and convolutions in place of Adam; 0 for Adam alone."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    warmup: float = 0.0
    """Over which the learning rates rise, steps or share."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rates behind the warm-up."""
    floor: float = 0.0
    """Where the cosine ends, over its start."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the networks, by autocast; quantizers and losses work in float32. Auto is the run's own where one goes on, else bfloat16
    where the device has units for it."""
    average: float = 0.9999
    """Decay of the average of the weights, which is what is saved as the model; 0 saves the weights themselves."""
    revive_until: float = 0.0
    """First step at which dead codes are left alone, steps or share, where the codebook revives; 0 revives to the end."""
    checkpointing: bool = False
    """Recompute blocks in backward, where the model can: less memory, a third more work."""
    shard: bool = False
    """Shard weights, averages and moments over the ranks (FSDP2), where they do not fit on one."""
    cpu: bool = False
    """Train on the CPU though there is a GPU."""


@dataclass(frozen=True)
class LogConfig:
    """Log: what is written, and how often."""

    log_every: int = 50
    """Steps between two lines of log.jsonl."""
    save_every: int = 1000
    """Steps between two checkpoints: what a kill can lose at most."""
    keep: int = 2
    """Checkpoints that are kept."""
    pictures_every: int = 1000
    """Steps between two grids of originals and reconstructions; 0 draws none."""
    pictures: int = 8
    """Pictures in a grid."""
    tensorboard: bool = True
    """Write scalars and grids for tensorboard, too."""


@dataclass(frozen=True)
class Config:
    """A training run.

    Its folder (--out) holds config.json, log.jsonl, the newest checkpoints, pictures, and in `model` the averaged weights for
    `tokenflow reconstruct`, `encode` and `evaluate`. The same command again, or `tokenflow train --resume FOLDER`, goes on from
    the newest checkpoint, whatever ended the last one. Under torchrun every process takes its share of each batch.
    """

    preset: Annotated[str, tyro.conf.Suppress]
    """The model's preset."""
    data: Path = field(default=tyro.MISSING)
    """A folder of images or of webdataset's tar shards, or one such shard."""
    out: Path = Path("runs/train")
    """Folder of the run."""
    start: str | None = None
    """Start from a folder of ours, a released checkpoint file, or a name on the Hugging Face hub."""
    tune: Literal["all", "decoder"] = "all"
    """What trains; "decoder" is the pixel decoder alone, and takes another decoder than --start has."""
    model: tuple[str, ...] = ()
    """Other values in the model's config, such as image_size=256 scale_dropout=0."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    picture: PictureConfig = PictureConfig()
    loss: LossConfig = LossConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    log: LogConfig = LogConfig()

    def steps_of(self, value: float) -> int:
        """Steps of a number that is "steps or share".

        Example:
            >>> config = Config("tokenflow-tiny", Path("pictures"), optimizer=OptimizerConfig(steps=2000))
            >>> config.steps_of(20_000.0), config.steps_of(0.25), config.steps_of(0)
            (20000, 500, 0)
        """
        return round(value * self.optimizer.steps if value < 1 else value)

    def check(self) -> None:
        """Whatever can be said before a file is opened.

        Raises:
            ValueError: numbers out of range.
        """
        o, log, p = self.optimizer, self.log, self.picture
        least = {"steps": 1, "batch": 1, "accumulate": 1, "log_every": 1, "save_every": 1, "keep": 1, "pictures": 1}
        least |= {"workers": 0, "pictures_every": 0, "perceptual_pictures": 0}
        if self.seed < 0:
            raise ValueError(f"train: seed: wanted a number >= 0, got {self.seed}")
        for group in (o, log, p, self.loss, self.adversary):
            for f in fields(group):
                value = getattr(group, f.name)
                low = least.get(f.name, 0)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and not low <= value < math.inf:
                    raise ValueError(f"train: {f.name}: wanted a finite number >= {low}, got {value}")
        for name, value, low, high in (
            ("smallest_crop", p.smallest_crop, 0.01, 1), ("reconstructed", self.loss.reconstructed, 0.0, 1),
            ("average", o.average, 0, 0.999999999), ("floor", o.floor, 0, 1),
            *((n, b, 0, 0.999999999) for n in ("betas", "discriminator_betas")
              for b in (getattr(o, n, None) or getattr(self.adversary, n))),
        ):  # fmt: skip
            if not low <= value <= high:
                end = "1)" if high < 1 else "1]"
                raise ValueError(f"train: {name}: wanted a number in [{low}, {end}, got {value}")


def as_json(config: Any) -> str:
    """The config as JSON text, paths as strings."""
    return json.dumps(asdict(config), indent=2, default=str) + "\n"


def from_json(kind: type, values: Any, where: str = "") -> Any:
    """The config, or the value of a type in it, that `as_json` made this of.

    Raises:
        ValueError: it is none.

    Example:
        >>> config = Config("tokenflow-tiny", Path("pictures"), loss=LossConfig(lpips=(Path("a"), Path("b"))))
        >>> from_json(Config, json.loads(as_json(config))) == config
        True
    """
    if is_dataclass(kind):
        # A number that came later is not in older files: its default is what they did.
        needed = {f.name for f in fields(kind) if f.default is MISSING or is_dataclass(f.default)}
        if not isinstance(values, dict) or not needed <= set(values) <= {f.name for f in fields(kind)}:
            got = sorted(values) if isinstance(values, dict) else values
            raise ValueError(f"config.json: {where or kind.__name__}: wanted the fields of this version, got {got}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_json(hints[name], value, name) for name, value in values.items()})
    if isinstance(kind, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if values is None else from_json(kinds[0], values, where)
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)
        return tuple(from_json(of[0], value, where) for value in values)
    return kind(values) if kind in (Path, float, int) else values


def identity(config: Config) -> dict[str, Any]:
    """What makes a run what it is: every field that may not change when it goes on, without its preset; paths as strings.

    Example:
        >>> found = identity(Config("tokenflow-tiny", Path("pictures"), optimizer=OptimizerConfig(steps=5)))
        >>> found["rate"], "steps" in found, "data" in found
        (0.0001, False, False)
    """
    plain = (bool, int, float, str, tuple, type(None))
    flat = {name: value for name, value in _flat(config).items() if name not in FREE | {"preset"}}
    return {name: value if isinstance(value, plain) else str(value) for name, value in flat.items()}


def differing(config: Config, other: Config) -> list[str]:
    """The fields that differ and may not, as "name 1 instead of 2".

    Example:
        >>> a = Config("tokenflow-tiny", Path("pictures"))
        >>> b = Config("tokenflow-tiny", Path("elsewhere"), seed=1, optimizer=OptimizerConfig(steps=5, rate=0.1))
        >>> differing(b, a)
        ['seed 1 instead of 0', 'rate 0.1 instead of 0.0001']
    """
    flat, before = _flat(config), _flat(other)
    return [
        f"{name} {value} instead of {before[name]}"
        for name, value in flat.items()
        if name not in FREE and value != before[name]
    ]


def _flat(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        found |= _flat(value) if is_dataclass(value) else {f.name: value}
    return found
