"""Operators of torch.ops.tokenflow_ext: how one is registered, and the short way to it.

The dispatcher with a kernel in Python costs as much as a search through a thousand codes, `register_autograd` several times
that. Where nobody listens on the way, an `Operator` calls its kernel itself, or a torch.autograd.Function where a gradient is
wanted. Under torch.compile, torch.jit.trace, a mode of dispatch or of functions, functorch and the profiler it goes through the
dispatcher, and so do subclasses of tensors and tensors that stand for others. Both ways run the same kernel, setup and backward.
"""

import torch
from torch.autograd import forward_ad

from tokenflow_ext.ops import _native

LIBRARY = torch.library.Library("tokenflow_ext", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Operator:
    """Calls one operator, all of its arguments by position.

    Attributes:
        op: the operator.
        kernel: its implementation, which may return None in a tuple for what was not asked for.
        function: the torch.autograd.Function that joins it with its backward; None where there is no gradient.
        tensors: how many of its arguments are tensors; they come first.
    """

    def __init__(self, op: torch._ops.OpOverload, kernel):
        self.op, self.kernel, self.function = op, kernel, None
        self.tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.op(*args)
        if forward_ad._current_level >= 0 and self.function is not None:
            self._refuse_tangents(args)
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
            or torch._C._autograd._profiler_enabled()
        ):
            return self.op(*args)
        tracked = False
        for tensor in args[: self.tensors]:
            if tensor is not None:
                if type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor():
                    return self.op(*args)
                tracked = tracked or tensor.requires_grad
        if tracked and self.function is not None and torch.is_grad_enabled():
            return self.function.apply(*args)
        return self.kernel(*args)

    def _refuse_tangents(self, args) -> None:
        """NotImplementedError where forward-mode differentiation would go on with a zero."""
        for tensor in args[: self.tensors]:
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                name = self.op._schema.name.split("::")[1]
                raise NotImplementedError(f"{name}: it has a backward and no jvp, a forward derivative was asked for")


def define(schema: str, kernel, fake) -> Operator:
    """Registers one operator: its schema, its kernel for every core, and its shapes."""
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, _in_full(kernel), key)
    torch.library.register_fake(f"tokenflow_ext::{name}", _in_full(fake), lib=LIBRARY)
    return Operator(getattr(torch.ops.tokenflow_ext, name).default, kernel)


def _in_full(kernel):
    """The kernel with an empty tensor, of the first argument's type, for every None of its tuple: schemas know no None."""

    def run(*args):
        result = kernel(*args)
        if not isinstance(result, tuple):
            return result
        return tuple(args[0].new_empty(0) if part is None else part for part in result)

    return run


def define_autograd(operator: Operator, setup, backward) -> None:
    """Joins an operator and its backward, which runs on the core that its forward ran on."""

    def setup_context(ctx, inputs, output):
        ctx.emulated = _native.emulates()
        setup(ctx, inputs, output)

    def followed(ctx, *grads):
        if ctx.emulated == _native.emulates():
            return backward(ctx, *grads)
        with _native.emulating(ctx.emulated):
            return backward(ctx, *grads)

    def forward(ctx, *args):
        output = operator.kernel(*args)
        setup_context(ctx, args, output)
        return output

    name = operator.op._schema.name
    torch.library.register_autograd(name, followed, setup_context=setup_context, lib=LIBRARY)
    parts = {"forward": staticmethod(forward), "backward": staticmethod(followed)}
    operator.function = type(name.split("::")[1], (torch.autograd.Function,), parts)


def define_backward(schema: str, kernel, fake) -> Operator:
    """Registers the closed-form backward of an operator; asking for its own derivative is an error, not a zero."""
    operator = define(schema, kernel, fake)
    name = schema.split("(")[0].removesuffix("_backward")

    def twice(ctx, *grads):
        raise RuntimeError(f"{name}: it is differentiable once, a second derivative was asked for")

    define_autograd(operator, lambda ctx, inputs, output: None, twice)
    return operator


def once(kept: torch.Tensor) -> torch.Tensor:
    """What forward kept, for the backward that reads it: where a graph of the gradient is wanted it requires grad itself.

    Otherwise a gradient would be a constant to that graph where all that it depends on was kept by value, and a second
    derivative would lack its part without a word.
    """
    return kept.detach().requires_grad_() if torch.is_grad_enabled() else kept


def not_differentiable(ctx, *outputs: torch.Tensor | None) -> None:
    """Marks those of the outputs that there are."""
    ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
