"""One small call of every op under compute-sanitizer, in a process that it watches."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check.calls import Placed, load, run, some
from gpu_check.place import Gpu
from gpu_check.plan import Skip

FOUND = 7
"""How a process ends in which it found something."""


def tool(place: Gpu) -> list[str]:
    """The command: the machine's, or that of NVIDIA's package for Python."""
    if place.name == "emulated":
        return [sys.executable, str(Path(__file__).with_name("no_sanitizer.py"))]
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in (spec.submodule_search_locations if spec else [])]
    known = [str(p) for folder in packages for p in folder.glob("cu*/bin/compute-sanitizer")]
    command = shutil.which("compute-sanitizer") or next(iter(known), None)
    if command is None:
        raise Skip("missing: compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    return [command]


def under(place: Gpu, kind: str) -> str:
    """memcheck or racecheck."""
    main = Path(__file__).with_name("__main__.py")
    options = ["--tool", kind, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    inner = [sys.executable, str(main), "--call", "sanitizer:small_calls"]
    inner += ["--emulated"] * (place.name == "emulated")
    # Memory straight from the driver: bytes beyond a tensor are then nobody's, and memcheck sees who writes them.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*tool(place), *options, *inner],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    errors = [line.strip(" =") for line in done.stdout.splitlines() if line.startswith("=========") and "ERROR" in line]
    assert done.returncode == 0, f"{kind} ended with {done.returncode}: {' '.join(errors) or done.stdout[-300:]}"
    return done.stdout.strip().splitlines()[-1].strip(" =")


def small_calls(place: Gpu) -> str:
    """One of every op: neither its smallest nor its largest."""
    calls = load()
    names = sorted({call.op for call in calls})
    for name in names:
        chosen = some([call for call in calls if call.op == name], 3)
        run(Placed(chosen[len(chosen) // 2], place), "under a sanitizer")
    return f"{len(names)} ops ran"
