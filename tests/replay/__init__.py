"""Recorded calls of the native core, made again by a program without Python: under an emulator, under sanitizers.

`record` listens at the door `_C` while the ops run, and keeps what every tensor held before and after each call. `replay`
hands the calls to `replay.cpp`, built from the same CMakeLists.txt with -DTOKENFLOW_REPLAY=ON for any compiler.

A file of calls, all numbers little endian and 8 bytes: per call the op's name (length, bytes), its buffers (count; bytes,
address modulo 64, content), then its arguments in the order of csrc/common/ops.h, threads last. A View is its type (-1: none), rank,
shape and buffer; Tables are count, l2, unit, unit_codes, widths, weights. The results: per call its error (length, bytes),
its five counts, and the buffers' content. A name that ends with "+certified" asks CUDA's kernels for a certified search.
"""

import contextlib
import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int64: 4, torch.uint8: 5}
PATTERNS = {
    0: (np.uint32, 0x7F800000),
    1: (np.uint64, 0x7FF << 52),
    2: (np.uint16, 0x7C00),
    3: (np.uint16, 0x7F80),
    4: (np.uint64, None),
    5: (np.uint8, None),
}
"""Per type of csrc/common/view.h: an integer of its size, and the bits of infinity."""


def signatures() -> dict[str, list[tuple[str, str]]]:
    """The arguments (type, name) of every op that bindings.cpp offers, from the declarations in csrc/common; threads last."""
    text = "".join((ROOT / "csrc/common" / name).read_text() for name in ("ops.h", "multiscale_ops.h"))
    text = re.sub(r"/\*.*?\*/|\\\n", " ", text)
    declared = dict(re.findall(r"Error (\w+)\(([^()]*)\)\s+noexcept", text))
    offered = re.findall(r"TOKENFLOW_OP\((\w+)\);", (ROOT / "csrc/bindings.cpp").read_text())
    offered.remove("peaks")  # measures the machine: other bits every time
    split = {op: [tuple(argument.split()) for argument in declared[op].split(",")] for op in offered}
    return {op: [*arguments[1:], ("int", "threads")] for op, arguments in split.items()}  # the first is the Call


@dataclass
class Held:
    """A tensor among the arguments; `buffer` is none where it has no numbers."""

    dtype: torch.dtype
    shape: torch.Size
    buffer: int | None


@dataclass
class Call:
    """One call: what was passed, and the bytes of its tensors before and after."""

    op: str
    encoded: bytes
    arguments: dict[str, object]  # all but the threads, `Held` where a tensor was passed
    tensors: dict[str, tuple[int, int]]  # argument: (type, buffer)
    before: list[bytes]
    after: list[bytes]
    error: str = ""
    counts: tuple[int, ...] = (0,) * 5  # ids outside their table, rows that are not finite; three of certified searches
    certified: bool = False


class Door:
    """`_C`, with every call of an op kept in `calls`."""

    def __init__(self, core, calls: list[Call], known: dict[str, list[tuple[str, str]]]):
        self._core, self._calls, self._signatures = core, calls, known

    def __getattr__(self, op):
        function = getattr(self._core, op)
        if op not in self._signatures:
            return function
        return lambda *arguments: self._record(op, function, arguments)

    def _record(self, op, function, arguments):
        numbers, given, tensors, buffers = [], {}, {}, {}
        for (kind, name), value in zip(self._signatures[op], arguments, strict=True):
            given[name] = value
            if kind == "View":
                if value is None:
                    numbers.append(struct.pack("<q", -1))
                    continue
                assert value.is_contiguous()
                dtype, shape, held = TYPES[value.dtype], value.shape, (value.data_ptr(), value.nbytes)
                if value.nbytes:
                    buffers.setdefault(held, ctypes.string_at(*held))
                buffer = list(buffers).index(held) if value.nbytes else -1
                given[name] = Held(value.dtype, shape, buffer if value.nbytes else None)
                numbers.append(struct.pack(f"<{3 + len(shape)}q", dtype, len(shape), *shape, buffer))
                if value.nbytes:
                    tensors[name] = dtype, buffer
            elif kind == "Tables":
                widths, weights, l2, unit, unit_codes = value
                numbers.append(struct.pack(f"<{4 + len(widths)}q", len(widths), l2, unit, unit_codes, *widths))
                numbers.append(struct.pack(f"<{len(weights)}d", *weights))
            else:
                numbers.append(struct.pack("<d" if kind == "double" else "<q", value))
        del given["threads"]
        call = Call(op, b"", given, tensors, list(buffers.values()), [])
        head = struct.pack("<q", len(op)) + op.encode() + struct.pack("<q", len(buffers))
        held = b"".join(struct.pack("<qq", n, at % 64) + before for (at, n), before in buffers.items())
        call.encoded = head + held + b"".join(numbers)
        try:
            outside, bad = function(*arguments)
            call.counts = outside, bad, 0, 0, 0
            return outside, bad
        except ValueError as error:
            call.error = str(error)
            raise
        finally:
            call.after = [ctypes.string_at(at, n) for at, n in buffers]
            self._calls.append(call)


