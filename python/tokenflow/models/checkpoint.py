"""Weight files as their authors released them: read without running anything in them, renamed by rules, fitted strictly.

file -> {name: tensor}  --rules-->  {our name: tensor}, names left out on purpose  --fit-->  model
"""

from __future__ import annotations

import argparse
import collections
import importlib
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("module.", "_orig_mod.")
NUMBERS = ("f2", "f4", "f8", "i4", "i8", "u1", "bool")


def _harmless() -> list:
    """What training files hold beside tensors and plain values: types, or (type, other name that files know it by).

    Making one of these runs no code of the file's choosing.
    """
    kinds = [argparse.Namespace, collections.defaultdict, pathlib.PosixPath]
    kinds.append((pathlib.PosixPath, "pathlib._local.PosixPath"))
    try:
        numpy = importlib.import_module("numpy")
    except ImportError:
        return kinds

    def scalar(dtype: object, content: bytes) -> object:
        # numpy's own believes flags that the file sets on a dtype, and takes the address of the content for a number then.
        names = {str(numpy.dtype(name)) for name in NUMBERS}
        if str(dtype) not in names or not isinstance(content, bytes):
            raise pickle.UnpicklingError(f"numpy scalar of {dtype}")
        return numpy.frombuffer(content, numpy.dtype(str(dtype)), count=1)[0]

    dtypes = {type(numpy.dtype(name)) for name in NUMBERS}
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*kinds, numpy.dtype, *dtypes, *scalars]


@dataclass
class Converted:
    """Weights under our names, and what was left out on purpose.

    Attributes:
        state: our name -> tensor.
        dropped: why -> names in the file.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)


def read(path: str | Path, places: Sequence[str] = ("ema", "model", "state_dict")) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .pt, .pth or .safetensors file by name, and the place in the file where they were.

    Args:
        path: the file.
        places: where weights may be in a file of several parts, the best first; dots go down ("trainer.unitok"). A file that is
            itself a state dict is read as it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a weight file, no weights in any of the places, or a pickle that asks for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"from_checkpoint: path: wanted a .pt, .pth or .safetensors file, got {path}")
    content = _load(path)
    for place in (*places, ""):
        found = content
        for step in filter(None, place.split(".")):
            found = found.get(step) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(v, Tensor) for v in found.values()):
            return {_bare(str(name)): value for name, value in found.items()}, place
    raise ValueError(
        f"from_checkpoint: path: wanted a state dict, or one under {', '.join(places)}, got {path} with {_contents(content)}"
    )


def _load(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"a pickle that asks for {wanted[1]}, which a weight file has no need of" if wanted else "a broken pickle"
        )
        raise ValueError(
            f"from_checkpoint: path: wanted tensors and plain values, got {path}, {what}: not loaded"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"from_checkpoint: path: wanted a weight file, got {path} ({reason})") from error


def _bare(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _contents(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [str(name) for name in content]
    return f"{', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern's group finds at the start of a name; 0 where it finds none."""
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def rename(
    state: Mapping[str, Tensor],
    rules: Sequence[tuple[str, str | Callable[[re.Match], str]]],
    drops: Sequence[tuple[str, str]] = (),
) -> Converted:
    """Every name through all substitutions, one after the other.

    Args:
        state: name in the file -> tensor.
        rules: (pattern, replacement) as `re.sub` takes them. Names that end in [0], [1], ... after them are parts of one tensor
            and are joined along the first axis.
        drops: (pattern of a whole name in the file, why it is not needed).

    Example:
        >>> out = rename({"a.q": torch.zeros(2), "a.k": torch.ones(2), "b": torch.zeros(1)},
        ...              [(r"^a\\.q$", "qk[0]"), (r"^a\\.k$", "qk[1]")], [("b", "not read")])
        >>> out.state["qk"].tolist(), out.dropped
        ([0.0, 0.0, 1.0, 1.0], {'not read': ['b']})
    """
    out, parts = Converted(), {}
    for name, value in state.items():
        why = next((why for pattern, why in drops if re.fullmatch(pattern, name)), None)
        if why is not None:
            out.dropped.setdefault(why, []).append(name)
            continue
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if name.endswith("]"):
            target, number = name[:-1].rsplit("[", 1)
            parts.setdefault(target, {})[int(number)] = value
        else:
            out.state[name] = value
    for target, pieces in parts.items():
        out.state[target] = torch.cat([pieces[i] for i in sorted(pieces)])
    return out


def fit(converted: Converted, model: nn.Module, path: str | Path, *, caller: str = "from_checkpoint") -> None:
    """Load strictly: every name of the file is used or was dropped, every tensor of the model is given, shapes agree up to
    axes of length one.

    Raises:
        ValueError: else, in one sentence.
    """
    wanted = model.state_dict()
    values, wrong = {}, []
    for name, value in converted.state.items():
        if name in wanted:
            target = wanted[name].shape
            if [n for n in value.shape if n != 1] != [n for n in target if n != 1]:
                wrong.append(f"{name} is {list(value.shape)} instead of {list(target)}")
            else:
                values[name] = value.reshape(target)
    problems = [
        _some(sorted(set(converted.state) - set(wanted)), "tensors that the model has no place for"),
        _some(sorted(set(wanted) - set(converted.state)), "tensors missing"),
        _some(wrong, "wrong shapes"),
    ]
    if any(problems):
        raise ValueError(
            f"{caller}: path: wanted the weights of a {type(model).__name__}, got {path} with "
            f"{'; '.join(filter(None, problems))}"
        )
    model.load_state_dict(values)


def _some(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def table(rows: Mapping[str, str | Sequence[str]]) -> str:
    """Rows of a name and one or several lines as one block of text."""
    width = max(map(len, rows))
    lines = []
    for name, value in rows.items():
        for number, line in enumerate([value] if isinstance(value, str) else value):
            lines.append(f"{name if number == 0 else '':<{width}}  {line}")
    return "\n".join(lines)


def dropped_lines(dropped: Mapping[str, Sequence[str]]) -> list[str]:
    """One line a reason: the names it holds for."""
    return [f"{_span(names)}: {why}" for why, names in dropped.items()] or ["nothing"]


def _span(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    common = names[0]
    while not all(name.startswith(common) for name in names):
        common = common[:-1]
    return f"{common}* ({len(names)})"
