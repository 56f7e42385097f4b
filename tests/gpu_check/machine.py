"""The first checks: driver and device, a copy, the smallest kernel; and the tests of tests/cuda on this machine."""

import subprocess
import warnings

import pytest
import torch
from gpu_check.place import Gpu
from gpu_check.plan import ROOT, NoGpu

from tokenflow_ext import ops


def driver(place: Gpu) -> str:
    """What is here, or a sentence about what is missing."""
    state = place.state()
    if not state.architectures:
        raise NoGpu("this tokenflow_ext was built without nvcc: install CUDA's compiler and run `pip install .` again")
    if state.problem and ("got none" in state.problem or "ordinal" in state.problem):
        raise NoGpu(f"no GPU: {state.problem}")
    assert not state.problem, state.problem  # an old driver, an old device
    if state.torch_cuda is None:
        raise NoGpu(f"torch {torch.__version__} is built without CUDA: install one that is, see pytorch.org")
    assert state.torch_sees, "torch.cuda.is_available() is False though the driver answers: torch wants a newer driver"
    p = place.properties()
    words = [
        f"driver {version(place.driver_command)}", p.name, f"compute capability {p.major}.{p.minor}",
        f"{p.total_memory / 2**30:.0f} GiB", f"{1 + len(place.others())} devices",
        f"torch {torch.__version__} of CUDA {state.torch_cuda}", f"kernels for {', '.join(state.architectures)}",
    ]  # fmt: skip
    if f"sm_{p.major}{p.minor}" not in state.architectures:
        words.append("this device's are made from PTX when they are first launched")
    return ", ".join(words)


def version(command: list[str]) -> str:
    """The driver's, by NVIDIA's tool."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (nvidia-smi does not run)"


def copy(place: Gpu) -> str:
    """A tensor of every type there and back, then `lookup`."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        here = torch.arange(100).to(dtype)
        assert torch.equal(here.to(place.device).cpu(), here), f"{dtype} came back changed"
    table, ids = torch.arange(24.0).view(6, 4), torch.tensor([5, 0, 3])
    rows = ops.lookup(ids.to(place.device), table.to(place.device), backend=place.backend)
    assert torch.equal(rows.cpu(), table[ids]), f"lookup gave {rows.tolist()}"
    return "float32, float16, bfloat16, int64; lookup of 3 rows"


class _Outcomes:
    """How the tests of a run ended."""

    def __init__(self):
        self.passed, self.failed, self.skipped = 0, [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(f"{report.nodeid.split('::')[-1]}: {report.longrepr.reprcrash.message.splitlines()[0]}")
        elif report.skipped:
            self.skipped.append(str(report.longrepr[-1]))
        elif report.when == "call":
            self.passed += 1


def run_tests(place: Gpu, *nodes: str) -> str:
    """pytest on tests of tests/cuda, with the parameter of this place."""
    outcomes = _Outcomes()
    options = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", place.name]
    options.append("--import-mode=importlib")  # NVIDIA's packages for Python have a module named cuda, as tests/cuda is
    with warnings.catch_warnings():
        code = pytest.main([*(str(ROOT / "tests/cuda" / node) for node in nodes), *options], plugins=[outcomes])
    assert not outcomes.failed, f"{len(outcomes.failed)} of {nodes} failed: {outcomes.failed[0]}"
    assert not outcomes.skipped, f"skipped: {outcomes.skipped[0]}"
    assert code == 0 and outcomes.passed, f"pytest ended with {code} after {outcomes.passed} tests"
    return f"{outcomes.passed} tests passed"


def suite(place: Gpu, name: str) -> str:
    """One function of test_on_device.py."""
    return run_tests(place, f"test_on_device.py::{name}")
