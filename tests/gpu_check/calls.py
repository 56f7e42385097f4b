"""Recorded calls of the CPU kernels (tests/replay) made again at CUDA's door: the same results, and no byte outside.

Every tensor lies between guards and holds what it held when the call was recorded, NaN in outputs. All results have the CPU's
bits but sums, which CUDA adds in another order: those are compared as in tests/cuda.
"""

import os
import pickle
from pathlib import Path

import numpy as np
import torch
from gpu_check.place import Gpu
from harness import assert_near
from replay import TYPES, Call, Held, plain

from tokenflow_ext.ops import _native

GUARD, FILL = 512, 0xA5
HOST = ("grids",)
"""Arguments that CUDA's kernels read in host memory."""
DTYPES = {number: dtype for dtype, number in TYPES.items()}
SUMS = (
    "loss", "losses", "sums", "log_totals", "entropies", "means", "grad_x", "grad_codebook", "grad_keys", "grad_features",
    "grad_weight", "grad_bias",
)  # fmt: skip
"""Results that may differ from the CPU's by rounding."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Of the largest number of the result, for gradients of all gradients."""


class Placed:
    """The tensors of one call on a device, each amid guards; `shifted` by one row from where an allocation begins."""

    def __init__(self, call: Call, place: Gpu, shifted: bool = False):
        self.call, self.place, self.counts = call, place, place.counts()
        rows = {}
        for value in call.arguments.values():
            if isinstance(value, Held) and value.buffer is not None:
                rows[value.buffer] = value.dtype.itemsize * (value.shape[-1] if value.shape else 1)
        self.wholes, self.inside = [], []
        for buffer, before in enumerate(call.before):
            start = GUARD + (rows[buffer] if shifted else 0)
            whole = torch.full((start + len(before) + GUARD,), FILL, dtype=torch.uint8, device=place.device)
            self.wholes.append(whole)
            self.inside.append(whole[start : start + len(before)])
        self.host = {name: self._on_host(value) for name, value in call.arguments.items() if name in HOST}
        self.arguments = [self.host.get(name, self._put(value)) for name, value in call.arguments.items()]
        self.restore()

    def _bytes(self, buffer: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.call.before[buffer]), dtype=torch.uint8)

    def _on_host(self, held: Held) -> torch.Tensor:
        return self._bytes(held.buffer).view(held.dtype).view(held.shape)

    def _put(self, value):
        if not isinstance(value, Held):
            return value
        if value.buffer is None:
            return torch.empty(value.shape, dtype=value.dtype, device=self.place.device)
        return self.inside[value.buffer].view(value.dtype).view(value.shape)

    def restore(self) -> None:
        """What the tensors held before the call."""
        for buffer, inside in enumerate(self.inside):
            inside.copy_(self._bytes(buffer))
        self.counts.zero_()

    def __call__(self) -> None:
        core, certified = self.place.core, getattr(self.call, "certified", False)
        was = core.certify(certified) if hasattr(core, "certify") else None
        try:
            getattr(core, self.call.op)(*self.arguments, *self.place.where(), self.counts)
        finally:
            if was is not None:
                core.certify(was)

    def untouched(self) -> bool:
        """Whether every tensor still holds what it held before."""
        return all(torch.equal(inside.cpu(), self._bytes(i)) for i, inside in enumerate(self.inside))

    def check(self, what: str) -> None:
        """AssertionError where a result is not the CPU's, an input has changed, or a guard."""
        what = f"{self.call.op}, {what}, {describe(self.call)}"
        for whole, inside in zip(self.wholes, self.inside, strict=True):
            start = inside.storage_offset()
            for part in (whole[:start], whole[start + inside.numel() :]):
                assert bool((part == FILL).all()), f"{what}: written outside a tensor"
        counted = tuple(self.counts[:2].tolist())
        assert counted == tuple(self.call.counts[:2]), f"{what}: counted {counted} for {self.call.counts[:2]}"
        results = {name: (number, self.inside[buffer].cpu(), self.call.after[buffer])
                   for name, (number, buffer) in self.call.tensors.items() if name not in HOST}  # fmt: skip
        floats, largest = {}, 0.0
        for name, (number, actual, wanted) in results.items():
            if name in SUMS:
                dtype = DTYPES[number]
                floats[name] = dtype, actual.view(dtype), torch.frombuffer(bytearray(wanted), dtype=dtype)
                if name.startswith("grad"):
                    largest = max(largest, float(floats[name][2].double().nan_to_num(0, 0, 0).abs().max()))
            else:
                wrong = np.flatnonzero(plain(wanted, number) != plain(actual.numpy().tobytes(), number))
                assert not len(wrong), f"{what}: {len(wrong)} numbers of {name} differ, first at {wrong[0]}"
        for name, (dtype, actual, wanted) in floats.items():
            assert_near(actual, wanted, TOLERANCE[dtype], f"{what}: {name}", max(largest, 1e-30))


