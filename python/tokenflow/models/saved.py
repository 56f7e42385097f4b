"""A model's folder: config.json for whoever reads it, model.safetensors with the weights and a copy of the same description.

Two files cannot be replaced at one moment. A process that dies between them leaves a description of one model beside the weights of
another, which the copy tells apart even where all shapes agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenflow.files import replacing, write_whole

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ABOUT = "tokenflow"


def save(folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write both files, each whole or not at all.

    Raises:
        OSError: one cannot be written, such as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    with replacing(folder / WEIGHTS) as temporary:
        tensors = {name: value.contiguous() for name, value in state.items()}
        try:
            save_file(tensors, temporary, {ABOUT: json.dumps(description, ensure_ascii=False)})
        except SafetensorError as error:
            raise OSError(f"save_pretrained: {folder / WEIGHTS} could not be written ({error})") from error


def load(folder: Path, *, caller: str = "from_pretrained: name") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or they are of two models.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{caller}: wanted a folder with {CONFIG} and {WEIGHTS}, got {folder} without {file}"
            )
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{caller}: wanted JSON in {folder / CONFIG}, got {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{caller}: wanted the description of a model, got another in {folder / CONFIG}")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            copy = (file.metadata() or {}).get(ABOUT)
        own = description if copy is None else json.loads(copy)  # folders of other programs have none
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{caller}: wanted weights in {folder / WEIGHTS}, got {str(error).splitlines()[0]}") from error
    if own != description:
        names = sorted(name for name in {*own, *description} if own.get(name) != description.get(name))
        raise ValueError(
            f"{caller}: wanted {CONFIG} and {WEIGHTS} of one model, got {folder} where they differ in {', '.join(names)}: "
            f"a saving was interrupted, which saving again mends, or {CONFIG} was edited"
        )
    return description, state
