"""What a config names, made: the tokenizer, its teacher, the objective, the discriminator and the optimisers."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenflow.errors import Missing
from tokenflow.losses import DinoDiscriminator, Objective, PatchGAN, Weights, dinov2_tower, load_perceptual
from tokenflow.losses.adversarial import Ramp
from tokenflow.losses.blur import Fade
from tokenflow.models import TokenFlow, Tokenizer, UniTok
from tokenflow.training.config import Config
from tokenflow.training.folder import TEACHER
from tokenflow.training.muon import Muon, matrices
from tokenflow.training.teachers import PrincipalTeacher, TowerTeacher

DECODERS = {"tokenflow": "pixel_decoder", "unitok": "decoder", "vqvae": "decoder"}
AVERAGES = (".ema_counts", ".ema_sums", ".revivals")
LAST_LAYERS = {"unitok": "up_conv4.conv2.weight", "vqvae": "conv_out.weight"}


def build_model(config: Config) -> Tokenizer:
    """The tokenizer where training starts, drawn from torch's generator, with what does not train frozen.

    Raises:
        FileNotFoundError: no such start.
        ValueError: an unknown field or preset, weights that do not fit, or nothing to tune.
    """
    owners = {name: kind for kind in Tokenizer.kinds().values() for name in kind.presets}
    if config.preset not in owners:
        raise ValueError(f"train: preset: wanted one of {', '.join(owners)}, got {config.preset!r}")
    kind = owners[config.preset]
    try:
        model = kind(_changed(kind, kind.presets[config.preset], config.model))
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"train: model: wanted sizes that a {kind.__name__} can have, got {' '.join(config.model)} ({error})"
        ) from error
    quantizer = getattr(model.quantizer, "quantizer", model.quantizer)
    quantizer.entropy_weight, quantizer.entropy_temperature = config.loss.entropy, config.loss.entropy_temperature
    if config.tune == "decoder" and config.start is None:
        raise ValueError("train: start: wanted a trained tokenizer whose decoder is tuned (--start), got none")
    if config.start is not None:
        _load(model, config)
    elif config.loss.tower is not None:
        if not isinstance(model, TokenFlow):
            raise ValueError(f"train: tower: wanted none for a {type(model).__name__}, got {config.loss.tower}")
        model.load_tower(config.loss.tower)
    if config.optimizer.checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            raise ValueError(
                f"train: checkpointing: wanted a model that recomputes blocks, got a {type(model).__name__}"
            )
        model.gradient_checkpointing_enable()
    _freeze(model, config)
    return model


def _changed(kind: type[Tokenizer], config: Any, assignments: Iterable[str]) -> Any:
    """The model's config with `name=value` in it; `tower.depth=2` goes into a part."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        path, _, last = name.rpartition(".")
        part = getattr(values.get(path, config), path, None) if path else config
        if path in values:
            part = values[path]
        if not equals or "." in path or not is_dataclass(part) or not hasattr(part, last):
            raise ValueError(
                f"train: model: wanted name=value with a field of {kind.__name__}'s config, got {assignment!r}"
            )
        if path:
            values[path] = replace(part, **{last: value})
        else:
            values[name] = value
    try:
        return kind.changed(config, values)
    except TypeError as error:
        raise ValueError(f"train: model: {error}") from error


def _load(model: Tokenizer, config: Config) -> None:
    """The weights of another tokenizer; one whose decoder is tuned may have another decoder."""
    path = Path(config.start)
    kind = type(model)
    start = kind.from_checkpoint(path, quiet=True) if path.is_file() else kind.from_pretrained(config.start)
    state, own, decoder = start.state_dict(), model.state_dict(), DECODERS[model.kind] + "."
    if config.tune == "decoder":
        another = {name: value for name, value in own.items() if name.startswith(decoder)}
        if any(name not in state or state[name].shape != value.shape for name, value in another.items()):
            state = {name: value for name, value in state.items() if not name.startswith(decoder)} | another
    # Averages are there or not, as the codebooks' rule wants them.
    averaged = [name for name in own if name.endswith(AVERAGES) and name not in state]
    state = {name: value for name, value in state.items() if name in own or not name.endswith(AVERAGES)}
    try:
        model.load_state_dict({**state, **{name: own[name] for name in averaged}})
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:3])
        raise ValueError(
            f"train: start: wanted the weights of {config.preset} as configured, got {config.start} ({reason})"
        ) from error
    for codebook in model.modules():
        if averaged and hasattr(codebook, "ema_sums"):
            codebook.ema_sums.copy_(codebook.joined())
            codebook.ema_counts.fill_(1.0)


