"""Every test of this folder has the emulated kernels as backend="emulated", in the forward schedule unless it asks otherwise."""

import math

import emulator
import pytest
import torch

GUARD = 64


@pytest.fixture(autouse=True)
def core():
    """The emulated module."""
    module = emulator.core()
    emulator.configure(module)
    return module


@pytest.fixture(params=emulator.SCHEDULES)
def schedule(request, core):
    """The test runs under each order of threads and blocks."""
    emulator.configure(core, request.param, seed=7)
    return request.param


@pytest.fixture
def guarded():
    """guarded(*shape, dtype=, shift=) is an output amid numbers that nobody may write, `shift` numbers off their alignment."""
    made = []

    def make(*shape, dtype=torch.float32, shift=0):
        size, start = math.prod(shape), GUARD + shift
        whole = torch.full((start + size + GUARD,), 77, dtype=dtype)
        whole[start : start + size] = torch.nan if dtype.is_floating_point else -77
        made.append((whole, start, start + size))
        return whole[start : start + size].view(shape)

    yield make
    for whole, start, end in made:
        assert (whole[:start] == 77).all() and (whole[end:] == 77).all(), "written outside an output"
