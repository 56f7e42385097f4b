"""Bad input becomes a sentence before any pointer is touched: op, argument, wanted, got."""

import numbers
from collections.abc import Iterable, Sequence

import torch

from tokenflow_ext.ops._native import BACKENDS, FLOATS, check_ids, warn_non_finite

METRICS = ("cosine", "l2", "dot")


def floating(op: str, name: str, value) -> torch.Tensor:
    """`value` if it is a floating-point tensor, else TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name}: wanted float32, float64, float16 or bfloat16, got {value.dtype}")
    return dense(op, name, value)


def ids(op: str, name: str, value) -> torch.Tensor:
    """`value` if it is an int64 tensor, else TypeError."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: wanted a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name}: wanted int64, got {value.dtype}")
    return dense(op, name, value)


def dense(op: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` if its elements lie in memory at strides, else TypeError: kernels read no sparse tensor."""
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: wanted a dense tensor, got {value.layout}")
    return value


def one_of(op: str, name: str, value, choices: Iterable[str]) -> str:
    """`value` if it is one of these names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name}: wanted one of {', '.join(choices)}, got {value!r}")
    return value


def metric(op: str, value) -> str:
    return one_of(op, "metric", value, METRICS)


def backend(op: str, value) -> str:
    return one_of(op, "backend", value, BACKENDS)


def number(op: str, name: str, value) -> float:
    """`value` as a float, if it is a number and no tensor, else TypeError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name}: wanted a number, got {type(value).__name__}")
    return float(value)


def integer(op: str, name: str, value) -> int:
    """`value` if it is an integer, else TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name}: wanted an integer, got {type(value).__name__}")
    return value


def non_negative(op: str, name: str, value) -> float:
    """`value` as a float, if it is a finite number >= 0."""
    value = number(op, name, value)
    if not value >= 0 or value == float("inf"):
        raise ValueError(f"{op}: {name}: wanted a finite number >= 0, got {value}")
    return value


def above_zero(op: str, name: str, value) -> float:
    """`value` as a float, if it is a finite number > 0."""
    if not 0 < number(op, name, value) < float("inf"):
        raise ValueError(f"{op}: {name}: wanted a finite number > 0, got {value}")
    return float(value)


def share(op: str, name: str, value) -> float:
    """`value` as a float, if it is a number in [0, 1]."""
    value = number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name}: wanted a number in [0, 1], got {value}")
    return value


def positive(op: str, name: str, value) -> int:
    """`value` if it is an integer >= 1."""
    if integer(op, name, value) < 1:
        raise ValueError(f"{op}: {name}: wanted an integer >= 1, got {value}")
    return value


def flag(op: str, name: str, value) -> bool:
    """`value` if it is True or False, else TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name}: wanted True or False, got {value!r}")
    return value


def mask(op: str, value, shape: Sequence[int], meaning: str) -> torch.Tensor:
    """`value` if it is a bool tensor of that shape, which `meaning` explains."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: mask: wanted a bool tensor, got {got}")
    if value.shape != shape:
        raise ValueError(f"{op}: mask: wanted {list(shape)}, {meaning}, got {list(value.shape)}")
    return value


def same_device(op: str, **tensors: torch.Tensor) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name}: wanted the device of {first_name}, {first.device}, got {tensor.device}")


def table(op: str, name: str, value, *, grouped: bool = True) -> torch.Tensor:
    """A codebook [K, D], or [G, K, D] where groups are allowed, with at least one code and one channel."""
    floating(op, name, value)
    ranks = (2, 3) if grouped else (2,)
    if value.dim() not in ranks or not value.numel():
        wanted = "[K, D] or [G, K, D]" if grouped else "[K, D]"
        raise ValueError(
            f"{op}: {name}: wanted {wanted} with at least one code and one channel, got {list(value.shape)}"
        )
    return value


def rows_fit(op: str, x, codebook) -> None:
    """x [..., D] with codebook [K, D], or x [..., G, D] with [G, K, D]."""
    floating(op, "x", x)
    table(op, "codebook", codebook)
    if codebook.device != x.device:
        same_device(op, x=x, codebook=codebook)
    rows, codes = x.shape, codebook.shape
    grouped = len(codes) == 3
    if len(rows) < len(codes) - 1 or rows[-1] != codes[-1] or (grouped and rows[-2] != codes[0]):
        wanted = f"[..., {codes[0]}, {codes[2]}]" if grouped else f"[..., {codes[1]}]"
        raise ValueError(f"{op}: x: wanted {wanted} for a codebook {list(codes)}, got {list(rows)}")


def rows_and_table(op: str, x, codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] with codebook [K, D], or x [..., G, D] with [G, K, D], as [N, G, D] and [G, K, D]."""
    rows_fit(op, x, codebook)
    groups, width = (codebook.shape[0] if codebook.dim() == 3 else 1), codebook.shape[-1]
    return x.reshape(count(x.shape[: x.dim() - codebook.dim() + 1]), groups, width), codebook.reshape(groups, -1, width)


def count(sizes: Sequence[int]) -> int:
    """Product of sizes; reshape(-1) cannot say it where a size is 0."""
    product = 1
    for size in sizes:
        product = product * size
    return product


def sequence(op: str, name: str, value) -> None:
    """A list or tuple of 1 to 16 tensors, one a table."""
    if isinstance(value, (str, torch.Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{op}: {name}: wanted a sequence of tensors, one a table, got {type(value).__name__}")
    if not 1 <= len(value) <= 16:
        raise ValueError(f"{op}: {name}: wanted 1 to 16 tables, got {len(value)}")


def same_codes(op: str, codebooks, t: int) -> None:
    """Table t holds as many codes as table 0."""
    if codebooks[t].shape[0] != codebooks[0].shape[0]:
        raise ValueError(
            f"{op}: codebooks[{t}]: wanted {codebooks[0].shape[0]} codes as in codebooks[0], got {codebooks[t].shape[0]}"
        )


def shared_tables(op: str, xs, codebooks, weights) -> tuple[list[int], list[float]]:
    """Widths and weights of T tables that share an index, after every check."""
    sequence(op, "xs", xs)
    sequence(op, "codebooks", codebooks)
    if len(xs) != len(codebooks):
        raise ValueError(f"{op}: xs: wanted as many as codebooks, {len(codebooks)}, got {len(xs)}")
    for t, (x, codebook) in enumerate(zip(xs, codebooks)):
        floating(op, f"xs[{t}]", x)
        table(op, f"codebooks[{t}]", codebook, grouped=False)
        same_device(op, **{"xs[0]": xs[0], f"xs[{t}]": x, f"codebooks[{t}]": codebook})
        if x.dtype != xs[0].dtype:
            raise TypeError(f"{op}: xs[{t}]: wanted the type of xs[0], {xs[0].dtype}, got {x.dtype}")
        if x.dim() < 1 or x.shape[-1] != codebook.shape[1] or x.shape[:-1] != xs[0].shape[:-1]:
            raise ValueError(f"{op}: xs[{t}]: wanted {[*xs[0].shape[:-1], codebook.shape[1]]}, got {list(x.shape)}")
        same_codes(op, codebooks, t)
    return [c.shape[1] for c in codebooks], table_weights(op, weights, len(codebooks))


def table_weights(op: str, weights, tables: int) -> list[float]:
    """One weight >= 0 a table; None means 1 each."""
    if weights is None:
        return [1.0] * tables
    if isinstance(weights, torch.Tensor):
        weights = weights.tolist()
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        raise TypeError(f"{op}: weights: wanted a sequence of numbers, one a table, got {type(weights).__name__}")
    if len(weights) != tables:
        raise ValueError(f"{op}: weights: wanted one a table, {tables}, got {len(weights)}")
    return [non_negative(op, "weights", w) for w in weights]


def warn_about_rows(op: str, *xs: torch.Tensor) -> None:
    """The kernels' warning about rows that are not finite, for the twins; on the CPU, where it costs no synchronisation."""
    if xs[0].device.type == "cpu" and not torch.compiler.is_compiling():
        bad = sum((~x.detach().isfinite().all(-1)).long() for x in xs)
        warn_non_finite(op, int((bad > 0).sum()))


def ids_in_range(op: str, indices: torch.Tensor, codes: int) -> None:
    """The kernels' ValueError about ids outside the table, for the twins; on the CPU only."""
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ids(op, int(((indices < 0) | (indices >= codes)).sum()), codes)