def _freeze(model: Tokenizer, config: Config) -> None:
    """Take gradients from whatever no term trains: every rank waits for each gradient there is."""
    if config.tune == "decoder":
        model.requires_grad_(False)
        model.quantizer.freeze() if hasattr(model.quantizer, "freeze") else model.quantizer.quantizer.freeze()
        getattr(model, DECODERS[model.kind]).requires_grad_(True)
        return
    if isinstance(model, TokenFlow) and not config.loss.semantic:
        model.semantic_decoder.requires_grad_(False)
    if isinstance(model, UniTok) and not config.loss.contrastive:
        for part in (model.text_encoder, model.projection, model.fc_norm, model.logit_scale):
            part.requires_grad_(False)


def training_mode(model: Tokenizer, config: Config) -> None:
    """Training mode; where the decoder is tuned, the encoder drops no path, and the quantizer goes on dropping scales."""
    model.train()
    if config.tune == "decoder":
        for name, part in model.named_children():
            part.train(name in (DECODERS[model.kind], "quantizer"))


def last_layer(model: Tokenizer) -> Tensor:
    """The weight of the decoder's last convolution."""
    decoder = getattr(model, DECODERS[model.kind])
    if model.kind in LAST_LAYERS:
        return decoder.get_parameter(LAST_LAYERS[model.kind])
    return decoder.get_parameter("conv_out.weight") if model.config.tower else decoder[-2].weight


