"""How much of a codebook stays in use: `python benchmarks/usage.py` trains a small autoencoder on the demo's pictures.

For each update rule it takes random codes, codes placed by k-means, and dead codes revived, around the same encoder, which has
trained without a quantizer for `--warmup` steps. k-means sees `--placed` pictures at once: a batch has too few rows for so many
codes. "none" cannot revive, so it also shows an encoder that stands still, which is what such a codebook is for. Usage and
perplexity are those of the last `--window` steps; the picture shows usage of every such window. Needs the packages of
`pip install ".[bench,models]"` and, the first time, npm.
"""

import argparse
import copy
import warnings
from pathlib import Path

import torch
from tokenflow.data import fluent_emoji, image_folder
from tokenflow.training.run import batch_rows
from torch import nn
from tqdm import tqdm

from tokenflow_ext.quantize import VectorQuantizer

REMEDIES = {
    "random codes": {},
    "k-means": {"kmeans_init": True},
    "revival": {"dead_code_threshold": 0.1},
    "k-means, revival": {"kmeans_init": True, "dead_code_threshold": 0.1},
    "k-means, frozen encoder": {"kmeans_init": True},
}
RUNS = [(update, remedy) for update in ("gradient", "ema") for remedy in REMEDIES if "frozen" not in remedy] + [
    ("none", remedy) for remedy in REMEDIES if "revival" not in remedy
]


class Autoencoder(nn.Module):
    """Pictures [B, 3, 64, 64] to 16 x 16 rows of `dim` channels and back, with a quantizer in between or without."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(width, width, 1), nn.SiLU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU(),
            nn.Conv2d(width, 48, 1), nn.PixelShuffle(4),
        )  # fmt: skip
        self.quantizer = None

    def forward(self, images):
        features = self.encoder(images)
        if self.quantizer is None:
            features, loss = nn.functional.normalize(features, dim=1), 0.0
        else:
            features, _, loss = self.quantizer(features)
        return self.decoder(features), loss


def train(
    model: Autoencoder, images: torch.Tensor, steps: int, options, first: int = 0
) -> list[tuple[int, float, float]]:
    """Adam on |x' - x|^2 + the quantizer's loss; ([(step, usage, perplexity) of every window], mean error of the last)."""
    optimiser = torch.optim.Adam(model.parameters(), lr=options.rate)
    history, errors = [], []
    for step in range(1, steps + 1):
        x = images[batch_rows(first + step - 1, len(images), options.batch, seed=0)].float().div_(127.5).sub_(1)
        y, loss = model(x)
        error = (y - x).square().mean()
        optimiser.zero_grad()
        (error + loss).backward()
        optimiser.step()
        errors.append(float(error.detach()))
        options.bar.update()
        if model.quantizer is not None and step % options.window == 0:
            history.append((step, model.quantizer.usage(), model.quantizer.perplexity()))
            model.quantizer.reset_usage()
    return history, sum(errors[-options.window :]) / len(errors[-options.window :])


def table(results: dict, codes: int) -> str:
    """Usage, perplexity and PSNR of the last window as Markdown."""
    lines = [f"| update, K = {codes} | codes | usage | perplexity | PSNR, dB |", "|---|---|--:|--:|--:|"]
    for (update, remedy), (history, error) in results.items():
        _, usage, perplexity = history[-1]
        psnr = -10 * torch.tensor(error / 4).log10().item()
        lines.append(f"| {update} | {remedy} | {usage:.1%} | {perplexity:.0f} | {psnr:.2f} |")
    return "\n".join(lines)


def picture(results: dict, codes: int, path: Path) -> None:
    """Usage over steps, one panel an update rule."""
    import matplotlib.pyplot as plt
    from plots import INK, STYLE

    colours = dict(zip(REMEDIES, ("#b7bec7", "#d1742f", "#a06cb5", "#0a6e8a", "#4cb5c9")))
    with plt.rc_context(STYLE):
        updates = list(dict.fromkeys(update for update, _ in results))
        figure, panels = plt.subplots(1, len(updates), figsize=(13, 3.8), sharey=True)
        for panel, update in zip(panels, updates):
            for (of, remedy), (history, _) in results.items():
                if of == update:
                    steps, usage = [h[0] for h in history], [100 * h[1] for h in history]
                    panel.plot(
                        steps, usage, color=colours[remedy], linewidth=2.2, marker="o", markersize=3.5, label=remedy
                    )
            panel.axhline(95, color=INK, linewidth=0.8, linestyle=":")
            panel.set_title(f'update="{update}"')
            panel.set_xlabel("training step")
            panel.set_ylim(0, 103)
        panels[0].set_ylabel(f"codes in use, % of {codes}")
        lines = {
            line.get_label(): line for panel in panels for line in panel.get_lines() if line.get_label() in colours
        }
        figure.legend(
            lines.values(), lines, loc="lower center", ncols=len(lines), frameon=False, bbox_to_anchor=(0.5, -0.12)
        )
        figure.savefig(path, dpi=140, bbox_inches="tight")
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images instead of the demo's")
    parser.add_argument("--cache", type=Path, default=Path(".cache/tokenflow"), help="where fetched packages lie")
    parser.add_argument("--out", type=Path, default=Path("runs/usage"), help="folder of table and picture")
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--window", type=int, default=40, help="steps that a usage is counted over")
    parser.add_argument("--placed", type=int, default=256, help="pictures that k-means sees")
    parser.add_argument("--decay", type=float, default=0.95)
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()

    pictures = fluent_emoji(options.cache) if options.data is None else image_folder(options.data)
    images = pictures.images[pictures.rows("train", "pair")]
    rows = options.window * options.batch * 256
    print(f"{len(images)} pictures; {rows} rows a window, {rows / options.codes:.0f} a code", flush=True)
    warnings.filterwarnings("ignore", message=".*the codebook collapses")

    torch.manual_seed(0)
    start = Autoencoder(options.dim)
    results, chosen = {}, batch_rows(0, len(images), options.placed, seed=1)
    placed = images[chosen].float().div_(127.5).sub_(1)
    with tqdm(total=options.warmup + len(RUNS) * options.steps, unit="step") as options.bar:
        options.bar.set_description("without a quantizer")
        train(start, images, options.warmup, options)
        for update, remedy in RUNS:
            options.bar.set_description(f"{update}, {remedy}")
            torch.manual_seed(1)
            model = copy.deepcopy(start)
            model.quantizer = VectorQuantizer(
                options.dim, options.codes, update=update, decay=options.decay, channel_dim=1, **REMEDIES[remedy]
            )
            if "k-means" in remedy:
                with torch.no_grad():
                    model.quantizer(model.encoder(placed))
                model.quantizer.reset_usage()
            if "frozen" in remedy:
                model.encoder.requires_grad_(False)
            results[update, remedy] = train(model, images, options.steps, options, first=options.warmup)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(results, options.codes)
    print(text)
    (options.out / "usage.md").write_text(text + "\n")
    picture(results, options.codes, options.out / "usage.png")
    print(f"{options.out / 'usage.png'}")


if __name__ == "__main__":
    main()
