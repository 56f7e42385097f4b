"""Stands in for torch.cuda in the rehearsal: streams that can be held, events, graphs; kernels are emulated on CPU tensors."""

import contextlib
import time
from types import SimpleNamespace


class Stream:
    """Runs what it is given at once, or after `synchronize` where it is held."""

    cuda_stream = 0

    def __init__(self, device=None):
        self.held, self.waiting = False, []

    def synchronize(self) -> None:
        self.held = False
        while self.waiting:
            self.waiting.pop(0)()


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class CUDAGraph:
    """The calls that were made while it was captured."""

    def __init__(self):
        self.calls = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Cuda:
    """What gpu_check.place takes of torch.cuda, with two devices."""

    Stream, Event, CUDAGraph = Stream, Event, CUDAGraph

    def __init__(self):
        self._current, self._graph, self._held = Stream(), None, []

    def launch(self, call) -> None:
        """Where the emulated core's ops pass: into a graph, behind a held stream, or at once."""
        if self._graph is not None:
            self._graph.calls.append(call)
        elif self._current.held:
            self._current.waiting.append(call)
        else:
            call()

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    @contextlib.contextmanager
    def graph(self, graph):
        self._graph = graph
        try:
            yield
        finally:
            self._graph = None

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return self._current

    def synchronize(self, device) -> None:
        for stream in self._held:
            stream.synchronize()

    def _sleep(self, cycles: int) -> None:
        self._current.held = True
        self._held.append(self._current)

    def device_count(self) -> int:
        return 2

    def is_available(self) -> bool:
        return True

    def get_device_properties(self, device):
        """An A100's."""
        return SimpleNamespace(
            name="the emulator", major=8, minor=0, total_memory=40 << 30, multi_processor_count=108, clock_rate=1_410_000,
            memory_clock_rate=1_215_000, memory_bus_width=5120,
        )  # fmt: skip

    def reset_peak_memory_stats(self, device) -> None:
        pass

    def memory_allocated(self, device) -> int:
        return 0

    max_memory_allocated = memory_allocated
