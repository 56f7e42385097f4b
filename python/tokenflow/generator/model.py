"""The generator: a small transformer that writes a picture's tokens scale by scale, from its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow.generator.attention import Block, Cache
from tokenflow.generator.draft import Draft
from tokenflow.generator.head import ResidualHead
from tokenflow.generator.vocabulary import PAD, Vocabulary
from tokenflow.models import saved
from tokenflow_ext.ops import multiscale_inputs

NEIGHBOURS = 9


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator.

    Attributes:
        scales: sides of the token grids, coarse to fine; the last is the side of the feature map.
        dims: widths of the halves of the shared index.
        weights: weight of each half in the search.
        codes: K.
        width, heads, ratio: channels, attention heads, hidden over outer channels of the mlp.
        text_blocks, blocks: transformer blocks over the words alone, and over words and tokens.
        low_rank: rank of the head's free part.
        rank: principal components of the draft.
        strength: ridge of the draft, see `Draft.fit`.
    """

    scales: tuple[int, ...]
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    codes: int
    width: int = 256
    heads: int = 4
    ratio: int = 4
    text_blocks: int = 2
    blocks: int = 4
    low_rank: int = 64
    rank: int = 1024
    strength: float = 0.02


@dataclass
class Session:
    """What sampling keeps between two scales: keys and values of each block, the mask of the words, the conditions."""

    past: list[Cache]
    mask: Tensor
    condition: Tensor


