"""The twins compute in float32 (float64) under autocast too and are differentiable once, as the kernels are."""

import functools

import torch


def exact(twin):
    """`twin` with autocast switched off, whose second derivative is an error."""
    op = twin.__name__

    @functools.wraps(twin)
    def run(*args, **options):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            # A compiled graph refuses second derivatives by itself.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                args, options = _once(op, args), {name: _once(op, value) for name, value in options.items()}
            return twin(*args, **options)

    return run


def _once(op: str, value):
    """The argument of a twin, with its tensors passed through _Once where they require grad."""
    if isinstance(value, torch.Tensor):
        return _Once.apply(op, value) if value.requires_grad else value
    return type(value)(_once(op, v) for v in value) if type(value) in (tuple, list) else value


class _Once(torch.autograd.Function):
    """The tensor itself; its gradient has no derivative."""

    @staticmethod
    def forward(op, x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, grad):
        return None, _Gradient.apply(ctx.op, grad)


class _Gradient(_Once):
    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(f"{ctx.op}: it is differentiable once, a second derivative was asked for")
