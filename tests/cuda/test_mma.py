"""One mma.sync of the tensor cores: where its operands lie, by the formulas of the PTX ISA, and how exactly it adds.

Emulated everywhere; on a GPU, where there is one, the same probes say whether the emulator's layout is the hardware's.
"""

import emulator
import pytest
import torch
from harness import normal

from tokenflow_ext.ops import _native

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=GPU)])
def device(request):
    return "cpu" if request.param == "emulated" else "cuda"


def fragment(matrix: torch.Tensor, row, column) -> torch.Tensor:
    """[..., 32, n]: what every lane holds of a matrix, its i-th element at (row(g, t, i), column(g, t, i))."""
    n = matrix[0].numel() // 32
    index = [[(row(lane // 4, lane % 4, i), column(lane // 4, lane % 4, i)) for i in range(n)] for lane in range(32)]
    rows, columns = torch.tensor(index).unbind(-1)
    return matrix[:, rows, columns]


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", .bf16: g is groupID, t threadID_in_group.
def fragment_a(a):
    return fragment(
        a,
        lambda g, t, i: g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
        lambda g, t, i: t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8,
    )


def fragment_b(b):
    return fragment(b, lambda g, t, i: t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8, lambda g, t, i: g)


def fragment_c(c):
    return fragment(c, lambda g, t, i: g if i < 2 else g + 8, lambda g, t, i: t * 2 + (i & 1))


def probe(device, a, b, c):
    """The fragments of a b + c [n, 16, 8], by one instruction each."""
    given = [fragment_a(a).bfloat16(), fragment_b(b).bfloat16(), fragment_c(c)]
    given = [t.contiguous().to(device) for t in given]
    d = torch.empty_like(given[2])
    core = emulator.core() if device == "cpu" else _native._C.cuda
    core.mma_probe(*given, d, -1 if device == "cpu" else 0, 0, None)
    return d.cpu()


def units(rows: int, columns: int) -> torch.Tensor:
    """Every matrix that has a single 1."""
    return torch.eye(rows * columns).view(-1, rows, columns)


def test_every_element_lies_where_the_isa_says(device):
    """One element of A or B at a time meets a matrix of distinct integers: its row or column alone appears."""
    a, b = torch.arange(1.0, 257).view(16, 16), torch.arange(1.0, 129).view(16, 8)
    c = 512 * torch.arange(1.0, 129).view(16, 8)
    for left, right in (
        (units(16, 16), b.expand(256, -1, -1)),
        (a.expand(128, -1, -1), units(16, 8)),
    ):
        wanted = torch.stack([sum_of_products(x, y, c) for x, y in zip(left, right, strict=True)])
        assert torch.equal(probe(device, left, right, c.expand(len(left), -1, -1)), fragment_c(wanted))


def sum_of_products(a, b, c):
    """a b + c, by three loops' worth of exact arithmetic."""
    return (a.double()[:, :, None] * b.double()[None]).sum(1).float() + c


def test_a_permuted_operand_would_be_seen():
    """The probe's own power: A transposed, its register pairs or its halves swapped give other numbers."""
    a, b, c = torch.arange(1.0, 257).view(1, 16, 16), torch.arange(1.0, 129).view(1, 16, 8), torch.zeros(1, 16, 8)
    right = probe("cpu", a, b, c)
    order = torch.arange(16)
    for other in (a.mT, a[:, order ^ 8], a[:, :, order ^ 8], a[:, :, order ^ 1], a[:, order ^ 1]):
        assert not torch.equal(probe("cpu", other, b, c), right)


@pytest.mark.parametrize("spread", [0, 8, 40])
def test_sums_are_as_exact_as_the_certified_search_takes_for_granted(device, spread):
    """|d - (a b + c)| <= 2^-16 (|c| + sum |a b|): on a GPU the only evidence there is for the assumption of the proof."""
    n = 300
    size = (2.0 ** (spread * (torch.rand(3, n, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5))).float()
    a, b = normal(n, 16, 16, seed=1) * size[0], normal(n, 16, 8, seed=2) * size[1][..., :8]
    c = normal(n, 16, 8, seed=3) * size[2][..., :8]
    a, b = a.bfloat16().double(), b.bfloat16().double()
    exact, sizes = a @ b + c.double(), a.abs() @ b.abs() + c.double().abs()
    worst = []
    for cores in emulator.TENSOR_CORES if device == "cpu" else ["hardware"]:
        if device == "cpu":
            emulator.configure(emulator.core(), tensor_cores=cores)
        d = probe(device, a, b, c).double()
        error = (d - fragment_c(exact)) / fragment_c(sizes)
        worst.append(error.abs().max().item())
        print(f"{cores}: from 2^{torch.tensor(worst[-1]).log2():.1f} of the sum of sizes, mean {error.mean():.1e}")
        assert worst[-1] <= 2.0**-16
    if device == "cpu":
        ampere, hopper, volta, *_, up, down = worst
        assert hopper < ampere < volta < 2.0**-18.5 and min(up, down) > 0.98 * 2.0**-16


@pytest.mark.parametrize(
    ("cores", "small", "sum_"),
    [
        ("ampere", 2.0**-24, 1.0),  # eight products and 1: each 2^-24 is kept, their sum 2^-21 is
        ("hopper", 2.0**-25, 1.0),
        ("volta", 2.0**-23, 1.0),
    ],
)
def test_the_models_keep_as_many_bits_as_was_measured(cores, small, sum_):
    """Products of the last bit kept arrive together; those of half of it are all lost, which IEEE sums would not do."""
    emulator.configure(emulator.core(), tensor_cores=cores)
    a, b, c = torch.zeros(1, 16, 16), torch.zeros(1, 16, 8), torch.full((1, 16, 8), sum_)
    a[:], b[:] = 1, small
    assert (probe("cpu", a, b, c) == sum_ + 16 * small).all()
    assert (probe("cpu", a, b / 2, c) == sum_).all()
    emulator.configure(emulator.core(), tensor_cores="floored")
    assert (probe("cpu", -a, b / 16, c) < sum_ - 2.0**-23).all()


def test_infinities_and_nan(device):
    a, b, c = torch.ones(3, 16, 16), torch.ones(3, 16, 8), torch.zeros(3, 16, 8)
    a[0, 3, 5], b[1, 2, 4], c[2, 7, 1] = torch.inf, torch.nan, -torch.inf
    wanted = torch.full((3, 16, 8), 16.0)
    wanted[0, 3], wanted[1, :, 4], wanted[2, 7, 1] = torch.inf, torch.nan, -torch.inf
    torch.testing.assert_close(probe(device, a, b, c), fragment_c(wanted), rtol=0, atol=0, equal_nan=True)


def test_bad_input():
    core = emulator.core()
    with pytest.raises(ValueError, match="mma_probe: a: wanted bfloat16"):
        core.mma_probe(torch.zeros(1, 32, 8), *[torch.zeros(1, 32, 4)] * 3, -1, 0, None)
