"""The certified scan on what a trained tokenizer searches: every pooled residual of its pictures, in its own codebooks.

python tests/certified/residuals.py runs/demo      after `tokenflow demo`, on every picture of it
"""

import sys
from pathlib import Path

import torch
from tokenflow.models.tokenflow import TokenFlow

from tokenflow_ext import ops, search_precision, trace
from tokenflow_ext.ops._search_path import SearchTrace


@torch.no_grad()
def compare(model: TokenFlow, images: torch.Tensor) -> tuple[SearchTrace, int]:
    """Ids of both scans of images [B, 3, H, W], scale by scale, with scores; returns the trace and the rows compared.

    Raises:
        AssertionError: an id or a score's bit differs.
    """
    quantizer = model.quantizer
    tables, options = quantizer.codebooks(), quantizer._options()
    features = model.encode_features(images).float()
    with search_precision("full"):
        indices = quantizer.encode(features)
    rows = ops.multiscale_rows(features, indices, tables, **options, weights=quantizer.quantizer.weights)
    rows = rows.reshape(-1, rows.shape[-1])
    with search_precision("certified"), trace() as searched:
        assert torch.equal(quantizer.encode(features), indices)
        certified = rows_searched(rows, quantizer)
    with search_precision("full"):
        full = rows_searched(rows, quantizer)
    assert all(torch.equal(a, b) for a, b in zip(certified, full, strict=True))
    return searched, len(rows)


def rows_searched(rows: torch.Tensor, quantizer) -> tuple[torch.Tensor, ...]:
    """Shared ids [N] of the rows [N, C], then ids and scores of every table by itself, best three."""
    tables, metric = quantizer.codebooks(), quantizer.quantizer.metric
    parts = [part.contiguous() for part in rows.split([table.shape[1] for table in tables], dim=1)]
    found = [ops.shared_nearest_code(parts, tables, metric=metric, weights=quantizer.quantizer.weights)]
    for part, table in zip(parts, tables, strict=True):
        for other in ("l2", "cosine", "dot"):
            found += ops.nearest_code(part, table, metric=other, return_scores=True)
    return tuple(found)


def main(folder: Path) -> None:
    from tokenflow.data import fluent_emoji
    from tqdm import tqdm

    model = TokenFlow.from_pretrained(folder / "tokenizer").eval()
    pictures = fluent_emoji(Path(".cache/tokenflow"))
    total, rows = SearchTrace(), 0
    for chunk in tqdm(torch.arange(len(pictures)).split(64), unit="batch"):
        searched, some = compare(model, pictures.float_images(chunk))
        rows += some
        for name, count in vars(searched).items():
            setattr(total, name, getattr(total, name) + count)
    print(f"{len(pictures)} pictures, {rows} residuals, equal ids and scores; {total}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
