"""Where a tensor core's operands lie and how exactly it adds: what the certified search takes for granted of a GPU.

docs/certified_search.md needs that a chain of D products d = c + sum_i x'_i c'_i, sixteen an instruction, is within
4 (D + 16) 2^-22 (|c| + sum_i |x'_i c'_i|) + D 2^-126 of the exact sum. The sums here try to break that.
"""

import importlib.util

import torch
from gpu_check.machine import run_tests
from gpu_check.place import Gpu
from gpu_check.plan import ROOT, Skip
from harness import normal

WIDTHS = (16, 64, 256, 656)
ALLOWED = 0.25
"""The share of the bound that a GPU may use: a quarter leaves room for what these sums do not find."""


def sums(kind: str, width: int, count: int):
    """x' [count, 16, width], c' [count, width, 8] of bfloat16 numbers and the start c [count, 16, 8], as float32."""
    x, codes = normal(count, 16, width, seed=1), normal(count, width, 8, seed=2)
    start = normal(count, 16, 8, seed=3)
    at = torch.arange(width)
    if kind == "one sign":  # every cut goes the same way
        x, codes, start = x.abs() + 0.5, codes.abs() + 0.5, start.abs()
    elif kind == "spread":  # exponents far apart
        x = x * 2.0 ** (40 * torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) - 20).round()
    elif kind == "cancelling":  # large products that leave small ones
        x[..., 1::2], codes[:, 1::2] = -x[..., ::2], codes[:, ::2]
        x[..., ::8] *= 2.0**-12
    elif kind == "below the last bit":  # one product of 1 in sixteen, the others too small for its last bit
        x, codes = torch.where(at % 16 == 0, 1.0, 2.0**-25).expand_as(x), torch.ones_like(codes)
        start = torch.zeros_like(start)
    elif kind == "large start":
        x, codes, start = (x.abs() + 0.5) * 2.0**-12, codes.abs() + 0.5, start.abs() * 2.0**12
    elif kind == "rising":
        x = (x.abs() + 0.5) * 2.0 ** (at / 16)
        codes = codes.abs() + 0.5
    elif kind == "subnormal":
        x, codes, start = x * 2.0**-64, codes * 2.0**-64, start * 2.0**-128
    return x.bfloat16().float(), codes.bfloat16().float(), start


KINDS = "normal", "one sign", "spread", "cancelling", "below the last bit", "large start", "rising", "subnormal"


def layout_and_sums(place: Gpu) -> str:
    """The tests of mma_probe, then the largest error over the bound."""
    if not hasattr(place.core, "mma_probe"):
        raise Skip("missing: the CUDA door of this build has no mma_probe")
    passed = run_tests(place, "test_mma.py::test_every_element_lies_where_the_isa_says")
    spec = importlib.util.spec_from_file_location("test_mma", ROOT / "tests/cuda/test_mma.py")
    mma = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mma)
    worst, what = 0.0, ""
    for width in WIDTHS:
        for kind in KINDS:
            ratio = error_over_bound(mma, place, kind, width, count=4)
            print(f"D {width}, {kind}: {ratio:.4f}")
            if ratio > worst:
                worst, what = ratio, f"D {width}, {kind}"
    assert worst <= ALLOWED, f"the error is {worst:.3f} of the bound ({what}): more than {ALLOWED}"
    return f"layout as in the PTX ISA ({passed}); largest error {worst:.3f} of the bound ({what})"


def error_over_bound(mma, place: Gpu, kind: str, width: int, count: int) -> float:
    x, codes, start = sums(kind, width, count)
    exact = x.double() @ codes.double() + start.double()
    size = x.double().abs() @ codes.double().abs() + start.double().abs()
    bound = 4 * (width + 16) * 2.0**-22 * size + width * 2.0**-126
    total = start
    for at in range(0, width, 16):
        d = mma.probe(place.device.type, x[..., at : at + 16], codes[:, at : at + 16], total)
        total = unfragment(mma, d)
    return float(((total.double() - exact).abs() / bound).max())


def unfragment(mma, d: torch.Tensor) -> torch.Tensor:
    """[n, 16, 8] of what the lanes hold."""
    where = mma.fragment_c(torch.arange(128.0).view(1, 16, 8)).long().flatten()
    total = torch.empty(len(d), 128)
    total[:, where] = d.reshape(len(d), 128)
    return total.view(-1, 16, 8)
