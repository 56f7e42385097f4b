"""The CUDA kernels as a program: recorded calls of the ops replayed on them, in each mode, whole or as a mutant."""

import functools
import os
import re
import struct
import subprocess
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from replay import Call, differences, read_results

from emulator.mutants import CUDA, Mutant, reached
from emulator.nvcc import Edit, translation
from emulator.programs import FOLDER, ROOT, Ran, build, places, run

DOOR = (CUDA / "bindings.h").read_text()
OPS = re.findall(r"TOKENFLOW_CUDA_OP\((\w+)\);", DOOR)
"""The ops that have kernels."""
KERNELS = sorted(file for file in CUDA.glob("*.cu") if file.name != "device.cu")


@functools.cache
def _sources() -> dict[Path, tuple[str, ...]]:
    """tests/replay/replay.cpp and all kernels, with their flags."""
    folder = Path(FOLDER.name)
    (folder / "ops.inc").write_text("".join(f"TOKENFLOW_CUDA_OP({op});\n" for op in OPS))
    return {**dict.fromkeys(KERNELS, ()), ROOT / "tests/replay/replay.cpp": (f"-I{folder}",)}


def program(mode: str, mutant: Mutant | None = None, source: Path | None = None) -> Path:
    """The program that makes recorded calls; with the kernels of one source as a mutant."""
    if mutant is None:
        return build("replay", mode, _sources())
    return build(f"{mutant.file.name}-{mutant.start}-{source.stem}", mode, mutant.change(_sources(), source))


@functools.cache
def ptx_program(mode: str, architecture: int, only: tuple[str, ...] = (), edit: Edit | None = None) -> Path:
    """The same program, whose kernels are nvcc's PTX for an architecture.

    With `only`, those of these sources alone: a launch of another one is an error. The first of them may be edited.
    """
    chosen = [source for source in KERNELS if not only or source.name in only]
    edits = {only[0]: edit} if edit else {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda source: translation(source, architecture, edit=edits.get(source.name)), chosen)
        sources = {**_sources(), **dict.fromkeys(made, ())}
    name = zlib.crc32(" ".join(sorted(map(str, sources))).encode())
    return build(f"ptx-{name:08x}", mode, sources)


def traced_program(architecture: int) -> Path:
    """The program of the PTX that counts what requests of warps take (trace.cpp)."""
    made = [translation(source, architecture) for source in KERNELS]
    sources = {**_sources(), **dict.fromkeys(made, ())}
    traced = [source for source in sources if source not in KERNELS]
    return build(
        "traced", "plain", {s: (*own, *("-DCUDA_EMULATOR_TRACE",) * (s in traced)) for s, own in sources.items()}
    )


def replay(program: Path, calls: list[Call], **schedule) -> tuple[Ran, list]:
    """How the program ended, and per call (error, counts, buffers) where it came to its end."""
    with tempfile.TemporaryDirectory(dir=FOLDER.name) as folder:
        file, results = Path(folder) / "calls", Path(folder) / "results"
        file.write_bytes(b"".join(call.encoded for call in calls))
        ran = run(program, str(file), str(results), **schedule)
        return ran, read_results(results, calls) if ran.code == 0 else []


@functools.cache
def expected(*parts: str) -> list[Call]:
    """The calls of all problems, or of those larger ones, with what the kernels make of them in the plainest way."""
    from emulator import larger, problems

    given = problems.recorded(*(getattr(larger, part) for part in parts))
    ran, made = replay(program("plain"), given)
    assert ran.code == 0, ran.text
    return expecting(given, made)


def expecting(calls: list[Call], made: list) -> list[Call]:
    """The calls with these results in place of the recorded ones."""
    return [
        replace(call, error=error, counts=counts, after=buffers)
        for call, (error, counts, buffers) in zip(calls, made, strict=True)
    ]


SEARCHING = ("nearest_code", "quantize", "multiscale_quantize")
"""The ops whose searches can be certified."""


MARK = b"+certified"


def named(call: Call, name: bytes) -> bytes:
    """What the call encodes, under another name."""
    start = 8 + struct.unpack("<q", call.encoded[:8])[0]
    return struct.pack("<q", len(name)) + name + call.encoded[start:]


def certified(call: Call) -> Call:
    """The same call, to be certified."""
    return replace(call, encoded=named(call, call.op.encode() + MARK), certified=True)


def plain(call: Call) -> Call:
    """The call that `certified` was made of."""
    return replace(call, encoded=named(call, call.op.encode()), certified=False)


def some(calls: list[Call], each: int) -> list[Call]:
    """At most so many calls of every op, small and large ones, for what takes long; likewise of certified searches."""
    chosen = []
    for op, way in [*((op, False) for op in OPS), *((op, True) for op in SEARCHING)]:
        mine = [call for call in calls if call.op == op and call.certified == way]
        step = max(1, (len(mine) - 1) // max(1, each - 1))
        chosen += mine[::step][: each - 1] + mine[-1:]
    return chosen


def noticed(program: Path, calls: list[Call], *, compare=differences, **schedule) -> str:
    """What is wrong about a run: an error, a sanitizer's finding, other results than expected; "" where nothing is."""
    try:
        ran, made = replay(program, calls, **schedule)
    except subprocess.TimeoutExpired:
        return "does not end"
    if ran.code:
        found = re.search(r"^.*(ThreadSanitizer:|AddressSanitizer:|runtime error:|replay: ).*$", ran.text, re.MULTILINE)
        lines = sorted(f"{file}:{line}" for file, line in places(program, ran.text) if file.endswith((".cu", ".cuh")))
        return " ".join([found[0].strip() if found else f"ended with {ran.code}", *lines])
    return next(iter(compare(calls, made)), "")


def noticed_by_parts(program: Path, calls: list[Call], **schedule) -> str:
    """`noticed`, by as many processes as there are processors."""
    parts = [calls[i :: os.cpu_count()] for i in range(os.cpu_count())]
    with ThreadPoolExecutor() as pool:
        return " ".join(filter(None, pool.map(lambda part: noticed(program, part, **schedule), parts)))


def caught(mutant: Mutant, calls: list[Call]) -> str:
    """How a mutant is noticed: as a race, or by its numbers under some schedule; "" where it is not.

    A header is changed for one of the files that include it at a time: their kernels are their own.
    """
    runs = [("races", "forward", 1), ("races", "threads", 1), ("plain", "reverse", 1), ("plain", "warps", 1)]
    runs += [("plain", "threads", seed) for seed in (2, 3)]
    for source in KERNELS:
        if mutant.file not in reached(source):
            continue
        own = re.findall(r"^Error (\w+)\(Call&", source.read_text(), re.MULTILINE)
        given = [call for call in calls if call.op in own or not own]
        for mode, schedule, seed in runs:
            if found := noticed(program(mode, mutant, source), given, schedule=schedule, seed=seed):
                return found
    return ""
