"""Where the checks run: a GPU, or the same lines rehearsed on the emulated kernels with stand-ins for streams and graphs."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenflow_ext import build_info
from tokenflow_ext.ops import _native


@dataclass
class State:
    """What has to be there: architectures of the kernels, what the core says of device 0, torch's CUDA, and what it sees."""

    architectures: list[str]
    problem: str
    torch_cuda: str | None
    torch_sees: bool


class Gpu:
    """One CUDA device: its core, streams, graphs, clock and memory."""

    name, backend, compiler, repeats = "gpu", "native", "inductor", 20
    driver_command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]

    def __init__(self, ordinal: int = 0):
        self.ordinal, self.device = ordinal, torch.device("cuda", ordinal)

    @property
    def core(self):
        return _native._C.cuda

    def state(self) -> State:
        architectures, problem = build_info().get("cuda", []), ""
        try:
            if architectures:
                self.core.check(self.ordinal)
        except RuntimeError as error:
            problem = str(error)
        return State(architectures, problem, torch.version.cuda, torch.cuda.is_available())

    def others(self) -> list["Gpu"]:
        """The machine's other devices."""
        return [Gpu(i) for i in range(torch.cuda.device_count()) if i != self.ordinal]

    def counts(self) -> torch.Tensor:
        return torch.zeros_like(_native.counts(self.ordinal))

    def where(self) -> tuple[int, int]:
        """(device, stream) as the core takes them."""
        return self.ordinal, torch.cuda.current_stream(self.device).cuda_stream

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def stream(self):
        return torch.cuda.Stream(self.device)

    def submit(self, stream, call: Callable[[], object]) -> None:
        """The call on a stream, from the thread's current device."""
        with torch.cuda.stream(stream):
            call()

    def hold(self, stream) -> None:
        """What is submitted to the stream from now on has to wait: a tenth of a second or so."""
        self.submit(stream, lambda: torch.cuda._sleep(200_000_000))

    def captured(self, call: Callable[[], object]) -> Callable[[], None]:
        """A graph of the call; called, it replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            call()
        return graph.replay

    def milliseconds(self, call: Callable[[], object]) -> list[float]:
        """What every one of `repeats` calls took on the device."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """What the call takes beyond what is allocated already."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def properties(self):
        return torch.cuda.get_device_properties(self.device)


class _Stream:
    """Stands in for a stream: runs what it is given, or keeps it while it is held."""

    def __init__(self):
        self.held, self.waiting = False, []

    def synchronize(self) -> None:
        self.held = False
        while self.waiting:
            self.waiting.pop(0)()


class _Properties:
    """Stands in for torch.cuda.get_device_properties: those of an A100."""

    name, major, minor, total_memory, multi_processor_count = "the emulator", 8, 0, 40 << 30, 108
    clock_rate, memory_clock_rate, memory_bus_width = 1_410_000, 1_215_000, 5120


class Rehearsal(Gpu):
    """The emulated kernels on CPU tensors; every method of Gpu that has no meaning there does the nearest that has."""

    name, backend, compiler, repeats = "emulated", "emulated", "aot_eager", 3
    driver_command = [sys.executable, "-c", "print('580.65.06')"]

    def __init__(self, ordinal: int = 0):
        self.ordinal, self.device = ordinal, torch.device("cpu")
        self.core  # registers the backend

    @property
    def core(self):
        import emulator

        return emulator.core()

    def state(self) -> State:
        return State(["sm_80"], "", "13.0", True)

    def others(self) -> list["Rehearsal"]:
        return [Rehearsal(1)] if self.ordinal == 0 else []

    def counts(self) -> torch.Tensor:
        return torch.zeros_like(_native.counts(-1))

    def where(self) -> tuple[int, int]:
        return -1, 0

    def synchronize(self) -> None:
        pass

    def stream(self):
        return _Stream()

    def submit(self, stream, call) -> None:
        stream.waiting.append(call)
        if not stream.held:
            stream.synchronize()

    def hold(self, stream) -> None:
        stream.held = True

    def captured(self, call):
        return call

    def milliseconds(self, call) -> list[float]:
        taken = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
        return taken

    def peak_bytes(self, call) -> int:
        call()
        return 0

    def properties(self):
        return _Properties
