"""Cost against N, against K and against the number of threads: search at TokenFlow's widths."""

import peers
import pytest
import torch
from harness import Problem, compare, normal

from tokenflow_ext import ops

CODES, WIDTH = 32768, 8
GROWING = {f"N {n}": (n, CODES, WIDTH) for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536)}
GROWING |= {f"K {k}": (16384, k, WIDTH) for k in (2048, 4096, 8192, 16384, 32768, 65536, 131072)}
# rows, codes, width
THREADS = {"A": (16384, 32768, 8), "D": (65536, 8192, 32), "E": (16384, 16384, 256), "one image": (256, 32768, 8)}


def problem(name: str) -> Problem:
    """`name` is one of GROWING or THREADS."""
    rows, codes, width = (GROWING | THREADS)[name]
    x, codebook = normal(rows, width, seed=1), normal(codes, width, seed=2)
    native = torch.no_grad()(lambda: ops.nearest_code(x, codebook))
    calls = {"native": native}
    if name in THREADS:
        calls |= {f"native, {t} thread{'s' * (t > 1)}": peers.on_threads(t, native) for t in (1, 3)}

    def check(results):
        assert all(torch.equal(results["native"], ids) for ids in results.values())

    op = "threads" if name in THREADS else "linear in " + name[0]
    size = f"{name}: N {rows}, K {codes}, D {width}, l2" if name in THREADS else name
    return Problem(op, size, calls, check, flop=2 * rows * codes * width)


@pytest.mark.parametrize("name", [*GROWING, *THREADS])
def bench_search(benchmark, name):
    compare(benchmark, "bench_scaling", name)