@contextlib.contextmanager
def record():
    """Collects the calls that the ops make inside the block."""
    calls: list[Call] = []
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("tokenflow_ext.ops") and hasattr(m, "_C")]
    doors = [(module, module._C) for module in modules]
    try:
        for module, core in doors:
            module._C = Door(core, calls, signatures())
        yield calls
    finally:
        for module, core in doors:
            module._C = core


def build(name: str, **options: str) -> Path:
    """The program, built in build/<name> with these CMake variables; what did not change is not compiled again."""
    folder = ROOT / "build" / name
    variables = [f"-D{key}={value}" for key, value in {"TOKENFLOW_REPLAY": "ON", **options}.items()]
    for step in (
        [CMAKE, "-S", str(ROOT), "-B", str(folder), *variables],
        [CMAKE, "--build", str(folder), "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(step)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return folder / "replay"


def replay(program: list[str], calls: list[Call], folder: Path, threads: int, **environment: str):
    """What the program says, and per call (error, counts, buffers) as it left them."""
    file, results = folder / "calls", folder / "results"
    file.write_bytes(b"".join(call.encoded for call in calls))
    done = subprocess.run(
        [*program, str(file), str(results), str(threads)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout.strip(), read_results(results, calls)


def read_results(file: Path, calls: list[Call]) -> list[tuple]:
    """Per call its (error, counts, buffers) from a file of results."""
    data, at, made = file.read_bytes(), 0, []

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        assert at <= len(data)
        return data[at - size : at]

    for call in calls:
        error = take(struct.unpack("<q", take(8))[0]).decode()
        made.append((error, struct.unpack("<5q", take(40)), [take(len(before)) for before in call.before]))
    assert at == len(data)
    return made


def plain(content: bytes, dtype: int) -> np.ndarray:
    """The bits as integers, with one pattern for every NaN: processors differ in its sign."""
    kind, infinity = PATTERNS[dtype]
    values = np.frombuffer(content, kind).copy()
    if infinity:
        values[(values & kind(np.iinfo(kind).max // 2)) > infinity] = infinity + 1
    return values


def differences(calls: list[Call], made) -> list[str]:
    """One line for every result that has other bits than the recorded one."""
    lines = []
    for i, (call, (error, counts, buffers)) in enumerate(zip(calls, made, strict=True)):
        if (error, counts) != (call.error, call.counts):
            lines.append(f"call {i}, {call.op}: {error!r}, {counts} for {call.error!r}, {call.counts}")
        for name, (dtype, buffer) in call.tensors.items():
            expected, actual = plain(call.after[buffer], dtype), plain(buffers[buffer], dtype)
            wrong = np.flatnonzero(expected != actual)
            if len(wrong):
                lines.append(
                    f"call {i}, {call.op}: {len(wrong)} of {len(actual)} numbers of {name} differ, first {wrong[0]}"
                )
    return lines
