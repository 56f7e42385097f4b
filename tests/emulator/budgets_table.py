"""docs/cuda_budgets.md, written by `python tests/emulator/budgets.py --table`."""

import json
import re

from emulator.budgets import FILE, occupancy
from emulator.floors import DEVICES, FLOORS
from emulator.programs import ROOT

PAGE = ROOT / "docs/cuda_budgets.md"
SHOWN = (80, 90)
HEAD = """# What the CUDA kernels take

Written by `python tests/emulator/budgets.py --table`. Nothing here was measured on a GPU.

## Kernels

Registers and static shared bytes are those of the cubins, occupancy (blocks of a multiprocessor, share of its warps) follows from
them and `__launch_bounds__`, without the dynamic shared memory that a launch asks for. `tests/test_cuda_budgets.py` holds all six architectures to
`tests/emulator/budgets.json`; no kernel has a stack or spills. The loop is the innermost one with the most float instructions, on sm_80:
float / integer instructions, of the loads from shared memory those of 16 bytes.

Sectors and wavefronts are **a model**: the PTX of compute_80 runs in emulation on small problems of the models' widths, and what a warp's
request touches is counted: 32-byte sectors of global memory, passes over the 32 banks of shared memory, beside the fewest that its bytes need.
Caches, and warps that the GPU splits otherwise, are not in it.

"""
FLOOR_HEAD = """
## Bytes, operations, floors

The formulas of the headers of `csrc/cuda` (`tests/emulator/floors.py`), float32; the floor is the longer of bytes / bandwidth and operations /
peak (A100 2.0 TB/s and 19.5 TFLOP/s, H100 3.35 TB/s and 67 TFLOP/s). PyTorch's bytes are those of the expression without this package, each of
its operations reading its operands and writing its result once.

"""


def kernel_columns(kernel: str, of: dict) -> list[str]:
    """What is known of a kernel without running it."""
    cells = [kernel, str(of["threads"])]
    for architecture in SHOWN:
        registers, shared = of[str(architecture)]["registers"], of[str(architecture)]["shared"]
        blocks, filled = occupancy(architecture, registers, shared, of["threads"])
        cells.append(f"{registers} / {shared} / {blocks}, {filled:.0%}")
    loop = of["80"]["loop"]
    cells.append(
        f"{loop.get('float', 0)} / {loop.get('integer', 0)}, {loop.get('wide LDS', 0)} of {loop.get('LDS', 0)}"
    )
    return cells


def floor_columns(floor) -> list[str]:
    shape = ", ".join(f"{key} {value}" for key, value in floor.shape.items())
    times = [f"{floor.microseconds(device):.1f}" for device in DEVICES]
    work = f"{floor.computed / 1e9:.2f}" if floor.computed else "-"
    ratio = f"{floor.torch_bytes / 1e6:.0f} ({floor.torch_bytes / floor.bytes:.1f}x)"
    return [floor.op, shape, f"{floor.bytes / 1e6:.1f}", work, *times, ratio]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def traffic() -> dict[str, list[str]]:
    """Kernel: sectors of a global request, wavefronts of a shared one, each beside the fewest."""
    from emulator.kernels import expected, replay, traced_program

    ran, _ = replay(traced_program(80), expected("typical"))
    assert ran.code == 0, ran.text
    made = {}
    for file, name, *numbers in re.findall(
        r"^traffic: (\w+)\.cu: (.*): " + r" ".join([r"(\d+)"] * 6), ran.text, re.MULTILINE
    ):
        requests, sectors, least, shared, wavefronts, fewest = map(int, numbers)
        cells = [f"{sectors / requests:.1f} / {least / requests:.1f}" if requests else "-"]
        cells.append(f"{wavefronts / shared:.2f} / {fewest / shared:.2f}" if shared else "-")
        made[f"{file}: {re.sub('tokenflow_ext::(cuda::)?', '', name)}"] = cells
    return made


def write() -> None:
    budgets, counted = json.loads(FILE.read_text()), traffic()
    titles = ["kernel", "threads", *(f"sm_{a}: registers / shared / occupancy" for a in SHOWN), "loop"]
    titles += ["sectors / least", "wavefronts / least"]
    lines = [row(titles), row(["---"] * len(titles))]
    lines += [row([*kernel_columns(kernel, of), *counted.get(kernel, ["-", "-"])]) for kernel, of in budgets.items()]
    titles = ["op", "shape", "MB", "Gop", *(f"{d}, us" for d in DEVICES), "PyTorch, MB"]
    floors = [row(titles), row(["---"] * len(titles)), *(row(floor_columns(floor)) for floor in FLOORS)]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + FLOOR_HEAD + "\n".join(floors) + "\n")
