"""The checks, smallest first. Nothing here imports torch: the list stands even where torch cannot be imported."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
SHAPES = (
    *("lookup, TokenFlow's pixel table", "search, LlamaGen", "search, VAR", "search, A, TokenFlow's pixel table"),
    *("search, C, UniTok", "search, D, wide VAR", "search, E, VQGAN", "search, IBQ"),
    *("quantize, 16 images", "training, 1 image", "training, 16 images", "multi-scale, TokenFlow", "multi-scale, VAR"),
)
"""What is timed: gpu_check/timing.py says how large each is."""


class Skip(Exception):
    """A check that cannot be made here, and why."""


class NoGpu(Exception):
    """Nothing can be checked here, and why."""


@dataclass(frozen=True)
class Check:
    """`function` of gpu_check.<module>, called with the place and `arguments`; returns what is told of it."""

    name: str
    module: str
    function: str
    arguments: tuple = ()
    seconds: int = 120

    def call(self) -> Callable:
        return getattr(importlib.import_module(f"gpu_check.{self.module}"), self.function)


def plan(emulated: bool) -> list[Check]:
    """All of them; in the rehearsal one of a kind where many would run the same lines."""
    door = (ROOT / "csrc/cuda/bindings.h").read_text()
    tests = (ROOT / "tests/cuda/test_on_device.py").read_text()
    ops = re.findall(r"TOKENFLOW_CUDA_OP\((\w+)\);", door)
    suites, shapes = re.findall(r"^def (test_\w+)\(place", tests, re.MULTILINE), SHAPES
    if emulated:
        ops = [
            op for op in ops if op in ("nearest_code", "lookup", "lookup_backward", "ema_update", "multiscale_quantize")
        ]
        suites, shapes = suites[:1], [next(s for s in SHAPES if s.startswith(k)) for k in ("look", "sea", "tr", "mu")]
    return [
        Check("driver and device", "machine", "driver", seconds=300),
        Check("copy and one kernel", "machine", "copy"),
        Check("record the CPU's kernels", "calls", "record_all"),
        Check("tensor cores", "tensor_cores", "layout_and_sums", seconds=300),
        *(Check(f"op {op}", "calls", "op", (op,), 300) for op in ops if op != "mma_probe"),
        *(Check(f"suite {name}", "machine", "suite", (name,), 600) for name in suites),
        *(Check(f"sanitizer {tool}", "sanitizer", "under", (tool,), 900) for tool in TOOLS),
        *(Check(f"timing {shape}", "timing", "measured", (shape,), 600) for shape in shapes),
    ]


BEFORE_ALL = 3
"""So many checks run alone and first: others read what they leave, or say nothing where they fail."""
