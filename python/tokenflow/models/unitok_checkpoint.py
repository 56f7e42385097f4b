"""UniTok's released files, and CLIP's, in our names: nearly the authors' own; only the codebooks are stacked.

Left out on purpose: usage counters; a bias of the projections' keys, zero as published, which moves all scores of a row alike and
so changes no attention; and the encoder's position embedding, a zero that was never trained. A file where that is not zero is
refused, because this code would compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenflow.models import checkpoint

TABLES = "quantizer.codebook.table_0"
CODEBOOK = r"quantizer?\.codebooks\.(\d+)\.codebook\.weight"
POSITIONS = "encoder.pos_embed"
DROPS = [
    (r"quantizer?\.codebooks\.\d+\.vocab_usage", "usage counters of training"),
    (r".*\.zero_k_bias", "a bias of keys changes no attention"),
    (POSITIONS, "zero, never trained"),
]


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `unitok.Config` that names and shapes tell, and the head counts that follow by the published rule.

    Raises:
        ValueError: the weights of another model.
    """
    books = [value for name, value in state.items() if re.fullmatch(CODEBOOK, name)]
    wanted = (
        "encoder.norm.weight", "encoder.patch_embed.backbone.stem.conv1.weight", "encoder.patch_embed.backbone.pool.norm.weight",
        "projection.weight", "text_encoder.positional_embedding", "text_encoder.token_embedding.weight",
    )  # fmt: skip
    missing = [name for name in wanted if name not in state] + (
        [] if books else ["quantizer.codebooks.0.codebook.weight"]
    )
    if missing:
        raise ValueError(
            f"from_checkpoint: path: wanted the weights of a UniTok, got a file without {', '.join(missing)}"
        )
    dim, stem, coarse, vectors, positions, words = (state[name].shape for name in wanted)
    code_dim = len(books) * books[0].shape[1]
    return {
        "widths": (stem[0], coarse[0]),
        "dim": dim[0],
        "depth": checkpoint.count(state, r"encoder\.blocks\.(\d+)\."),
        "heads": max(1, dim[0] // 64),
        "groups": len(books),
        "codebook_size": books[0].shape[0],
        "code_dim": code_dim,
        "projection": "attention" if "quant_proj.attn.qkv.weight" in state else "linear",
        "projection_heads": max(1, dim[0] // code_dim),
        "embed_dim": vectors[0],
        "text_width": positions[1],
        "text_heads": max(1, positions[1] // 64),
        "text_depth": checkpoint.count(state, r"text_encoder\.transformer\.resblocks\.(\d+)\."),
        "context": positions[0],
        "vocabulary": words[0],
    }


def convert(state: Mapping[str, Tensor]) -> checkpoint.Converted:
    """Released weights under our names.

    Raises:
        ValueError: a position embedding that is not zero.
    """
    if POSITIONS in state and bool(state[POSITIONS].any()):
        raise ValueError(f"from_checkpoint: path: wanted zeros in {POSITIONS}, as published, got others")
    converted = checkpoint.rename(state, [(rf"^{CODEBOOK}$", rf"{TABLES}[\1]")], DROPS)
    groups = sum(bool(re.fullmatch(CODEBOOK, name)) for name in state)
    if groups > 1:
        converted.state[TABLES] = converted.state[TABLES].unflatten(0, (groups, -1))
    return converted


def load_clip(model: torch.nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Start encoder and text tower of a fresh UniTok from a ViTamin CLIP; returns the file's names that were not used.

    `visual.trunk.*` goes to the encoder without its head and position embedding, `text.*` to the text tower; the logit scale
    starts anew, as published.

    Args:
        model: a `UniTok` of the CLIP's sizes.
        state: the CLIP's weights, e.g. `checkpoint.read(path)[0]`.

    Raises:
        ValueError: a tensor of encoder or text tower is missing, or has another shape.
    """
    unused, values = [], {}
    for name, value in state.items():
        new = re.sub(r"^text\.", "text_encoder.", re.sub(r"^visual\.trunk\.", "encoder.", name))
        left_out = new == name or new == POSITIONS or ".head." in new or new.endswith(".attn_mask")
        (unused.append(name) if left_out else values.__setitem__(new, value))
    wanted = {
        name: value for name, value in model.state_dict().items() if name.startswith(("encoder.", "text_encoder."))
    }
    unused += [name for name in values if name not in wanted]
    wrong = [name for name, value in wanted.items() if name not in values or values[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"load_clip: state: wanted a tensor of the model's shape for each of encoder and text tower, got {len(wrong)} others "
            f"({', '.join(wrong[:3])})"
        )
    model.load_state_dict({name: values[name] for name in wanted}, strict=False)
    return unused
