"""The two ways to an operator, short and through the dispatcher: the same results, and who listens on the way hears of it."""

import pytest
import torch
from harness import assert_sentence, leaves, normal, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenflow_ext import ops
from tokenflow_ext.ops import _operator
from tokenflow_ext.ops.lookup import LOOKUP
from tokenflow_ext.ops.normalize import NORMALIZE_ROWS, NORMALIZE_ROWS_BACKWARD
from tokenflow_ext.ops.quantize import QUANTIZE, SUMS
from tokenflow_ext.ops.search import NEAREST_CODE
from tokenflow_ext.ops.statistics import CODE_STATISTICS


class Listening(TorchDispatchMode):
    """Notes the operators of ours that pass through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tokenflow_ext":
            self.heard.append(function._opname)
        return function(*args, **(kwargs or {}))


IDS = torch.arange(9)
OPTIONS = [6], [1.0], "cosine", 0.25, 1.0
CASES = {
    "lookup": (LOOKUP, lambda x, codebook: (IDS, codebook)),
    "normalize_rows": (NORMALIZE_ROWS, lambda x, codebook: (x,)),
    "quantize": (QUANTIZE, lambda x, codebook: (x, codebook, *OPTIONS, True, SUMS)),
    "quantize for nothing": (QUANTIZE, lambda x, codebook: (x, codebook, *OPTIONS, True, 0)),
    "nearest_code": (
        NEAREST_CODE,
        lambda x, codebook: (x.detach(), codebook.detach(), "l2", 3, None, True, None, None),
    ),
    "code_statistics": (CODE_STATISTICS, lambda x, codebook: (x.detach(), IDS, [12])),
}


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_bits_and_gradients(name):
    operator, arguments = CASES[name]

    def run(call):
        x, codebook = leaves(normal(9, 6, seed=1), normal(12, 6, seed=2))
        out = call(*arguments(x, codebook))
        out = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if o is not None and o.numel()]
        followed = [o for o in out if o.requires_grad]
        if operator.function is not None:
            assert followed
            sum(o.square().sum() for o in followed).backward()
        return [o.detach() for o in out] + [t.grad for t in (x, codebook) if t.grad is not None]

    short, long = run(operator), run(operator.op)
    assert len(short) == len(long) and all(same_bits(a, b) for a, b in zip(short, long))


@pytest.mark.parametrize("call", [lambda o: o, lambda o: o.op], ids=["short", "dispatcher"])
def test_a_second_derivative_is_refused_both_ways(call):
    (x,) = leaves(normal(9, 6))
    (first,) = torch.autograd.grad(call(NORMALIZE_ROWS)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="normalize_rows: it is differentiable once, a second derivative was asked"):
        first.sum().backward()


def test_plain_tensors_go_the_short_way(monkeypatch):
    def refuse(*args):
        raise AssertionError("the dispatcher")

    monkeypatch.setattr(NORMALIZE_ROWS, "op", refuse)
    x = normal(9, 6)
    for tensor in (x, torch.nn.Parameter(x), x[::2], x.to(torch.bfloat16)):
        ops.normalize_rows(tensor)
    with torch.no_grad(), torch.autocast("cpu"):
        assert not ops.normalize_rows(torch.nn.Parameter(x)).requires_grad
    with torch.inference_mode():
        assert ops.normalize_rows(x).is_inference()


def test_dispatch_modes_hear_forward_and_backward():
    x, codebook = leaves(normal(9, 6, seed=1), normal(12, 6, seed=2))
    with Listening() as mode:
        ops.quantize(x, codebook).loss.backward()
        ops.nearest_code(x, codebook)
    assert mode.heard == ["quantize", "quantize_backward", "nearest_code"]


def test_function_modes_hear():
    class Hearing(TorchFunctionMode):
        heard = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.heard.append(function)
            return function(*args, **(kwargs or {}))

    with Hearing() as mode:
        ops.normalize_rows(normal(9, 6))
    assert torch.ops.tokenflow_ext.normalize_rows.default in mode.heard


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_operators_and_no_constants():
    x, codebook = normal(9, 6, seed=1), normal(12, 6, seed=2)

    def call(x):
        return ops.nearest_code(x, codebook), ops.normalize_rows(x), ops.quantize(x, codebook).quantized

    traced = torch.jit.trace(call, (x,))
    assert str(traced.graph).count("tokenflow_ext::") == 3
    assert all(same_bits(a, b) for a, b in zip(traced(-x), call(-x)))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_operators(strict):
    class Call(torch.nn.Module):
        def forward(self, x, codebook):
            return ops.quantize(x, codebook).indices, ops.nearest_code(x, codebook, topk=2), ops.normalize_rows(x)

    inputs = normal(9, 6, seed=1), normal(12, 6, seed=2)
    rows = {"x": {0: torch.export.Dim("rows")}, "codebook": None}
    program = torch.export.export(Call(), inputs, strict=strict, dynamic_shapes=rows)
    called = [node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert called.count("tokenflow_ext") == 3
    inputs = normal(5, 6, seed=3), inputs[1]
    assert all(same_bits(a, b) for a, b in zip(program.module()(*inputs), Call()(*inputs)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_functions_go_through_the_dispatcher():
    x = normal(3, 9, 6)
    assert same_bits(torch.vmap(ops.normalize_rows)(x), ops.normalize_rows(x))
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(lambda x: ops.normalize_rows(x).sum())(x)


def test_forward_mode_is_refused_where_a_gradient_is_wanted():
    (x,) = leaves(normal(9, 6))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ops.normalize_rows(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("call", [lambda o: o, lambda o: o.op], ids=["short", "dispatcher"])
@pytest.mark.parametrize("changed", ["x", "indices", "codebook"])
def test_what_backward_reads_may_not_change_before_it(call, changed):
    x, codebook = leaves(normal(9, 6, seed=1), normal(12, 6, seed=2))
    rows = x * 1
    out = call(QUANTIZE)(rows, codebook, *OPTIONS, True, 0)
    {"x": rows, "indices": out[1], "codebook": codebook}[changed].detach().add_(1)
    if changed == "codebook":  # which backward never reads: an EMA may have moved it by then
        out[2].backward()
        assert x.grad.isfinite().all()
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out[2].backward()


def test_rows_of_inference_mode_are_not_saved():
    with torch.inference_mode():
        x = normal(9, 6)
    assert torch.equal(ops.nearest_code(x, x), IDS)
    (codebook,) = leaves(normal(12, 6))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        ops.quantize(x, codebook)


def test_tensors_that_stand_for_zeros_are_read_as_zeros():
    x = normal(9, 6)
    zero = torch._efficientzerotensor(9, 6)
    assert torch.equal(ops.normalize_rows(zero), torch.zeros(9, 6))
    assert torch.equal(NORMALIZE_ROWS_BACKWARD(x, zero), torch.zeros(9, 6))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_other_layouts_are_refused(layout):
    x, codebook = normal(9, 6), normal(12, 6)
    other = getattr(x, layout)()
    assert_sentence(TypeError, "normalize_rows", "x", ops.normalize_rows, other)
    assert_sentence(TypeError, "nearest_code", "codebook", ops.nearest_code, x, getattr(codebook, layout)())
    assert_sentence(TypeError, "shared_quantize", "xs[1]", ops.shared_quantize, (x, other), (codebook, codebook))
    assert_sentence(TypeError, "soft_quantize", "x", ops.soft_quantize, other, codebook, codebook)
    if layout != "to_mkldnn":
        ids = getattr(torch.ones(2, 2, dtype=torch.int64), layout)()
        assert_sentence(TypeError, "lookup", "indices", ops.lookup, ids, codebook)


@pytest.mark.filterwarnings("ignore:tokenflow_ext. no kernel was built for meta")
def test_meta_tensors_get_shapes():
    x, codebook = torch.empty(9, 6, device="meta"), torch.empty(12, 6, device="meta")
    assert ops.nearest_code(x, codebook).shape == (9,) and ops.quantize(x, codebook).quantized.is_meta


def test_fake_tensors_get_shapes():
    with FakeTensorMode():
        quantized, indices, loss = ops.quantize(torch.empty(9, 6, requires_grad=True), torch.empty(12, 6))
    assert quantized.shape == (9, 6) and indices.shape == (9,) and loss.requires_grad


def test_the_profiler_sees_operators():
    with torch.profiler.profile() as profile:
        ops.normalize_rows(normal(9, 6))
    assert "tokenflow_ext::normalize_rows" in {event.key for event in profile.key_averages()}


def test_subclasses_of_tensors_are_asked():
    class Named(torch.Tensor):
        called = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "namespace", "") == "tokenflow_ext":
                cls.called.append(function._opname)
            return super().__torch_function__(function, types, args, kwargs or {})

    ops.normalize_rows(normal(9, 6).as_subclass(Named))
    assert Named.called == ["normalize_rows"]


def test_a_negated_view_is_read_as_what_it_stands_for():
    x = normal(9, 6)
    negated = torch.complex(normal(9, 6, seed=1), x).conj().imag
    assert negated.is_neg()
    assert same_bits(ops.normalize_rows(negated), ops.normalize_rows(-x))
    assert torch.equal(ops.nearest_code(negated, x), ops.nearest_code(-x, x))


def test_hooks_on_saved_tensors_see_them():
    packed = []
    (x,) = leaves(normal(9, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y = ops.normalize_rows(x)
    y.sum().backward()
    assert packed == [x.shape] and y.grad_fn.name() == "normalize_rowsBackward"


def test_absent_results_are_empty_where_a_schema_forbids_none():
    x, codebook = normal(9, 6), normal(12, 6)
    arguments = (x, codebook, *OPTIONS, False, 0)
    assert QUANTIZE(*arguments)[3:] == (None,) * 4
    assert [o.numel() for o in QUANTIZE.op(*arguments)[3:]] == [0] * 4
    assert _operator.LIBRARY.ns == "tokenflow_ext"


@pytest.mark.parametrize("through", ["dual", "jvp"])
def test_forward_mode_is_refused_where_no_gradient_is_wanted_too(through):
    """Kernels know no tangents: a derivative of zero would be wrong without a word."""
    x, codebook = normal(9, 6, seed=1), normal(12, 6, seed=2)
    with pytest.raises(RuntimeError, match="quantize: it has a backward and no jvp"):
        if through == "jvp":
            torch.func.jvp(lambda x: ops.quantize(x, codebook, backend="native").loss, (x,), (x,))
        with forward_ad.dual_level():
            ops.quantize(forward_ad.make_dual(x, x), codebook, backend="native")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(ops.nearest_code(dual, codebook), ops.nearest_code(x, codebook))
        assert torch.equal(ops.normalize_rows(codebook), ops.normalize_rows(codebook))
