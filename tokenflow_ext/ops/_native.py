"""The door to the native core: loading it, handing tensors over, choosing the backend."""

import os
import warnings

import torch

try:
    from tokenflow_ext import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C, _why = None, str(error)
else:
    # torch < 2.10 has no exchange table: its tensors travel in capsules.
    _C.connect(
        torch.Tensor,
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        torch.utils.dlpack.to_dlpack,
        lambda size: torch.empty(-(-size // 8), dtype=torch.int64),
    )

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "native", "reference")
_CPU = torch.device("cpu")

_forked = False
_warned = set()
LIBRARY = torch.library.Library("tokenflow_ext", "DEF")


def _after_fork() -> None:
    global _forked
    _forked = True


# libgomp's threads do not survive a fork: a child that asked for two of them would wait forever.
os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads of a kernel: torch's number, or 1 in a forked child such as a DataLoader worker."""
    return 1 if _forked else torch.get_num_threads()


def view(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself: the core reads tensors (csrc/tensors.h), and an argument lives as long as its call."""
    return tensor


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


def use_native(op: str, backend: str, device: torch.device) -> bool:
    """Whether the kernel runs (True) or the twin in `tokenflow_ext.reference` (False).

    Args:
        op: name for the sentences.
        backend: "auto", "native" or "reference"; "auto" gives way to TOKENFLOW_BACKEND.
        device: where the tensors are.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: "native" where no kernel was built for the device.
    """
    if backend == "auto":
        backend = os.environ.get("TOKENFLOW_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return False
    if _C is not None and (device == _CPU or device.type == "cpu"):
        return True
    missing = (
        f"no kernel was built for {device.type} tensors"
        if _C is not None
        else f"the native core could not be loaded ({_why})"
    )
    if backend == "native":
        raise RuntimeError(
            f"{op}: backend: wanted native, but {missing}; rebuild with `pip install .` in the source tree"
        )
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"tokenflow_ext: {missing}; using the PyTorch reference, which is slower and builds N x K matrices",
            stacklevel=3,
        )
    return False


def define(schema: str, cpu, fake) -> torch._ops.OpOverload:
    """Registers one operator of torch.ops.tokenflow_ext, its schema, its CPU kernel and its shapes, and returns it."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"tokenflow_ext::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tokenflow_ext, name).default


def define_backward(schema: str, cpu, fake) -> torch._ops.OpOverload:
    """Registers the closed-form backward of an operator; asking for its own derivative is an error, not a zero."""
    name = schema.split("(")[0]
    op = define(schema, cpu, fake)

    def twice(ctx, *grads):
        raise RuntimeError(
            f"{name.removesuffix('_backward')}: it is differentiable once, a second derivative was asked for"
        )

    torch.library.register_autograd(f"tokenflow_ext::{name}", twice, lib=LIBRARY)
    return op


def warn_non_finite(op: str, status: torch.Tensor | int) -> None:
    """One warning where a kernel counted rows that are not finite."""
    count = status if isinstance(status, int) else int(status[-1])
    if count:
        warnings.warn(
            f"{op}: {count} rows hold NaN or inf; they get the lowest id and are left out of loss, statistics and gradients",
            RuntimeWarning,
            stacklevel=2,
        )


def check_ids(op: str, outside: torch.Tensor, codes: int) -> None:
    """ValueError where a kernel counted ids outside the table."""
    if int(outside):
        raise ValueError(f"{op}: indices: wanted ids in [0, {codes}), got {int(outside)} outside")


def build_info() -> dict:
    """What was built and what runs.

    Returns:
        native (whether the core was loaded), version, compiler, instruction_sets (built), instruction_set (the one that
        runs; TOKENFLOW_ISA forces a lower one), cuda, threads, torch.

    Example:
        >>> build_info()["native"]
        True
    """
    core = _C.build_info() if _C is not None else {}
    return {"native": _C is not None, **core, "threads": threads(), "torch": torch.__version__}
