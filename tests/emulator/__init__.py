"""The CUDA kernels on the CPU: csrc/cuda compiled by the host's compiler, one fiber a CUDA thread.

`core()` builds and loads them as a module with CUDA's ops and registers it as backend="emulated".
"""

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch

from tokenflow_ext.ops import _native

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SCHEDULES = ("forward", "reverse", "threads", "warps")
TENSOR_CORES = ("ampere", "hopper", "volta", "floored", "ceiled", "worst_up", "worst_down")
"""How the emulated tensor cores add: tests/emulator/mma.cpp."""


@functools.cache
def core():
    """The module, built in build/emulated; what did not change is not compiled again."""
    folder = ROOT / "build" / "emulated"
    options = {
        "TOKENFLOW_EMULATED": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together build one after another
        for step in (
            [CMAKE, "-S", str(ROOT), "-B", str(folder), *(f"-D{key}={value}" for key, value in options.items())],
            [CMAKE, "--build", str(folder), "--parallel", str(os.cpu_count())],
        ):
            done = subprocess.run(step, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    (file,) = folder.glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _native.connect(module)
    _native.register_core("emulated", module)
    configure(module)
    return module


def configure(
    module, schedule: str = "forward", seed: int = 1, architecture: int = 80, tensor_cores: str = "ampere"
) -> None:
    """Who runs first in every launch from now on, whose limits it meets, how tensor cores add; forgets earlier launches."""
    module.configure(SCHEDULES.index(schedule), seed, architecture, TENSOR_CORES.index(tensor_cores))
    module.take_launches()


class InPlaceOfTheCpu:
    """The emulated core with the CPU core's manners: called with threads, it returns counts, so that every suite runs on it.

    What CUDA does not have, float64 and ops without a kernel, goes to the CPU core; `calls` counts both kinds.
    """

    def __init__(self, cpu):
        self._cpu, self._core, self.calls = cpu, core(), {"emulated": 0, "cpu": 0}

    def __getattr__(self, name):
        on_cpu, emulated = getattr(self._cpu, name), getattr(self._core, name, None)
        if emulated is None:
            return on_cpu

        def call(*arguments):
            *arguments, threads = arguments
            if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in arguments):
                self.calls["cpu"] += 1
                return on_cpu(*arguments, threads)
            self.calls["emulated"] += 1
            counts = torch.zeros(2, dtype=torch.int64)
            emulated(*arguments, -1, 0, counts)
            return tuple(counts.tolist())

        return call