def describe(call: Call) -> str:
    """Shapes and types of the tensors."""
    tensors = [f"{name} {[*v.shape]} {v.dtype}" for name, v in call.arguments.items() if isinstance(v, Held)]
    return ", ".join(tensors).replace("torch.", "")


def recording() -> Path:
    return Path(os.environ["GPU_CHECK_FOLDER"]) / "calls.pickle"


def record_all(place: Gpu) -> str:
    """Runs the problems of tests/emulator on the CPU, for the checks of ops to read."""
    from emulator.problems import recorded

    calls = [call for call in recorded() if hasattr(_native._C, call.op) and not call.error]
    recording().write_bytes(pickle.dumps(calls))
    return f"{len(calls)} calls of {len({call.op for call in calls})} ops"


def load(op: str | None = None) -> list[Call]:
    """What was recorded, of one op or of all; short calls first."""
    assert recording().exists(), "there is nothing to compare with: the CPU's kernels were not recorded"
    return [call for call in pickle.loads(recording().read_bytes()) if op in (None, call.op)]


def some(calls: list[Call], count: int) -> list[Call]:
    """So many of them that change a tensor, short and long ones."""
    changing = [call for call in calls if call.before != call.after]
    return changing[:: max(1, (len(changing) - 1) // max(1, count - 1))][:count] or calls[:1]


def op(place: Gpu, name: str) -> str:
    """One op: every call, aligned and shifted by a row; on a stream, in a graph, on other devices."""
    calls = load(name)
    assert calls, "no call of it was recorded"
    for call in calls:
        for shifted in (False, True):
            run(Placed(call, place, shifted), "shifted by a row" if shifted else "aligned")
    chosen = some(calls, 3)
    for call in chosen:
        on_a_stream(Placed(call, place))
        in_a_graph(Placed(call, place))
    others = place.others()
    for other in others:
        for call in chosen:
            run(Placed(call, other), f"on device {other.ordinal} while {place.ordinal} is current")
    return (
        f"{len(calls)} calls, aligned and shifted; {len(chosen)} on a stream, in a graph, on {len(others)} more devices"
    )


def run(placed: Placed, what: str) -> None:
    placed.place.synchronize()
    placed()
    placed.place.synchronize()
    placed.check(what)


def on_a_stream(placed: Placed) -> None:
    """Behind other work of a stream that is not current elsewhere: nothing may happen before that work is done."""
    place, stream = placed.place, placed.place.stream()
    place.synchronize()
    place.submit(stream, placed)  # what an allocator does for a new stream may wait
    stream.synchronize()
    placed.restore()
    place.synchronize()
    place.hold(stream)
    place.submit(stream, placed)
    assert placed.untouched(), f"{placed.call.op}: ran on another stream than the current one, or waited for the device"
    stream.synchronize()
    placed.check("on a stream")


def in_a_graph(placed: Placed) -> None:
    """Captured once, replayed three times on restored tensors."""
    placed.place.synchronize()
    replay = placed.place.captured(placed)
    placed.place.synchronize()
    assert placed.untouched(), f"{placed.call.op}: it ran while it was captured"
    for i in range(3):
        placed.restore()
        placed.place.synchronize()
        replay()
        placed.place.synchronize()
        placed.check(f"replay {i + 1} of a graph")
