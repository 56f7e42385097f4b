"""A provider in a process of its own: its memory, its threads and its allocator are nobody else's.

Processes are forked from a server that has imported torch and never started a thread, so that a start costs
milliseconds. FAISS brings an OpenMP and a BLAS of its own, whose threads spin after a call: no turn begins before the
CPU clock of the process that had the last one stands still.
"""

import importlib
import multiprocessing
import time
import traceback
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "sympy"])


class Missing(Exception):
    """A provider whose library is not installed."""


class Worker:
    """The parent's end of `problem(name).calls[provider]` of a bench module, running elsewhere.

    Attributes:
        memory: peak bytes of the first call above its inputs.
        seconds: of a call, roughly.
        repeat: calls a turn.
    """

    def __init__(self, module: str, name: str, provider: str):
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(theirs, module, name, provider), daemon=True)
        self._process.start()
        theirs.close()
        self.repeat = 1

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._process.kill()
        self._process.join()

    def first(self, path: Path) -> None:
        """Weighs the first call and saves its results; raises Missing without the provider's library."""
        self.memory, self.seconds = self._ask("first", path)

    def estimate(self) -> float:
        """Seconds of a call; a second one, where the first was short, since that may have been warming up."""
        if self.seconds < 1:
            self.seconds = self.turn()[0]
        return self.seconds

    def turn(self) -> tuple[float, float]:
        """(wall, CPU) seconds a call of `repeat` calls, after one to warm up where they are short."""
        result = self._ask("turn", self.repeat, self.seconds < 0.1)
        self._settle()
        return result

    def facts(self, native: bool) -> dict:
        """What the numbers depend on; of a native call also which path ran and what this machine can do right now."""
        return self._ask("facts", native)

    def _ask(self, *request):
        self._pipe.send(request)
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process ended with {self._process.exitcode}, out of memory?") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _settle(self) -> None:
        """Waits until the threads of the process sleep: until its CPU clock stands still for more than a scheduler's tick,
        at which the kernel brings the clock of a running thread up to date.
        """
        now, before = self.cpu_seconds(), -1.0
        while now - before > 1e-4:
            time.sleep(0.012)
            now, before = self.cpu_seconds(), now

    def cpu_seconds(self) -> float:
        """What the process has used of the processor; 0 where another process's clock cannot be read."""
        try:
            return time.clock_gettime((~self._process.pid << 3) | 2)  # what clock_getcpuclockid() returns on Linux
        except OSError:
            return 0.0


def _serve(pipe, module: str, name: str, provider: str) -> None:
    """Answers the parent until it closes the pipe."""
    import measure  # in the child: the native core runs on one thread where it was loaded before a fork

    call = None
    while True:
        try:
            request, *args = pipe.recv()
        except EOFError:
            return
        try:
            if call is None:
                problem = importlib.import_module(module).problem(name)
                call = problem.calls[provider]
                measure.keep_memory(problem.keeps_memory)
            answer = getattr(measure, request)(call, *args)
        except ImportError as error:
            answer = Missing(f"{error}")
        except Exception:
            answer = RuntimeError(f"{module}, {name}, {provider}:\n{traceback.format_exc()}")
        pipe.send(answer)
