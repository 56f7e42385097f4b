"""nvcc as the build calls it (csrc/cuda/cuda.cmake), for its PTX; and the PTX as C++ for programs of the emulator."""

import functools
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

from emulator.programs import FOLDER, ROOT
from emulator.ptx import translated

Edit = Callable[[str], str]


@functools.cache
def nvcc() -> str | None:
    """The compiler that the build would find."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates = [f"{folder}/bin/nvcc" for folder in [*folders, "/usr/local/cuda"]]
    found = os.environ.get("CUDACXX") or next(filter(os.path.exists, candidates), None)
    return shutil.which(found or "nvcc")


@functools.cache
def flags() -> list[str]:
    """What the build says to nvcc beside the architectures; its kernels are built as a release."""
    cmake = (ROOT / "csrc/cuda/cuda.cmake").read_text()
    options, definitions = (
        re.search(rf"{command}\(cuda_kernels PRIVATE (?:\$\{{generate}} )?([^)]*)\)", cmake)[1].split()
        for command in ("target_compile_options", "target_compile_definitions")
    )
    assert "-fmad=false" in options and "TOKENFLOW_ISA=cuda" in definitions
    standard = re.search(r"CMAKE_CUDA_STANDARD (\d+)", cmake)[1]
    return [f"-std=c++{standard}", "-DNDEBUG", *options, *(f"-D{definition}" for definition in definitions)]


@functools.cache
def ptx_of(source: Path, architecture: int, *include: str) -> str:
    """The PTX of a source, with the places of its lines."""
    made = Path(FOLDER.name) / f"{source.stem}-{architecture}.ptx"
    command = [nvcc(), *flags(), "-lineinfo", f"-arch=compute_{architecture}", "-ptx", *include]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return made.read_text()


@functools.cache
def translation(source: Path, architecture: int, include: tuple[str, ...] = (), edit: Edit | None = None) -> Path:
    """A source's kernels as C++ made of its PTX, after an edit of that. One file for all PTX that says the same."""
    text = ptx_of(source, architecture, *include)
    changed = edit(text) if edit else text
    assert edit is None or changed != text, "an edit that changes nothing"
    made = translated(changed, source.name)
    file = Path(FOLDER.name) / f"{source.stem}-{zlib.crc32(made.encode()):08x}.cpp"
    file.write_text(made)
    return file
