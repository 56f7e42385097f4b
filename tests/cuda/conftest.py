"""Every test of this folder has the emulated kernels as backend="emulated", in the forward schedule unless it asks otherwise."""

import emulator
import pytest


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