def build_teacher(config: Config, model: Tokenizer, images: Callable[[], Tensor], run: Path) -> nn.Module | None:
    """The teacher, None without a semantic term.

    Raises:
        Missing: tokenflow-tiny's packages are not installed.
        ValueError: a model that learns from none, or no tower for a published one.
    """
    if not config.loss.semantic or config.tune == "decoder":
        return None
    if not isinstance(model, TokenFlow):
        raise ValueError(
            f"train: semantic: wanted 0 for a {type(model).__name__}, which has no semantic decoder, got {config.loss.semantic}"
        )
    c = model.config
    if c.tower is None:
        try:
            dtype = torch.bfloat16 if config.optimizer.precision == "bfloat16" else torch.float32
            return PrincipalTeacher(run / TEACHER, images, c.teacher_dim, c.scales[-1] // 2, dtype=dtype)
        except Missing as error:
            raise Missing(f"{error}; --semantic 0 trains without a teacher") from error
    if config.loss.tower is None:
        raise ValueError(
            f"train: tower: wanted a file of the {c.tower.kind} that {config.preset} starts and learns from (--tower FILE), got "
            "none; --semantic 0 trains without a teacher"
        )
    return TowerTeacher(c.tower, config.loss.tower, c.teacher_dim)


def build_objective(config: Config, size: tuple[int, int]) -> Objective:
    """The objective, tried on one blank picture of the size.

    Raises:
        Missing: a perceptual distance whose weights are not there.
        ValueError: one without files, or pictures that are too small for it.
    """
    loss, a, steps = config.loss, config.adversary, config.steps_of
    start = steps(a.adversarial_from)
    tuning = config.tune == "decoder"
    weights = Weights(
        l1=loss.l1,
        mse=loss.mse,
        perceptual=loss.perceptual,
        semantic=0.0 if tuning else loss.semantic,
        quantizer=0.0 if tuning else loss.quantizer,
        contrastive=0.0 if tuning else loss.contrastive,
        adversarial=a.adversarial,
        discriminator=a.discriminator_weight,
        consistency=a.consistency,
        lecam=a.lecam,
        kind=a.game,
        adaptive=a.adaptive,
        ramp=Ramp(start, steps(a.adversarial_warmup)),
        fade=Fade(a.blur, start, steps(a.blur_fade)),
        augment=a.augment,
        cutout=a.cutout,
        perceptual_side=loss.perceptual_side,
        perceptual_start=steps(loss.perceptual_from),
        perceptual_pictures=loss.perceptual_pictures,
    )
    metric = _metric(config, size) if loss.perceptual and size[0] >= loss.perceptual_side else None
    if metric is None:
        weights = replace(weights, perceptual=0.0)
    return Objective(weights, perceptual=metric, distillation=loss.distillation)


def _metric(config: Config, size: tuple[int, int]) -> nn.Module:
    loss = config.loss
    ways = "--metric st-lpips takes a package's, --perceptual 0 none"
    if loss.metric == "lpips" and loss.lpips is None:
        raise ValueError(
            "train: lpips: wanted torchvision's vgg16-397923af.pth and weights/v0.1/vgg.pth of the package lpips "
            f"(--lpips TRUNK HEADS), got none; {ways}"
        )
    try:
        trunk, heads = loss.lpips or (None, None)
        metric = load_perceptual(loss.metric, trunk=trunk, heads=heads)
    except Missing as error:
        raise Missing(f"{error}; --perceptual 0 trains without a perceptual term") from error
    _try(metric, "metric", size, lambda blank: metric(blank, blank))
    return metric


def build_discriminator(config: Config, size: tuple[int, int]) -> nn.Module | None:
    """The discriminator, tried on one blank picture of the size; None without an adversarial term.

    Raises:
        Missing: no DINOv2.
        ValueError: no folder for it, or pictures that are too small.
    """
    a = config.adversary
    if not a.adversarial:
        return None
    if a.discriminator == "patchgan":
        judge: nn.Module = PatchGAN(a.patchgan_layers, a.patchgan_width, norm=a.patchgan_norm)
    else:
        if a.dino is None:
            raise ValueError(
                "train: dino: wanted a folder with a copy of facebook/dinov2-small (--dino FOLDER), got none; "
                "--discriminator patchgan takes no weights, --adversarial 0 trains without a discriminator"
            )
        tower = dinov2_tower(a.dino)
        judge = DinoDiscriminator(tower, width=tower.model.config.hidden_size, patch=tower.model.config.patch_size)
    judge.eval()
    _try(judge, "discriminator", size, judge)
    return judge.train()


@torch.no_grad()
def _try(module: nn.Module, name: str, size: tuple[int, int], call: Callable[[Tensor], Any]) -> None:
    try:
        call(torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"train: {name}: wanted one for pictures of {size[0]} x {size[1]}, got {type(module).__name__} ({reason})"
        ) from error


def build_optimizers(config: Config, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """By name, over what trains: "optimizer", AdamW (Adam where nothing decays), and "muon" where matrices have a rate of their own.

    Norms, biases and codebooks do not decay.
    """
    o = config.optimizer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    moved = {id(p) for p in matrices(model) if p.requires_grad} if o.matrix_rate else set()
    decays = {id(p) for name, p in trained if p.dim() > 1 and not name.startswith("quantizer.")}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for _, p in trained:  # an optimiser's step takes no pieces and wholes together
        if id(p) not in moved:
            groups.setdefault((id(p) in decays, hasattr(p, "to_local")), []).append(p)
    listed = [{"params": ps, "weight_decay": o.weight_decay * decaying} for (decaying, _), ps in groups.items()]
    # GradScaler and the fused step look for infinities each in their own way.
    fused = o.precision != "float16" and not o.shard
    optimizers = {"optimizer": torch.optim.AdamW(listed, lr=o.rate, betas=o.betas, eps=o.eps, fused=fused)}
    if moved:
        whole = [p for _, p in trained if id(p) in moved]
        optimizers["muon"] = Muon(whole, o.matrix_rate, weight_decay=o.weight_decay)
    return optimizers


def peak_rate(config: Config, name: str) -> float:
    """The highest rate of one of `build_optimizers`."""
    return {"optimizer": config.optimizer.rate, "muon": config.optimizer.matrix_rate}[name]


def build_discriminator_optimizer(config: Config, judge: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the discriminator's parameters that train."""
    a = config.adversary
    trained = [p for p in judge.parameters() if p.requires_grad]
    fused = config.optimizer.precision != "float16"
    return torch.optim.AdamW(
        trained, lr=a.discriminator_rate, betas=a.discriminator_betas, weight_decay=a.discriminator_decay, fused=fused
    )
