"""`tokenflow train`: a recipe by its preset's name, every number of it an option; or a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from tokenflow.training.config import Config
from tokenflow.training.recipes import RECIPES

RESUME = "--resume"
HELP = (
    "Train a tokenizer by its published recipe. `tokenflow train PRESET --help` shows the recipe, of which every number is an option.\n\n"
    f"`tokenflow train {RESUME} FOLDER` goes on with the run of a folder, as the same command does that began it."
)


@dataclass
class Train:
    """Train a tokenizer by its published recipe; every number of it is an option."""

    config: Config

    def run(self) -> None:
        from tokenflow.training.engine import train

        train(self.config)


def parse(arguments: Sequence[str]) -> Train:
    """The command that the words after `tokenflow train` describe."""
    prog, options = "tokenflow train", (tyro.conf.OmitArgPrefixes,)
    if arguments[:1] == [RESUME] and arguments[1:2] and not arguments[1].startswith("-"):
        from tokenflow.training.folder import read_config

        folder = Path(arguments[1])
        # The folder may have moved, or is named from another place, since it wrote its own name down.
        config = replace(read_config(folder), out=folder)
        return Train(
            tyro.cli(Config, default=config, prog=f"{prog} {RESUME} {folder}", args=arguments[2:], config=options)
        )
    recipes = {name: (f"{name} by its published recipe.", recipe) for name, recipe in RECIPES.items()}
    return Train(
        tyro.extras.overridable_config_cli(recipes, prog=prog, description=HELP, args=arguments, config=options)
    )
