"""The names and shapes of TokenFlow's released files, and what they say about the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenflow.models.checkpoint import Converted, count, rename
from tokenflow.models.multiscale import fitted_scales
from tokenflow.models.semantic import Tower

if TYPE_CHECKING:
    from tokenflow.models.tokenflow import Config

SCALES = {14: (1, 2, 4, 6, 8, 10, 12, 14), 16: (1, 2, 4, 6, 8, 10, 12, 14, 16), 27: (*range(1, 11), 12, 14, 17, 22, 27)}
SIDES = {(14, 27): 384}  # SigLIP's 27 patches of 14 leave six pixels of 384 out.
HEADS = {"clip": 12, "siglip": 16, "vitamin": 16}

PIXEL = [
    (r"^(encoder|decoder)\.", r"pixel_\1."),
    (r"\.conv_blocks\.(\d+)\.res\.", r".levels.\1.residuals."),
    (r"\.conv_blocks\.(\d+)\.attn\.", r".levels.\1.attentions."),
    (r"\.conv_blocks\.(\d+)\.(?:up|down)sample\.conv\.", r".levels.\1.resample."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"^(pixel_\w+)\.mid\.", r"\1.middle."),
    (r"^(pixel_.*)\.proj_out\.", r"\1.out."),
    *((rf"^(pixel_.*)\.{x}\.(\w+)$", rf"\1.qkv.\2[{i}]") for i, x in enumerate("qkv")),
    (r"^quant_conv\.", "pixel_encoder.project."),
    (r"^post_quant_conv\.", "pixel_decoder.project."),
]
CLIP = [
    (r"^encoder_vqkd\.(class_embedding)$", "semantic_encoder.tower.class_token"),
    (r"^encoder_vqkd\.(positional_embedding)$", "semantic_encoder.tower.positions"),
    (r"^encoder_vqkd\.conv1\.", "semantic_encoder.tower.patches."),
    (r"^encoder_vqkd\.ln_(pre|post)\.", r"semantic_encoder.tower.\1_norm."),
    (r"^encoder_vqkd\.transformer\.resblocks\.(\d+)\.", r"semantic_encoder.tower.blocks.\1."),
    (r"(\.tower\..*)\.ln_(\d)\.", r"\1.norm\2."),
    (r"(\.tower\..*)\.attn\.in_proj_", r"\1.qkv."),
    (r"(\.tower\..*)\.attn\.out_proj\.", r"\1.out."),
    (r"(\.tower\..*)\.mlp\.c_fc\.", r"\1.fc1."),
    (r"(\.tower\..*)\.mlp\.c_proj\.", r"\1.fc2."),
]
SIGLIP = [
    (r"^encoder_vqkd\.vision_model\.embeddings\.patch_embedding\.", "semantic_encoder.tower.patches."),
    (r"^encoder_vqkd\.vision_model\.embeddings\.position_embedding\.weight$", "semantic_encoder.tower.positions"),
    (r"^encoder_vqkd\.vision_model\.encoder\.layers\.(\d+)\.", r"semantic_encoder.tower.blocks.\1."),
    (r"(\.tower\..*)\.layer_norm(\d)\.", r"\1.norm\2."),
    *((rf"(\.tower\..*)\.self_attn\.{x}_proj\.(\w+)$", rf"\1.qkv.\2[{i}]") for i, x in enumerate("qkv")),
    (r"(\.tower\..*)\.self_attn\.out_proj\.", r"\1.out."),
    (r"(\.tower\..*)\.mlp\.fc", r"\1.fc"),
]
VITAMIN = [(r"^encoder_vqkd\.(patch_embed|blocks)\.", r"semantic_encoder.tower.\1.")]
# CLIP and SigLIP as transformers, OpenAI's CLIP and open_clip name them, under the names above.
STARTS = [
    (r"^visual\.(?:trunk\.)?", "encoder_vqkd."),
    (r"^(?:vision_model\.)?(embeddings|encoder|pre_layrnorm|post_layernorm|head)\b", r"encoder_vqkd.vision_model.\1"),
    (r"^encoder_vqkd\.vision_model\.embeddings\.class_embedding$", "semantic_encoder.tower.class_token"),
    (r"^encoder_vqkd\.vision_model\.pre_layrnorm\.", "semantic_encoder.tower.pre_norm."),
    (r"^encoder_vqkd\.vision_model\.post_layernorm\.", "semantic_encoder.tower.post_norm."),
]
SEMANTIC_DECODER = [
    (r"^decoder_vqkd\.cls_token$", "semantic_decoder.body.class_token"),
    (r"^decoder_vqkd\.pos_embed$", "semantic_decoder.body.positions"),
    (r"^decoder_vqkd\.patch_embed\.proj\.", "semantic_decoder.body.patches."),
    (r"^decoder_vqkd\.fc_norm\.", "semantic_decoder.body.post_norm."),
    (r"^decoder_vqkd\.blocks\.", "semantic_decoder.body.blocks."),
    (r"(\.body\..*)\.attn\.qkv\.", r"\1.qkv."),
    *((rf"(\.body\..*)\.attn\.{x}_bias$", rf"\1.qkv.bias[{i}]") for i, x in enumerate("qkv")),
    (r"(\.body\..*)\.attn\.proj\.", r"\1.out."),
    (r"(\.body\..*)\.mlp\.fc", r"\1.fc"),
]
REST = [
    (r"^encode_task_layer\.", "semantic_encoder.head."),
    (r"^decode_task_layer\.", "semantic_decoder.head."),
    (r"^quantize\.embedding_vqkd\.weight$", "quantizer.quantizer.codebook.table_0"),
    (r"^quantize\.embedding_vqgan\.weight$", "quantizer.quantizer.codebook.table_1"),
]
RULES = [*PIXEL, *CLIP, *SIGLIP, *VITAMIN, *SEMANTIC_DECODER, *REST]
DROPS = [
    (r"quantize\.codebook_used", "codes that training last chose"),
    (r"scaling_layer\.(shift|scale)", "constants of the tower's normalisation"),
    (r"encoder_vqkd\.vision_model\.(head|post_layernorm)\..*", "behind the features that are read"),
]


def _tower(state: Mapping[str, Tensor]) -> Tower:
    at = "encoder_vqkd.vision_model"
    if f"{at}.embeddings.position_embedding.weight" in state:
        width, _, patch, _ = state[f"{at}.embeddings.patch_embedding.weight"].shape
        # The features are hidden_states[-2]: the last block is never read.
        depth = count(state, r"encoder_vqkd\.vision_model\.encoder\.layers\.(\d+)\.") - 1
        hidden = state[f"{at}.encoder.layers.0.mlp.fc1.weight"].shape[0]
        grid = isqrt(state[f"{at}.embeddings.position_embedding.weight"].shape[0])
        return Tower("siglip", width, depth, HEADS["siglip"], hidden, patch, grid)
    at = "encoder_vqkd.patch_embed.backbone"
    if f"{at}.pool.proj.weight" in state:
        width, last, _, _ = state[f"{at}.pool.proj.weight"].shape
        depth = count(state, r"encoder_vqkd\.blocks\.(\d+)\.")
        grid = isqrt(state["decoder_vqkd.pos_embed"].shape[1] - 1)
        stages = (state[f"{at}.stem.conv1.weight"].shape[0], last)
        return Tower("vitamin", width, depth, HEADS["vitamin"], 2 * width, 16, grid, stages)
    width, _, patch, _ = state["encoder_vqkd.conv1.weight"].shape
    depth = count(state, r"encoder_vqkd\.transformer\.resblocks\.(\d+)\.")
    hidden = state["encoder_vqkd.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    grid = isqrt(state["encoder_vqkd.positional_embedding"].shape[0] - 1)
    return Tower("clip", width, depth, HEADS["clip"], hidden, patch, grid)


def recognise(state: Mapping[str, Tensor], base: Config) -> Config:
    """The config of released weights from their names and shapes; what shapes do not show is `base`'s.

    Raises:
        ValueError: other names.
    """
    try:
        tower = _tower(state)
        levels = count(state, r"encoder\.conv_blocks\.(\d+)\.")
        codes, semantic_dim = state["quantize.embedding_vqkd.weight"].shape
        return replace(
            base,
            image_size=SIDES.get((tower.patch, tower.grid), tower.patch * tower.grid),
            scales=SCALES.get(tower.grid) or fitted_scales(SCALES[27], (tower.grid, tower.grid)),
            semantic_dim=semantic_dim,
            pixel_dim=state["quantize.embedding_vqgan.weight"].shape[1],
            codebook_size=codes,
            widths=tuple(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)),
            decoder_widths=tuple(
                state[f"decoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in reversed(range(levels))
            ),
            encoder_blocks=count(state, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            decoder_blocks=count(state, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
            latent=state["encoder.conv_out.weight"].shape[0],
            teacher_dim=state["decode_task_layer.2.weight"].shape[0],
            tower=tower,
            decoder_grid=isqrt(state["decoder_vqkd.pos_embed"].shape[1] - 1),
            decoder_depth=count(state, r"decoder_vqkd\.blocks\.(\d+)\."),
        )
    except KeyError as error:
        raise ValueError(
            f"from_checkpoint: path: wanted a TokenFlow tokenizer's weights, got {len(state)} tensors without {error.args[0]}"
        ) from error


def convert(state: Mapping[str, Tensor], config: Config) -> Converted:
    """Released weights under our names; keys of the semantic decoder have no bias, ours is zero."""
    zeros = {
        name.replace("q_bias", "k_bias"): torch.zeros_like(value)
        for name, value in state.items()
        if name.startswith("decoder_vqkd.") and name.endswith(".attn.q_bias")
    }
    drops = DROPS
    if config.tower.kind == "siglip":
        last = rf"encoder_vqkd\.vision_model\.encoder\.layers\.{config.tower.depth}\..*"
        drops = [*drops, (last, "the last block, behind the features that are read")]
    return rename({**state, **zeros}, RULES, drops)


def tower_start(state: Mapping[str, Tensor], tower: Tower) -> Converted:
    """The vision tower's part of a CLIP's or SigLIP's weights, under the names of the module that `tower.build()` makes."""
    converted = rename(state, [*STARTS, *CLIP, *SIGLIP, *VITAMIN])
    at, unread = "semantic_encoder.tower.", ("post_norm.", f"blocks.{tower.depth}.") if tower.kind == "siglip" else ()
    return Converted(
        {
            name.removeprefix(at): value
            for name, value in converted.state.items()
            if name.startswith(at) and not name.removeprefix(at).startswith(unread)
        }
    )
