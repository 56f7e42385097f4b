"""tokenflow: a tokenizer for images with a semantic and a pixel codebook under one index, and what trains and uses it."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["VAR", "VQVAE", "ImageProcessor", "TokenFlow", "Tokenizer", "UniTok"]


def __getattr__(name: str) -> Any:
    """The models, imported when they are first asked for: the command line sets threads before torch starts."""
    if name in __all__:
        return getattr(importlib.import_module("tokenflow.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
