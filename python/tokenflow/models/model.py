"""What every model of the package is: made from a preset, a folder, the hub or a file of its authors, and saved again."""

from __future__ import annotations

import importlib
import re
import tempfile
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenflow.errors import Missing
from tokenflow.models import checkpoint, saved

FILES = (saved.CONFIG, saved.WEIGHTS)


class Model(nn.Module):
    """A model with presets and files: a class without a `kind` reads those of every one of its subclasses that is imported.

    A subclass sets the class attributes, makes its networks and, where its authors released files, defines `recognise` and
    `convert`.

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
        """Rows about the model for a reader: variant, parameters."""
        names = [name for name, config in self.presets.items() if config == self.config]
        return {
            "model": f"{type(self).__name__}, {names[0] if names else 'of no preset'}",
            "weights": f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} M parameters",
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all."""
        saved.save(Path(folder), {"model": self.kind, **asdict(self.config)}, self.state_dict())

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
            ValueError: config.json describes another model than the weights, or a file is broken.
        """
        options = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        folder = Path(name)
        if isinstance(name, str) and not folder.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            folder = _snapshot(name, options)
        kinds, (values, state) = cls.kinds(), saved.load(folder)
        word = values.pop("model", None)
        if not isinstance(word, str) or word not in kinds:
            raise ValueError(
                f"from_pretrained: name: wanted a {' or '.join(kinds)} model, got another in {folder / saved.CONFIG}"
            )
        model = kinds[word](from_json(kinds[word].config_type, values))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n\t")[:2])
            raise ValueError(
                f"from_pretrained: name: wanted the weights that {saved.CONFIG} describes, got {folder / saved.WEIGHTS} ({reason})"
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

    @property
    def dtype(self) -> torch.dtype:
        """The type of the networks' parameters; codebooks stay float32."""
        return next(p.dtype for name, p in self.named_parameters() if not name.startswith("quantizer."))


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
