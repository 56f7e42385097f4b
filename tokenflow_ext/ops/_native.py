"""The door to the native core: loading it, handing tensors over, choosing the backend."""

import contextlib
import os
import threading
import warnings

import torch

try:
    from tokenflow_ext import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C, _why = None, str(error)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = ["auto", "native", "reference"]
KERNELS = {
    "shared_nearest_code": ["nearest_code"],
    "lookup": ["lookup", "lookup_backward"],
    "normalize_rows": ["normalize_rows", "normalize_rows_backward"],
    "quantize": ["quantize", "quantize_backward", "code_statistics"],
    "entropy_loss": ["nearest_code", "entropy_loss", "entropy_loss_backward"],
    "soft_quantize": ["nearest_code", "lookup", "lookup_backward", "soft_quantize_backward"],
    "ema_update_": ["ema_update"],
    "multiscale_quantize": ["multiscale_quantize", "multiscale_quantize_backward"],
    "multiscale_rows": ["multiscale_rows", "multiscale_rows_backward"],
    "multiscale_decode": ["multiscale_decode", "multiscale_decode_backward"],
    "multiscale_inputs": [f"multiscale_{name}{end}" for name in ("decode", "chain") for end in ("", "_backward")],
}
KERNELS["shared_lookup"], KERNELS["shared_quantize"] = KERNELS["lookup"], KERNELS["quantize"]
"""What a function runs, where it is more than the kernel of its name."""


