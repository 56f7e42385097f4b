"""Where the checks run: a GPU, or the same lines rehearsed on the emulated kernels with stand-ins for streams and graphs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_check.stand_in import Cuda

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

    name, backend, compiler, repeats, cuda = "gpu", "native", "inductor", 20, torch.cuda
    driver_command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]

    def __init__(self, ordinal: int = 0):
        self.ordinal, self.device, self.number = ordinal, torch.device("cuda", ordinal), ordinal

    @property
    def core(self):
        return _native._C.cuda

    def built(self) -> tuple[list[str], str | None]:
        """Architectures of the kernels, and torch's CUDA."""
        return build_info().get("cuda", []), torch.version.cuda

    def state(self) -> State:
        (architectures, torch_cuda), problem = self.built(), ""
        try:
            if architectures:
                self.core.check(self.number)
        except RuntimeError as error:
            problem = str(error)
        return State(architectures, problem, torch_cuda, self.cuda.is_available())

    def others(self) -> list["Gpu"]:
        """The machine's other devices."""
        return [type(self)(i) for i in range(self.cuda.device_count()) if i != self.ordinal]

    def counts(self) -> torch.Tensor:
        return torch.zeros_like(_native.counts(self.number))

    def where(self) -> tuple[int, int]:
        """(device, stream) as the core takes them."""
        return self.number, self.cuda.current_stream(self.device).cuda_stream

    def synchronize(self) -> None:
        self.cuda.synchronize(self.device)

    def stream(self):
        return self.cuda.Stream(self.device)

    def submit(self, stream, call: Callable[[], object]) -> None:
        """The call on a stream, from the thread's current device."""
        with self.cuda.stream(stream):
            call()

    def hold(self, stream) -> None:
        """What is submitted to the stream from now on has to wait: a tenth of a second or so."""
        with self.cuda.stream(stream):
            self.cuda._sleep(200_000_000)

    def captured(self, call: Callable[[], object]) -> Callable[[], None]:
        """A graph of the call; called, it replays."""
        graph = self.cuda.CUDAGraph()
        with self.cuda.device(self.device), self.cuda.graph(graph):
            call()
        return graph.replay

    def milliseconds(self, call: Callable[[], object]) -> list[float]:
        """What every one of `repeats` calls took on the device."""
        pairs = [[self.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repeats)]
        for start, end in pairs:
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """What the call takes beyond what is allocated already."""
        self.synchronize()
        self.cuda.reset_peak_memory_stats(self.device)
        before = self.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return self.cuda.max_memory_allocated(self.device) - before

    def properties(self):
        return self.cuda.get_device_properties(self.device)


class Rehearsal(Gpu):
    """The emulated kernels on CPU tensors, with a stand-in for torch.cuda: every line of Gpu runs but those repeated here."""

    name, backend, compiler, repeats, cuda = "emulated", "emulated", "aot_eager", 3, Cuda()
    driver_command = [sys.executable, "-c", "print('580.65.06')"]

    def __init__(self, ordinal: int = 0):
        super().__init__(ordinal)
        self.device, self.number = torch.device("cpu"), -1
        self.core  # registers the backend

    @property
    def core(self):
        import emulator

        return _Launching(emulator.core(), self.cuda.launch)

    def built(self) -> tuple[list[str], str | None]:
        return ["sm_80"], "13.0"


class _Launching:
    """The emulated core, whose ops go where the stand-in sends them."""

    def __init__(self, core, launch):
        self._core, self._launch = core, launch

    def check(self, number: int) -> None:
        assert number == -1

    def __getattr__(self, name):
        function = getattr(self._core, name)
        if name in ("certify", "configure", "take_launches"):
            return function
        return lambda *arguments: self._launch(lambda: function(*arguments))