class Generator(nn.Module):
    """Words and token inputs -> logits of the tokens.

    The sequence is T words, then L positions, one a token. Position i of scale k is told x, what the scales before k have written
    there, and the draft, both with their eight neighbours on the grid of scale k; its place; and the caption as a whole. A scale
    sees the words, the scales before it and itself, but the positions of the last scale do not see each other: so a training step
    computes any few of them and stays exact.

    Args:
        config: sizes.
        vocabulary: of the training captions.
        codebooks: the tokenizer's, as searched, one [K, D_t] a half.
        draft: fitted to the training captions.
    """

    def __init__(
        self, config: GeneratorConfig, vocabulary: Vocabulary, codebooks: Sequence[Tensor], draft: Draft
    ) -> None:
        super().__init__()
        self.config, self.vocabulary, self.draft = config, vocabulary, draft
        width, levels = config.width, len(config.scales)
        self.lengths = [s * s for s in config.scales]
        self.register_buffer(
            "level", torch.repeat_interleave(torch.arange(levels), torch.tensor(self.lengths)), persistent=False
        )
        self.register_buffer("near", neighbours(config.scales), persistent=False)
        for t, codebook in enumerate(codebooks):
            self.register_buffer(f"codebook{t}", codebook.detach().float().clone())
        self.words = nn.Embedding(len(vocabulary), width, padding_idx=PAD)
        self.word_place = nn.Parameter(torch.randn(vocabulary.length, width) * 0.02)
        self.place = nn.Parameter(torch.randn(sum(self.lengths), width) * 0.02)
        self.level_embedding = nn.Parameter(torch.randn(levels, width) * 0.02)
        self.enter = nn.Linear(2 * NEIGHBOURS * sum(config.dims), width)
        self.caption = nn.Linear(width, width)
        self.doubt = nn.Linear(2, width)
        self.text_blocks = nn.ModuleList(Block(width, config.heads, config.ratio) for _ in range(config.text_blocks))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.ratio) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.head = ResidualHead(width, codebooks, config.weights, levels, config.low_rank)
        nn.init.normal_(self.words.weight, std=0.05)

    @property
    def codebooks(self) -> list[Tensor]:
        """The tokenizer's codebooks, one [K, D_t] a half."""
        return [getattr(self, f"codebook{t}") for t in range(len(self.config.dims))]

    def inputs(self, indices: Tensor) -> Tensor:
        """x at the positions of scale 1 and of every scale that the indices [B, L'] allow: [B, rows, C], zero at scale 1."""
        scales = self.config.scales
        rest = multiscale_inputs(
            indices, self.codebooks, scales=scales, size=(scales[-1], scales[-1]), rule="accumulate"
        )
        return torch.cat([rest.new_zeros(len(indices), self.lengths[0], sum(self.config.dims)), rest], dim=1)

    def rows(self, maps: Tensor) -> Tensor:
        """maps [B, C, H, W] averaged to every scale: [B, L, C]."""
        return torch.cat([F.adaptive_avg_pool2d(maps, s).flatten(2).transpose(1, 2) for s in self.config.scales], dim=1)

    def read(self, ids: Tensor, doubt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The words [B, T] -> their states [B, T, width], their mask [B, 1, 1, T] and the condition [B, 1, width]."""
        hidden = ids.eq(PAD)
        mask = torch.zeros(ids.shape, device=ids.device).masked_fill(hidden, -torch.inf)[:, None, None]
        text = self.words(ids) + self.word_place[: ids.shape[1]]
        for block in self.text_blocks:
            text, _ = block(text, mask=mask)
        shown = (~hidden)[..., None].to(text.dtype)
        pooled = (text * shown).sum(1) / shown.sum(1)
        condition = self.caption(pooled) + self.doubt(torch.stack([doubt, doubt.clamp(min=0).sqrt()], dim=1))
        return text, mask, condition[:, None]

    def embed(self, inputs: Tensor, draft: Tensor, condition: Tensor, positions: Tensor, offset: int = 0) -> Tensor:
        """Hidden states [B, n, width] that enter the blocks.

        Args:
            inputs, draft: x and the draft, [B, rows, C]: rows offset, offset + 1, ... of the L positions.
            condition: [B, 1, width].
            positions: which of the L positions, int64 [n], or [B, n].
            offset: position of the first row of `inputs`.
        """
        both = F.pad(torch.cat([inputs, draft], dim=-1), (0, 0, 0, 1))
        near = self.near[positions] - offset
        near = near.where(self.near[positions] >= 0, both.shape[1] - 1)
        if positions.dim() == 1:
            patch = both[:, near].flatten(2)
        else:
            patch = both[torch.arange(len(both))[:, None, None], near].flatten(2)
        place = self.place + F.embedding(self.level, self.level_embedding)
        return self.enter(patch) + F.embedding(positions, place) + condition

    def forward(
        self, ids: Tensor, inputs: Tensor, draft: Tensor, doubt: Tensor, *, last: Tensor | None = None
    ) -> Tensor:
        """Logits [B, n, K] of all positions before the last scale and of some, or all, of the last.

        Args:
            ids: words [B, T].
            inputs: x [B, L, C].
            draft: [B, L, C].
            doubt: of the draft, [B], in [0, 1].
            last: positions of the last scale to compute, int64 [B, m] in [L - s_S^2, L); None: all of them.
        """
        positions = self.positions(len(ids), last)
        return self.head(*self._states(ids, inputs, inputs, draft, doubt, positions), self.level[positions])

    def loss(
        self,
        ids: Tensor,
        inputs: Tensor,
        draft: Tensor,
        doubt: Tensor,
        indices: Tensor,
        weights: Tensor,
        *,
        last: Tensor,
        noise: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """What `ResidualHead.loss` returns, of the tokens `indices` [B, L], each weighted by `weights` [L].

        Args:
            ids, inputs, draft, doubt, last: as in `forward`.
            noise: standard deviation of what is added to x as the blocks see it; the head keeps the clean x.
        """
        positions = self.positions(len(ids), last)
        seen = inputs + noise * torch.randn_like(inputs)
        states = self._states(ids, seen, inputs, draft, doubt, positions)
        return self.head.loss(*states, self.level[positions], indices.gather(1, positions), weights[positions])

    def positions(self, batch: int, last: Tensor | None) -> Tensor:
        """All positions before the last scale, then those of the last, or all: int64 [B, n]."""
        early = torch.arange(len(self.level) - self.lengths[-1], device=self.level.device).expand(batch, -1)
        if last is None:
            last = torch.arange(early.shape[1], len(self.level), device=self.level.device).expand(batch, -1)
        return torch.cat([early, last], dim=1)

    def _states(
        self, ids: Tensor, seen: Tensor, inputs: Tensor, draft: Tensor, doubt: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, n, width] after the last block, and draft and inputs there, [B, n, C] each."""
        early = len(self.level) - self.lengths[-1]
        text, mask, condition = self.read(ids, doubt)
        x = torch.cat([text, self.embed(seen, draft, condition, positions)], dim=1)
        mask = self._mask(mask, early)
        for block in self.blocks:
            x, _ = block(x, mask=mask, alone=positions.shape[1] - early)
        row = positions[..., None].expand(-1, -1, inputs.shape[-1])
        return self.norm(x[:, ids.shape[1] :]), draft.gather(1, row), inputs.gather(1, row)

    def _mask(self, words: Tensor, early: int) -> Tensor:
        """[B, 1, T + early, T + early]: words see words, a position sees words and the scales up to its own."""
        level = torch.cat([torch.full((words.shape[-1],), -1, device=words.device), self.level[:early]])
        later = torch.zeros(len(level), len(level), device=words.device).masked_fill(
            level[None] > level[:, None], -torch.inf
        )
        return F.pad(words, (0, early)) + later

    def start(self, ids: Tensor, doubt: Tensor) -> Session:
        """Read the words [B, T] once for all scales."""
        text, mask, condition = self.read(ids, doubt)
        past = []
        for block in self.blocks:
            text, cache = block(text, mask=mask)
            past.append(cache)
        return Session(past, mask, condition)

    def step(self, session: Session, scale: int, inputs: Tensor, draft: Tensor) -> Tensor:
        """Logits [B, s^2, K] of one scale; its keys and values join the session.

        Args:
            session: after `start` and the steps of all scales before.
            scale: which, from 0.
            inputs, draft: x and the draft at this scale, [B, s^2, C].
        """
        offset, last = sum(self.lengths[:scale]), scale == len(self.lengths) - 1
        positions = torch.arange(offset, offset + self.lengths[scale], device=inputs.device)
        x = self.embed(inputs, draft, session.condition, positions, offset)
        keys = session.past[0][0].shape[2] + (0 if last else self.lengths[scale])
        mask = F.pad(session.mask, (0, keys - session.mask.shape[-1]))
        for i, block in enumerate(self.blocks):
            x, fresh = block(x, past=session.past[i], mask=mask, alone=self.lengths[scale] if last else 0)
            if not last:
                session.past[i] = tuple(torch.cat(pair, dim=2) for pair in zip(session.past[i], fresh, strict=True))
        return self.head(self.norm(x), draft, inputs, self.level[positions])

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        draft = {"fitted": len(self.draft.words), "width": self.draft.words.shape[1], "rank": len(self.draft.basis)}
        description = {"config": asdict(self.config), "vocabulary": self.vocabulary.to_dict(), "draft": draft}
        saved.save(folder, description, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Generator:
        """Read what `save_pretrained` wrote; the model is in eval mode.

        Raises:
            FileNotFoundError: the folder holds no generator.
            ValueError: a file is broken, or they are of two models.
        """
        description, state = saved.load(Path(folder), caller="Generator.from_pretrained: folder")
        config = GeneratorConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
        )
        vocabulary = Vocabulary.from_dict(description["vocabulary"])
        side = config.scales[-1]
        draft = Draft(len(vocabulary.words), shape=(sum(config.dims), side, side), **description["draft"])
        self = cls(config, vocabulary, [torch.zeros(config.codes, d) for d in config.dims], draft)
        self.load_state_dict(state)
        return self.eval()


def neighbours(scales: Sequence[int]) -> Tensor:
    """Positions of the 3 x 3 window around each of the L positions, on the grid of its own scale: [L, 9], -1 outside."""
    windows, offset = [], 0
    for s in scales:
        grid = F.pad(torch.arange(offset, offset + s * s).view(s, s), (1, 1, 1, 1), value=-1)
        windows.append(grid.unfold(0, 3, 1).unfold(1, 3, 1).reshape(s * s, NEIGHBOURS))
        offset += s * s
    return torch.cat(windows)
