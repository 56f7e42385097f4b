"""What of CUDA can be held to without a GPU: shapes on fake devices, the device and stream that kernels get.

Every operator call that the problems of tests/emulator make is heard on the CPU and made again with fake tensors.
"""

import sys
from dataclasses import dataclass

import pytest
import torch
from emulator import problems
from emulator.kernels import OPS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tokenflow_ext.ops import _native
from tokenflow_ext.ops._operator import Operator

STREAMS = {0: 1000, 1: 2001}


@dataclass
class Heard:
    """One call of an operator, forward or backward, and its results."""

    op: torch._ops.OpOverload
    args: tuple
    results: list[torch.Tensor]


def tensors(results) -> list[torch.Tensor]:
    return [result for result in tree_leaves(results) if result is not None]


class _Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.namespace == "tokenflow_ext":
            assert not kwargs
            self.heard.append(Heard(function, args, tensors(results)))
        return results


@pytest.fixture(scope="module")
def heard():
    """Calls of every operator, in every type and with every option."""
    with _Listening() as mode, pytest.warns(RuntimeWarning):
        for part in (
            problems.search,
            problems.quantizing,
            problems.statistics,
            problems.softmaxes,
            problems.multiscale,
        ):
            part()
    return mode.heard


OPERATORS = {
    value.op: value
    for name, module in list(sys.modules.items())
    if name.startswith("tokenflow_ext.ops")
    for value in vars(module).values()
    if isinstance(value, Operator)
}


class Core:
    """Stands in for the core of CUDA: notes what it is called with and reads no tensor."""

    def __init__(self, calls):
        for op in OPS:
            setattr(self, op, lambda *arguments, op=op: calls.append((op, arguments)) or (0, 0))

    def check(self, device):
        assert device in STREAMS


class Slices(TorchFunctionMode):
    """Slices of tensors on a device, which torch without CUDA refuses from Python.

    A mode, because a __getitem__ of torch.Tensor itself would leave its class a sequence when it is gone again (CPython keeps the slot
    filled), and torch.tensor of a list of tensors would fail for the rest of the process.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and args[0].is_cuda and isinstance(args[1], slice):
            start, stop, _ = args[1].indices(len(args[0]))
            return args[0].narrow(0, start, stop - start)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reached(monkeypatch):
    """The calls that arrive at a core of CUDA, with two devices of different current streams."""
    calls, own = [], _native._C

    class Door:
        cuda = Core(calls)

        def __getattr__(self, name):
            return getattr(own, name)

    monkeypatch.setattr(_native, "_C", Door())
    monkeypatch.setattr(_native, "_counts", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", STREAMS.__getitem__, raising=False)
    with Slices():
        yield calls


def like(device: str):
    """Fake tensors of the same type, shape and strides on a device."""

    def made(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    return lambda args: tree_map_only(torch.Tensor, made, args)


def test_every_operator_is_heard(heard):
    assert {call.op for call in heard} == set(OPERATORS)


def test_shapes_types_and_strides_on_a_gpu(heard, reached):
    """The fake of every operator promises what its kernel returned, on the device of its arguments."""
    for call in heard:
        with FakeTensorMode():
            promised = tensors(call.op(*like("cuda:1")(call.args)))
        assert len(promised) == len(call.results), call.op
        for a, b in zip(promised, call.results, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), call.op
            assert a.device == torch.device("cuda:1"), call.op
    assert not reached, "fake tensors have no numbers for a kernel"


@pytest.mark.parametrize("device", STREAMS)
def test_kernels_get_the_device_and_its_current_stream(heard, reached, device):
    """Every kernel that every operator runs: device, stream, counts at one address, and all tensors on that device."""
    where, addresses = torch.device("cuda", device), set()
    with FakeTensorMode():
        for call in heard:
            name, before = call.op._opname, len(reached)
            if all(kernel in OPS for kernel in _native.KERNELS.get(name, [name])):  # CUDA has it
                OPERATORS[call.op].kernel(*like(str(where))(call.args))
                assert len(reached) > before or name == "soft_quantize", call.op  # forward it is made of others
    for op, (*arguments, ordinal, stream, counts) in reached:
        assert (ordinal, stream) == (device, STREAMS[device]), op
        if counts is not None:
            assert counts.device == where and (counts.dtype, counts.shape[0]) == (torch.int64, 2)
            addresses.add(counts.untyped_storage()._cdata)
        for i, tensor in enumerate(t for t in arguments if isinstance(t, torch.Tensor)):
            host = "multiscale" in op and tensor.device.type == "cpu" and tensor.shape[1:] == (3,)  # the grids
            assert host or (tensor.device == where and tensor.is_contiguous()), f"{op}: tensor {i} on {tensor.device}"
    assert {op for op, _ in reached} >= {op for op in OPS if op != "mma_probe"} and len(addresses) == 1


def test_what_stands_in_for_cuda_leaves_nothing_behind(heard, reached):
    """The tests before this one are gone through: a list of tensors is still one tensor, inside and outside of the mode."""
    assert torch.tensor([torch.tensor(1), torch.tensor(2)]).tolist() == [1, 2]
    assert "__getitem__" not in vars(torch.Tensor)
