"""CLIP's text tower: captions to vectors that image features are compared with.

    h = token embedding + position embedding -> causal pre-norm blocks -> norm -> h at the end-of-text token @ projection

Parameter names are those of CLIP's published checkpoints. Words become ids by a vocabulary file that the user brings.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenflow.errors import Missing

START, END = "<|startoftext|>", "<|endoftext|>"


class TextAttention(nn.Module):
    """Causal self-attention over [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), GELU between its two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), TextAttention(width, heads), nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTower(nn.Module):
    """Vectors [B, out] of token ids [B, L].

    Args:
        width: of the transformer.
        heads: of its attention; not visible in the shapes of a checkpoint.
        depth: blocks.
        out: width of the vectors.
        context: longest L.
        vocabulary: number of ids; the largest in use must be that of the end of text.

    Example:
        >>> tower = TextTower(width=16, heads=2, depth=1, out=8, context=7, vocabulary=50)
        >>> tower(torch.tensor([[48, 5, 49, 0]])).shape
        torch.Size([1, 8])
    """

    def __init__(
        self, *, width: int = 768, heads: int = 12, depth: int = 12, out: int = 768, context: int = 77, vocabulary: int = 49408
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {
            "width": width,
            "heads": heads,
            "depth": depth,
            "out": out,
            "context": context,
            "vocabulary": vocabulary,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"TextTower: {name}: wanted a positive integer, got {value!r}")
        if width % heads:
            raise ValueError(f"TextTower: heads: wanted a divisor of width {width}, got {heads}")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(TextBlock(width, heads) for _ in range(depth))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, out))
        self._initialise(width, depth)

    @torch.no_grad()
    def _initialise(self, width: int, depth: int) -> None:
        """CLIP's: residual branches start small where there are many."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer["resblocks"]:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors [B, out] of ids [B, L], L up to the context; what follows the first end of text (the row's largest id) is
        padding and changes nothing.

        Raises:
            TypeError: ids are no integers.
            ValueError: another shape, or on the CPU ids that are no words.
        """
        context = len(self.positional_embedding)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"TextTower: ids: wanted integers, got {ids.dtype}")
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= context:
            raise ValueError(f"TextTower: ids: wanted [B, L] with L in 1..{context}, got {list(ids.shape)}")
        words, looking = self.token_embedding.num_embeddings, ids.is_cpu and not torch.compiler.is_compiling()
        if looking and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < words:
            raise ValueError(f"TextTower: ids: wanted 0 to {words - 1}, got {int(ids.min())} to {int(ids.max())}")
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer["resblocks"]:
            x = block(x)
        end = (ids == ids.amax(1, keepdim=True)).cumsum(1).eq(0).sum(1)
        return self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection


class TextTokenizer:
    """Ids [B, context] of captions, from a `tokenizer.json` as CLIP's repositories carry it; zeros after the end of text.

    Args:
        path: the file, or a folder that holds it.
        context: length of a row; longer captions are cut and keep their end of text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no vocabulary, or lacks the words that begin and end a caption.
        tokenflow.errors.Missing: the package `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path, context: int = 77) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise Missing("TextTokenizer: wanted the package tokenizers: pip install tokenizers") from None
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"TextTokenizer: path: wanted a tokenizer.json, got {path}, which does not exist")
        try:
            self.tokenizer, self.context = Tokenizer.from_file(str(path)), context
        except Exception as error:  # the package has no type of its own for it
            raise ValueError(f"TextTokenizer: path: wanted a tokenizer.json, got {path} ({error})") from error
        self.start, self.end = (self.tokenizer.token_to_id(token) for token in (START, END))
        if self.start is None or self.end is None:
            raise ValueError(f"TextTokenizer: path: wanted a vocabulary with {START} and {END}, got {path} without")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def __call__(self, captions: str | Sequence[str]) -> Tensor:
        """Ids [B, context] int64 of the captions."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        rows = torch.zeros(len(captions), self.context, dtype=torch.int64)
        for row, words in zip(rows, self.tokenizer.encode_batch(captions, add_special_tokens=False)):
            ids = [self.start, *words.ids[: self.context - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows
