"""What a worker does with its call: weigh it, time it, say what the numbers depend on."""

import ctypes
import functools
import importlib.metadata
import platform
import resource
import time
from pathlib import Path

import torch

import tokenflow_ext
from tokenflow_ext.ops._native import _C

PACKAGES = ("tokenflow-ext", "torch", "faiss-cpu", "vector-quantize-pytorch", "numpy")


def first(call, path: Path) -> tuple[int, float]:
    """(peak bytes above the inputs, seconds) of the first call, whose results go to a file."""
    _warm_up()
    if hasattr(call, "prepare"):
        call.prepare()
    before = _forget_peak()
    start = time.perf_counter()
    results = call()
    seconds = time.perf_counter() - start
    memory = _peak() - before
    torch.save(_detached(results), path)
    return max(memory, 0), seconds


def keep_memory(keep: bool) -> None:
    """Tells glibc, where it is, to return no freed memory to the system: no mapping a block, no trimming."""
    libc = ctypes.CDLL(None)
    if keep and hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def turn(call, repeat: int, warm: bool) -> tuple[float, float]:
    """(wall, CPU) seconds a call, over `repeat` calls after one that warms up where `warm` says so."""
    if warm:
        call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - wall) / repeat, (time.process_time() - cpu) / repeat


def facts(call, native: bool) -> dict:
    """Conditions of the numbers; for a native provider also which path ran and what this machine can do right now."""
    info = tokenflow_ext.build_info()
    searched, machine = (_searches(call), peaks()) if native else ({}, {})
    return {
        **{key: searched.get(key, "") for key in ("path", "fallback_rows", "rescored")},
        "fma_gflops": machine.get("fma", ""),
        "int8_gops": machine.get("int8", ""),
        "copy_gbs": machine.get("copy", ""),
        "threads": torch.get_num_threads(),
        "instruction_set": info["instruction_set"],
        "cpu": _cpu(),
        "versions": _versions(info["compiler"]),
        "date": time.strftime("%Y-%m-%d"),
    }


def peaks() -> dict[str, float]:
    """Float32 multiply-adds (GFLOP/s), 8-bit dot products (GOP/s) and copying (GB/s, read and written) at best."""
    rates, threads = torch.zeros(2, dtype=torch.float64), torch.get_num_threads()
    best = torch.zeros_like(rates)
    for _ in range(3):
        _C.peaks(rates, 0.03, threads)
        best = torch.maximum(best, rates)
    source, target = torch.ones(2, 2**26)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    fma, int8 = (1e-9 * best).tolist()
    return {"fma": fma, "int8": int8, "copy": 1e-9 * 2 * source.nbytes / min(seconds)}


def _searches(call) -> dict:
    """Which scan answered the rows of one call, how many rows the certified one gave up, what it scored again."""
    with tokenflow_ext.trace() as searched:
        call()
    path = "+".join(name for name, rows in (("int8", searched.int8), ("full", searched.full)) if rows)
    return {"path": path, "fallback_rows": searched.fallback, "rescored": searched.rescored}


def _forget_peak() -> int:
    """Bytes in use; Linux forgets its high-water mark on request, elsewhere that mark stands in for them."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int:
    """A field of this process's memory, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)


def _warm_up() -> None:
    """What the libraries allocate once is not the op's: `torch.autograd.grad` alone imports 34 MB of symbolic algebra."""
    x, codebook = torch.ones(4, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    for module in (tokenflow_ext.ops, tokenflow_ext.reference):
        out = module.quantize(x, codebook)
        torch.autograd.grad((out.quantized, out.loss), (x, codebook), (torch.ones(4, 2), torch.ones(())))
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))


def _detached(results):
    if isinstance(results, torch.Tensor):
        return results.detach()
    return [_detached(r) for r in results] if isinstance(results, (tuple, list)) else results


@functools.cache
def _cpu() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@functools.cache
def _versions(compiler: str) -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"python {platform.python_version()}", f"compiler {compiler}"])