def connect(core) -> None:
    """Lends a core what it takes from torch; torch < 2.10 has no exchange table, and its tensors travel in capsules."""
    core.connect(
        torch.Tensor,
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        torch.utils.dlpack.to_dlpack,
        lambda size, device: torch.empty(-(-size // 8), dtype=torch.int64, device="cpu" if device < 0 else device),
    )


if _C is not None:
    connect(_C)

_forked = False
_warned = set()
_counts = {}  # by ordinal of the CUDA device; -1: emulated
_emulator = None
_traced = 0  # blocks of `trace` that are open


def _after_fork() -> None:
    global _forked
    _forked = True


# libgomp's threads do not survive a fork: a child that asked for two of them would wait forever.
os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads of a kernel: torch's number, or 1 in a forked child such as a DataLoader worker."""
    return 1 if _forked else torch.get_num_threads()


def runs_on(tensor: torch.Tensor):
    """(core, where): the core that computes where the tensor is, and the last arguments of its ops.

    These are the threads of the CPU; or a CUDA device's ordinal, its current stream, and the int64 on the device to which
    kernels add what they may not raise or warn about.
    """
    if tensor.is_cpu:
        if emulates():
            return _emulator, (-1, 0, counts(-1))
        return _C, (threads(),)
    device = tensor.get_device()
    return _C.cuda, (device, torch._C._cuda_getCurrentRawStream(device), counts(device))


def counts(device: int) -> torch.Tensor:
    """What the kernels of a CUDA device count, always at the same address, so that graphs may hold it.

    Ids outside their table, rows that are not finite; and while searches are traced, of certified ones: rows answered, rows
    handed over to the float32 search, segments scored again.
    """
    if device not in _counts:
        if device >= 0:
            _C.cuda.check(device)
        _counts[device] = torch.zeros(5, dtype=torch.int64, device="cpu" if device < 0 else f"cuda:{device}")
    return _counts[device] if _traced else _counts[device][:2]


def cuda_cores() -> list:
    """The cores of CUDA that can run here: the extension's where there is a device, the tests' emulated one."""
    own = getattr(_C, "cuda", None) if torch.cuda.is_available() else None
    return [core for core in (own, _emulator) if core is not None]


@contextlib.contextmanager
def traced():
    """Inside the block kernels count what certified searches do; yields a function that sums it up, which waits for devices."""
    global _traced
    _traced += 1
    try:
        yield lambda: [
            sum(numbers) for numbers in zip((0, 0, 0), *(c[2:].tolist() for c in _counts.values()), strict=True)
        ]
    finally:
        _traced -= 1


def quietly(where: tuple) -> tuple:
    """`where`, for a kernel that reads rows of which another one has counted those that are not finite."""
    return where if len(where) == 1 else (*where[:2], None)


def tell_counts(device: torch.device) -> None:
    """Warns about what CUDA kernels counted since this was asked last; the only place that waits for the device."""
    index = -1 if device.type == "cpu" else device.index
    if index not in _counts:
        return
    outside, bad = _counts[index][:2].tolist()
    _counts[index][:2].zero_()
    if outside:
        warnings.warn(
            f"tokenflow_ext: {outside} ids lay outside their tables; they were read as NaN and sent no gradient",
            RuntimeWarning,
            stacklevel=3,
        )
    warn_non_finite("tokenflow_ext", bad)


class _Asked(threading.local):
    """What this thread asked for: the emulated core, with its last call; no warnings of rows that are not finite."""

    emulated = quiet = False


_asked = _Asked()


def emulates() -> bool:
    """Whether ops on CPU tensors now run on the core that a test registered."""
    return _emulator is not None and _asked.emulated


def may_look(values: torch.Tensor) -> bool:
    """Whether Python may read values of this tensor: there are some, and no device has to be waited for."""
    return not torch.compiler.is_compiling() and type(values) is torch.Tensor and values.is_cpu and not emulates()


@contextlib.contextmanager
def emulating(wanted: bool):
    """Inside the block they do, or do not."""
    before, _asked.emulated = _asked.emulated, wanted
    try:
        yield
    finally:
        _asked.emulated = before


class counted_by_the_caller:  # noqa: N801
    """Inside the block kernels on the CPU do not warn of rows that are not finite."""

    def __enter__(self):
        self.before, _asked.quiet = _asked.quiet, True

    def __exit__(self, *_):
        _asked.quiet = self.before


def register_core(name: str, module) -> None:
    """For tests: `backend=name` runs CPU tensors on `module`, which has CUDA's ops, and the backward that follows too.

    Ops of torch.ops.tokenflow_ext that are called without one of our functions go where the thread's last call went.
    """
    global _emulator
    _emulator = module
    BACKENDS[3:] = [name]


def real(*tensors: torch.Tensor) -> torch.dtype:
    """The type that is computed in: float64 where any tensor is float64, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def in_type(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype); a microsecond less where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its gradient, for ops that have none."""
    return tensor.detach() if tensor.requires_grad else tensor


def use_native(op: str, backend: str, *tensors: torch.Tensor) -> bool:
    """Whether the kernel runs (True) or the twin in `tokenflow_ext.reference` (False).

    Args:
        op: name of the function.
        backend: "auto", "native" or "reference"; "auto" gives way to TOKENFLOW_BACKEND.
        tensors: all on one device; their types decide what is computed in.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "native" where no kernel was built for the device or for the type.
    """
    if backend == "auto":
        backend = os.environ.get("TOKENFLOW_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    if _emulator is not None:
        _asked.emulated = backend == BACKENDS[-1]
    if backend == "reference":
        return False
    if _C is None:
        missing = f"the native core could not be loaded ({_why})"
    elif tensors[0].is_cpu and not emulates():
        return True
    else:
        missing = _missing(op, tensors)
        if missing is None:
            return True
    if backend != "auto":
        raise RuntimeError(
            f"{op}: backend: wanted {backend}, but {missing}; rebuild with `pip install .` in the source tree"
        )
    if missing not in _warned:
        _warned.add(missing)
        warnings.warn(
            f"tokenflow_ext: {missing}; using the PyTorch reference, which is slower and builds N x K matrices",
            stacklevel=3,
        )
    return False


def _missing(op: str, tensors) -> str | None:
    """What a core for CUDA lacks to run the function on these tensors."""
    device = tensors[0].device.type
    core = _emulator if device == "cpu" else getattr(_C, "cuda", None) if device == "cuda" else None
    if core is None:
        return f"no kernel was built for {device} tensors"
    if real(*tensors) == torch.float64:
        return f"no kernel for {device} tensors computes in float64"
    lacks = [name for name in KERNELS.get(op, [op]) if not hasattr(core, name)]
    return f"{', '.join(lacks)} was not built for {device} tensors" if lacks else None


def warn_non_finite(op: str, count: int) -> None:
    """One warning where a kernel counted rows that are not finite."""
    if count and not _asked.quiet:
        warnings.warn(
            f"{op}: {count} rows hold NaN or inf; they get the lowest id and are left out of loss, statistics and gradients",
            RuntimeWarning,
            stacklevel=2,
        )


def check_ids(op: str, outside: int, codes: int) -> None:
    """ValueError where a kernel counted ids outside the table."""
    if outside:
        raise ValueError(f"{op}: indices: wanted ids in [0, {codes}), got {outside} outside")


def build_info() -> dict:
    """What was built and what runs.

    Returns:
        native (whether the core was loaded), version, compiler, instruction_sets (built), instruction_set (the one that
        runs; TOKENFLOW_ISA forces a lower one), cuda (the architectures that kernels were built for, none without nvcc),
        threads, torch.

    Example:
        >>> build_info()["native"]
        True
    """
    core = _C.build_info() if _C is not None else {}
    return {"native": _C is not None, **core, "threads": threads(), "torch": torch.__version__}
