"""What every tokenizer of the family is: images to token ids and back, made from a preset, a folder, the hub or a released file.

    features = encode_features(images)  ->  ids = quantizer.encode(features)  ->  codes = quantizer.decode(ids)
    images'  = decode_features(codes)

The quantizer works in float32 whatever the model's or autocast's type, so that a bfloat16 model has one definition of its
tokens: those of its own features.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenflow.errors import Missing
from tokenflow.files import replacing, write_whole
from tokenflow.models import checkpoint, layout
from tokenflow.models.image_processor import ImageProcessor
from tokenflow.models.precision import full, without_autocast
from tokenflow_ext.quantize import Quantized

FILES = ("config.json", "model.safetensors")


class Output(NamedTuple):
    """What training needs: images [B, 3, H, W], ids, and the quantizer's loss (0-dim)."""

    images: Tensor
    indices: Tensor
    loss: Tensor


class Tokenizer(nn.Module):
    """A tokenizer for images: the class itself reads presets, folders and files of every one of its subclasses that is imported.

    A subclass sets the class attributes, makes its networks and `self.quantizer` (which has
    `forward`, `encode` and `decode`), and defines `encode_features`, `decode_features`, `image_size` and, where its authors
    released files, `recognise` and `convert`.

    Attributes:
        kind: the word under "model" in config.json.
        config_type: a frozen dataclass of plain values, tuples and further such dataclasses.
        presets: name -> config.
        places: where a released file may hold the weights, see `checkpoint.read`.
        assumed: fields of the config that change results and leave no trace in released weights, such as head counts.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type]
    presets: ClassVar[Mapping[str, Any]]
    places: ClassVar[tuple[str, ...]] = ("ema", "model", "state_dict")
    assumed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def kinds(cls) -> dict[str, type[typing.Self]]:
        """This class by its kind, or where it has none, its subclasses by theirs."""
        if hasattr(cls, "kind"):
            return {cls.kind: cls}
        return {kind: found for child in cls.__subclasses__() for kind, found in child.kinds().items()}

    @classmethod
    def from_preset(cls, name: str) -> typing.Self:
        """A fresh model of a named size.

        Raises:
            ValueError: no preset has that name.
        """
        owners = {preset: kind for kind in cls.kinds().values() for preset in kind.presets}
        if name not in owners:
            raise ValueError(f"from_preset: name: wanted one of {', '.join(owners)}, got {name!r}")
        return owners[name](owners[name].presets[name])

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, quiet: bool = False, **changes: Any) -> typing.Self:
        """The model in a file of its authors, in eval mode; prints what was found in it.

        The variant, its widths, grid and codebook are read from names and shapes. Loading is strict: each tensor is used, or
        dropped for a reason that the table names. Pickles are read as data: one that asks for more is refused.

        Args:
            path: a .pt, .pth or .safetensors file: a state dict, or a training checkpoint that holds one.
            quiet: print nothing.
            changes: fields of the config, where the file's model differs from the published ones in what weights do not tell
                (`assumed`): those are said in the table too.

        Raises:
            FileNotFoundError: no such file.
            TypeError: the config has no such field.
            ValueError: another kind of file, or of model.
        """
        kinds, refusals = cls.kinds().values(), []
        state, place = checkpoint.read(path, tuple(dict.fromkeys(place for kind in kinds for place in kind.places)))
        for kind in kinds:
            try:
                recognised = kind.recognise(state)
            except (IndexError, ValueError) as error:
                refusals.append(error)
                continue
            config = kind.changed(recognised, changes)
            model, converted = kind(config), kind.convert(state, config)
            checkpoint.fit(converted, model, path)
            if not quiet:
                where = f' (under "{place}")' if place else ""
                dropped = {"dropped": checkpoint.dropped_lines(converted.dropped)}
                assumed = ", ".join(f"{name} {getattr(config, name)}" for name in kind.assumed if name not in changes)
                given = ", ".join(f"{name} {value}" for name, value in changes.items())
                said = {"assumed": f"{assumed} (weights do not tell)"} if assumed else {}
                said |= {"given": given} if given else {}
                print(checkpoint.table({"file": f"{path}{where}", **model.summary(), **said, **dropped}))
            return model.eval()
        if len(refusals) == 1 and str(refusals[0]).startswith("from_checkpoint: "):
            raise refusals[0]
        names = ", ".join(kind.__name__ for kind in kinds)
        what = "tensors of other shapes" if len(refusals) == 1 else "other names"
        raise ValueError(
            f"from_checkpoint: path: wanted the weights of a {names}, got {path} with {what}"
        ) from refusals[-1]

    @classmethod
    def recognise(cls, state: Mapping[str, Tensor]) -> Any:
        """The config of the model whose released weights these are, from names and shapes.

        Raises:
            ValueError: they are those of another model.
        """
        raise ValueError(f"from_checkpoint: {cls.__name__} has no released files to read")

    @classmethod
    def changed(cls, config: Any, values: Mapping[str, Any]) -> Any:
        """The config with other values in some fields, and what follows from them."""
        unknown = sorted(set(values) - {f.name for f in fields(config)})
        if unknown:
            raise TypeError(
                f"from_checkpoint: {unknown[0]}: wanted a field of {type(config).__qualname__}, got none of that name"
            )
        return replace(config, **values)

    @classmethod
    def convert(cls, state: Mapping[str, Tensor], config: Any) -> checkpoint.Converted:
        """Released weights under our names."""
        raise NotImplementedError

    def summary(self) -> dict[str, str]:
        """Rows about the model for a reader: variant, sizes, parameters."""
        names = [name for name, config in self.presets.items() if config == self.config]
        height, width = self.image_size
        return {
            "model": f"{type(self).__name__}, {names[0] if names else 'of no preset'}",
            "images": f"{height} x {width}",
            "weights": f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} M parameters",
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and preprocessor_config.json into `folder`, each whole or not at all."""
        folder = Path(folder)
        self.image_processor().save_pretrained(folder)
        write_whole(folder / FILES[0], json.dumps({"model": self.kind, **asdict(self.config)}, indent=2) + "\n")
        with replacing(folder / FILES[1]) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> typing.Self:
        """The model that `save_pretrained` wrote, in eval mode.

        Args:
            name: a folder, or as a string that is no folder, a repository "owner/name" of the Hugging Face hub.
            revision: branch, tag or commit of the repository.
            cache_dir: the hub's cache.
            token: for a private repository.
            local_files_only: take the repository from the cache and ask no network.

        Raises:
            FileNotFoundError: the folder lacks a file, or the repository cannot be had.
            Missing: a repository is asked for and huggingface_hub is not installed.
            ValueError: config.json describes another model, or a file is broken.
        """
        options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = Path(name)
        if isinstance(name, str) and not folder.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            folder = _snapshot(name, options)
        for file in FILES:
            if not (folder / file).exists():
                raise FileNotFoundError(
                    f"from_pretrained: name: wanted a folder with {' and '.join(FILES)}, got {folder} without {file}"
                )
        kinds = cls.kinds()
        try:
            values = json.loads((folder / FILES[0]).read_text())
        except ValueError as error:
            raise ValueError(f"from_pretrained: name: wanted JSON in {folder / FILES[0]}, got {error}") from error
        word = values.pop("model", None) if isinstance(values, dict) else None
        if not isinstance(word, str) or word not in kinds:
            raise ValueError(
                f"from_pretrained: name: wanted a {' or '.join(kinds)} model, got another in {folder / FILES[0]}"
            )
        model = kinds[word](from_json(kinds[word].config_type, values))
        try:
            model.load_state_dict(load_file(folder / FILES[1]))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split("\n\t")[:2])
            raise ValueError(
                f"from_pretrained: name: wanted the weights that {FILES[0]} describes, got {folder / FILES[1]} ({reason})"
            ) from error
        return model.eval()

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the repository "owner/name" of the Hugging Face hub; returns its address.

        Raises:
            Missing: huggingface_hub is not installed.
        """
        api = _hub(name).HfApi(token=token)
        address = str(api.create_repo(name, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"{type(self).__name__} from tokenflow")
        return address

    def image_processor(self) -> ImageProcessor:
        """What makes pictures of any size into images for this model."""
        return ImageProcessor(self.image_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the networks' parameters; codebooks stay float32."""
        return next(p.dtype for name, p in self.named_parameters() if not name.startswith("quantizer."))

    def train(self, mode: bool = True) -> typing.Self:
        """Training or eval mode; in eval mode convolutions keep their weights channels last, see `layout`."""
        super().train(mode)
        layout.follow_mode(self)
        return self

    def encode_features(self, images: Tensor) -> Tensor:
        """Features before the quantizer, from images [B, 3, H, W] in [-1, 1]."""
        raise NotImplementedError

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, 3, H, W], not clamped, from quantized features."""
        raise NotImplementedError

    def quantize(self, features: Tensor) -> Quantized:
        """The quantizer on features, in float32 (float64 for float64) whatever autocast says."""
        with without_autocast(features):
            return self.quantizer(full(features))

    def forward(self, images: Tensor) -> NamedTuple:
        """Everything that training needs, from images [B, 3, H, W] in [-1, 1]."""
        quantized, indices, loss = self.quantize(self.encode_features(images))
        return Output(self.decode_features(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Token ids of images [B, 3, H, W] in [-1, 1]: [B, L], coarse scales first, or [B, G, L] for G codebooks."""
        features = self.encode_features(images)
        with without_autocast(images):
            return self.quantizer.encode(full(features))

    def codes(self, indices: Tensor) -> Tensor:
        """The quantized features of token ids."""
        return self.quantizer.decode(indices)

    def split(self, indices: Tensor) -> list[Tensor]:
        """Token ids [B, L] as one map [B, h, w] a scale, where there are scales."""
        return [indices]

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] from token ids; a prefix of whole scales gives a coarser picture."""
        images = self.decode_features(self.codes(indices))
        return full(images).clamp(-1, 1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The quantized features: what a language model reads."""
        return self.codes(self.encode(images))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(encode(images))."""
        return self.decode(self.encode(images))

    def checked(self, images: Tensor) -> Tensor:
        """Images in the model's own type, channels last.

        Raises:
            TypeError: images are not floating point.
            ValueError: another shape.
        """
        height, width = self.image_size
        check_floating(images)
        if images.dim() != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(f"encode: images: wanted [B, 3, {height}, {width}], got {list(images.shape)}")
        return images.to(self.dtype).contiguous(memory_format=torch.channels_last)


def check_floating(images: Tensor) -> None:
    """Raises TypeError unless images are a tensor of floating point values."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"encode: images: wanted a tensor of floating point values in [-1, 1], got {got}")


