"""How CUDA gets into the build: found by itself, asked for, left out; and what the compiled kernels take of a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

import tokenflow_ext
from tokenflow_ext.ops import _native

ROOT = Path(__file__).parents[1]
BIN = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
ARCHITECTURES = tokenflow_ext.build_info()["cuda"]
WITHOUT = "/nowhere/nvcc"

needs_nvcc = pytest.mark.skipif(not ARCHITECTURES, reason="this package was built without nvcc")


def configure(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """CMake's first step for the extension."""
    options = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    command = [shutil.which("cmake", path=BIN), "-S", ROOT, "-B", folder, *(f"-D{k}={v}" for k, v in options.items())]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TOKENFLOW_CUDA")}
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=300)


def sentence(text: str) -> str:
    return " ".join(text.split())


def test_a_missing_compiler_is_told_and_the_cpu_is_built(tmp_path):
    done = configure(tmp_path, CUDACXX=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "CUDA: the CPU kernels alone are built, as nvcc was not found in CUDACXX" in sentence(
        done.stdout + done.stderr
    )


def test_asked_for_and_missing_is_an_error(tmp_path):
    done = configure(tmp_path, TOKENFLOW_CUDA="1", CUDACXX=WITHOUT)
    assert done.returncode != 0
    assert "TOKENFLOW_CUDA=1: wanted CUDA's compiler, but nvcc was not found in" in sentence(done.stderr)


def test_a_compiler_that_cannot_compile_is_told(tmp_path):
    """An nvcc that lists architectures and refuses the host's compiler does not break `pip install .`."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_80 || { echo unsupported GNU version; exit 1; }\n'
    )
    nvcc.chmod(0o755)
    done = configure(tmp_path / "auto", CUDACXX=str(nvcc))
    text = sentence(done.stdout + done.stderr)
    assert done.returncode == 0 and "compiles nothing here (unsupported GNU version)" in text, text
    done = configure(tmp_path / "asked", CUDACXX=str(nvcc), TOKENFLOW_CUDA="1")
    assert done.returncode != 0 and "compiles nothing here" in sentence(done.stderr)


def test_a_wrong_wish_is_an_error(tmp_path):
    done = configure(tmp_path, TOKENFLOW_CUDA="yes")
    assert done.returncode != 0 and "TOKENFLOW_CUDA: wanted auto, 0 or 1, got yes" in sentence(done.stderr)


@needs_nvcc
def test_architectures_can_be_narrowed(tmp_path):
    done = configure(tmp_path, TOKENFLOW_CUDA_ARCHS="90;997")
    text = sentence(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA: \S+nvcc for 90 ", text + " ") and "does not know the architectures 997" in text
    done = configure(tmp_path / "none", TOKENFLOW_CUDA_ARCHS="997")
    assert done.returncode != 0 and "TOKENFLOW_CUDA_ARCHS: wanted architectures among" in sentence(done.stderr)


@needs_nvcc
def test_a_machine_without_a_gpu_is_told_so():
    """The same file imports here, and says what it misses when it is asked to run."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="CUDA: wanted a driver of NVIDIA, got none"):
        _native._C.cuda.check(0)
