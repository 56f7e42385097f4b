"""Programs made of CUDA kernels for the CPU, without Python: compiled in three modes, run under every schedule.

"plain" sees what wrong numbers and the emulator itself tell, "memory" is AddressSanitizer and UndefinedBehaviorSanitizer,
"races" ThreadSanitizer with a thread of its own for every fiber.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMULATOR = [
    ROOT / "tests/emulator" / f"{name}.cpp"
    for name in ("engine", "fiber", "memory", "mma", "names", "ptx", "trace", "warp")
]
SCHEDULES = ("forward", "reverse", "threads", "warps")
COMPILER = os.environ.get("CXX") or shutil.which("g++") or "c++"
FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-DTOKENFLOW_EMULATED",
    "-DTOKENFLOW_ISA=cuda",
    f"-I{ROOT / 'tests/emulator'}",
]
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
MODES = {
    "plain": (["-O1"], ["-O2"]),
    "memory": (["-O1", "-g1", "-fsanitize=address", *UNDEFINED], ["-O1", "-fsanitize=address"]),
    "races": (["-O1", "-g", "-fsanitize=thread"], ["-O2", "-DCUDA_EMULATOR_TSAN"]),
}
"""Flags of the kernels and of the emulator: ThreadSanitizer must not see the emulator, which tells it what it needs."""
ENVIRONMENT = {
    "ASAN_OPTIONS": "exitcode=66:detect_leaks=0",
    "UBSAN_OPTIONS": "exitcode=66:print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1:atexit_sleep_ms=0",
}
FOLDER = tempfile.TemporaryDirectory(prefix="cuda_emulator_")
"""Where programs lie, until Python ends."""


@functools.cache
def native() -> list[str]:
    """Fused multiply-adds are library calls where the processor's own are not used; the bits are the same."""
    accepts = subprocess.run([COMPILER, "-march=native", "-E", "-x", "c++", "/dev/null"], capture_output=True)
    return ["-march=native"] if accepts.returncode == 0 else []


@functools.cache
def compiled(source: Path, mode: str, flags: tuple[str, ...]) -> Path:
    """The object file of one source."""
    own = MODES[mode][source in EMULATOR]
    command = [COMPILER, *FLAGS, *native(), *own, *flags, f"-I{ROOT / 'csrc'}", "-c", "-x", "c++", str(source)]
    made = Path(FOLDER.name) / f"{zlib.crc32(' '.join(command).encode()):08x}-{source.stem}.o"
    done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return made


def build(name: str, mode: str, sources: dict[Path, tuple[str, ...]], emulator: tuple[str, ...] = ()) -> Path:
    """The program of these sources, with their flags, and the emulator, with its own; nothing is compiled twice."""
    program = Path(FOLDER.name) / f"{name}-{mode}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = {**dict.fromkeys(EMULATOR, emulator), **sources}.items()
        objects = pool.map(lambda part: compiled(part[0], mode, part[1]), parts)
    command = [COMPILER, *map(str, objects), *MODES[mode][0], "-ldl", "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"
    return program


@dataclass
class Ran:
    """How a program ended, and all that it said."""

    code: int
    text: str


def run(program: Path, *arguments: str, schedule: str = "forward", seed: int = 1, architecture: int = 80) -> Ran:
    """Runs a program under one schedule. What a sanitizer finds ends it with 66."""
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "CUDA_EMULATOR_SCHEDULE": schedule,
        "CUDA_EMULATOR_SEED": str(seed),
        "CUDA_EMULATOR_ARCH": str(architecture),
    }
    command = [str(program), *arguments]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run([*prefix, *command], env=environment, capture_output=True, text=True, timeout=900)
        if "unexpected memory mapping" not in done.stderr:  # ThreadSanitizer, where addresses are too random for it
            break
    return Ran(done.returncode, done.stdout + done.stderr)


def places(program: Path, text: str) -> set[tuple[str, int]]:
    """(file, line) of every address of the program in a sanitizer's report, whose own lookup fails for some files."""
    addresses = re.findall(rf"\({re.escape(program.name)}\+(0x[0-9a-f]+)\)", text)
    command = ["addr2line", "-i", "-e", str(program), *addresses]
    found = subprocess.run(command, capture_output=True, text=True).stdout if addresses else ""
    return {(Path(file).name, int(line)) for file, line in re.findall(r"(\S+):(\d+)", found)}
