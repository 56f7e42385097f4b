"""The pictures of these pages, each from calls of the modules: `python docs/quantizers/pictures.py` (matplotlib, in `.[bench]`)."""

from pathlib import Path

import matplotlib.pyplot as plt
from drawing import STYLE
from pictures_family import multi_codebook, multi_scale, rotation, shared_index, vector
from pictures_related import attention, index_propagation, product, projected, residual, sign

PICTURES = (
    multi_codebook, vector, rotation, shared_index, multi_scale, product, index_propagation, attention, projected, sign, residual,
)  # fmt: skip


def write(folder: Path, suffix: str = "svg") -> list[Path]:
    """Draws every picture into the folder; the same bytes every time."""
    written = []
    with plt.rc_context(STYLE):
        for draw in PICTURES:
            path, figure = folder / f"{draw.__name__}.{suffix}", draw()
            # The layout's last bits vary from run to run.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            for ax in figure.axes:
                ax.set_position([round(side, 4) for side in ax.get_position(original=True).bounds])
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            plt.close(figure)
            written.append(path)
    return written


if __name__ == "__main__":
    for path in write(Path(__file__).parent):
        print(path)