def from_json(config_type: type, values: Mapping[str, Any]) -> Any:
    """The dataclass that `asdict` and JSON made `values` of: lists are tuples again, and dicts dataclasses.

    Raises:
        ValueError: a name that the dataclass does not have.
    """
    unknown = sorted(set(values) - {f.name for f in fields(config_type)})
    if unknown:
        raise ValueError(
            f"from_pretrained: config.json: wanted fields of a {config_type.__name__}, got {', '.join(unknown)}"
        )
    hints = typing.get_type_hints(config_type)

    def restored(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            kinds = [kind for kind in (hints[name], *typing.get_args(hints[name])) if is_dataclass(kind)]
            if not kinds:
                raise ValueError(f"from_pretrained: config.json: {name}: wanted a plain value, got {value}")
            return from_json(kinds[0], value)
        return _tuples(value)

    return config_type(**{name: restored(name, value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _hub(name: str) -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise Missing(
            f"{name} is no folder here, and the Hugging Face hub needs: pip install huggingface_hub"
        ) from error


def _snapshot(name: str, options: dict[str, Any]) -> Path:
    hub = _hub(name)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(FILES), **options))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"from_pretrained: name: wanted a folder with {' and '.join(FILES)} or a repository of the hub, got {name} ({reason})"
        ) from error
