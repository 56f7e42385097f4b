"""The multi-scale ops against their twins: values, ids, gradients, surrogates, registration."""

import pytest
import torch
from harness import assert_near, compiled, leaves, normal, opcheck, same_bits
from multiscale_cases import MODES, SCALES, WIDTHS, case, decoding, followed, frozen_multiscale, phi_of

from tokenflow_ext import ops, reference
from tokenflow_ext.reference.resample import area_weights, bicubic_weights

ON_CODES = [m for m in MODES if MODES[m].get("loss_on") != "accumulated"]


@pytest.mark.parametrize("rule", ["area", "bicubic"])
def test_weights_are_those_of_interpolate(rule):
    """In float64, where torch's own bicubic is exact enough to compare with; equal sizes give the identity exactly."""
    weights = {"area": area_weights, "bicubic": bicubic_weights}[rule]
    for n_in in range(1, 18):
        for n_out in range(1, 18):
            x = normal(1, 2, n_in, 3, seed=n_in, dtype=torch.float64)
            matrix = torch.tensor(weights(n_in, n_out), dtype=torch.float64)
            expected = torch.nn.functional.interpolate(x, size=(n_out, 3), mode=rule)
            assert_near(torch.einsum("ij,bcjw->bciw", matrix, x), expected, 1e-13)
            for row in weights(n_in, n_out):
                used = [j for j, w in enumerate(row) if w != 0]
                assert used == list(range(used[0], used[-1] + 1))
        assert torch.equal(torch.tensor(weights(n_in, n_in)), torch.eye(n_in))


def test_kernels_use_the_same_weights():
    """Bit for bit: one code of 1 among zeros is upsampled to a product of two weights, one pixel of 1 pooled to another."""
    size, table = (7, 10), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for h, w in [(1, 1), (2, 3), (3, 7), (5, 4), (7, 10)]:
        options = {"scales": [(h, w)], "metric": "dot", "backend": "native"}
        rows = torch.tensor(bicubic_weights(h, size[0]), dtype=torch.float64)
        columns = torch.tensor(bicubic_weights(w, size[1]), dtype=torch.float64)
        ids = torch.eye(h * w, dtype=torch.int64)
        expected = torch.einsum("pi,qj->ijpq", rows, columns).reshape(h * w, 1, *size)
        assert torch.equal(ops.multiscale_decode(ids, [table], size=size, **options), expected)
        rows = torch.tensor(area_weights(size[0], h), dtype=torch.float64)
        columns = torch.tensor(area_weights(size[1], w), dtype=torch.float64)
        pixels = torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, 1, *size)
        pooled = ops.multiscale_rows(pixels, torch.zeros(len(pixels), h * w, dtype=torch.int64), [table], **options)
        assert torch.equal(pooled[..., 0], torch.einsum("ip,jq->pqij", rows, columns).reshape(len(pixels), -1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", SCALES)
def test_loop_in_float32(grid, mode):
    """Ids are those of the exact search on the rows they leave; the value is the decoder's, bit for bit."""
    features, codebooks, options = case(grid, mode)
    result = ops.multiscale_quantize(features, codebooks, **options, backend="native")
    followed(features, codebooks, result.indices, options)
    decoded = ops.multiscale_decode(
        result.indices, codebooks, **decoding(options, features.shape[2:]), backend="native"
    )
    assert same_bits(result.quantized, decoded)
    rows = ops.multiscale_rows(features, result.indices, codebooks, **options, backend="native")
    assert_near(rows, reference.multiscale_rows(features.double(), result.indices, codebooks, **options), 2e-6)
    wide = decoding(
        {**options, "phi": None if "phi" not in options else phi_of(options["scales"], torch.float64)},
        features.shape[2:],
    )
    assert_near(decoded, reference.multiscale_decode(result.indices, [c.double() for c in codebooks], **wide), 2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grid", SCALES)
def test_loop_and_gradients_of_the_twin(grid, mode):
    """In float64, against autograd of the twin: from quantized, from the loss, and from both."""
    results = []
    for function in (lambda *a, **k: ops.multiscale_quantize(*a, **k, backend="native"), reference.multiscale_quantize):
        features, codebooks, options = case(grid, mode, torch.float64)
        inputs = leaves(features, *codebooks)
        if "phi" in options:
            weight, bias, ratio, assignment = options["phi"]
            inputs += leaves(weight, bias)
            options["phi"] = (*inputs[-2:], ratio, assignment)
        quantized, indices, loss = function(
            inputs[0], inputs[1:3], **options, commitment_weight=0.3, codebook_weight=0.7
        )
        seen = (quantized * normal(*quantized.shape, seed=5, dtype=torch.float64)).sum()
        grads = [
            torch.autograd.grad(t, inputs, retain_graph=True, allow_unused=True)
            for t in (seen, 3 * loss, seen + 2 * loss)
        ]
        grads = [[torch.zeros_like(i) if g is None else g for g, i in zip(gs, inputs)] for gs in grads]
        results.append((quantized, indices, loss, grads))
    (quantized, indices, loss, grads), (twin_quantized, twin_indices, twin_loss, twin_grads) = results
    assert followed(features, codebooks, indices, options) == 0
    assert int((indices != twin_indices).sum()) == 0
    assert_near(quantized, twin_quantized, 1e-13, "quantized")
    assert_near(loss, twin_loss, 1e-13, "loss")
    for which, got, expected in zip(("quantized", "loss", "both"), grads, twin_grads):
        assert all(not g.any() for g in got[1:]) or which != "quantized"
        for i, (a, b) in enumerate(zip(got, expected)):
            assert_near(a, b, 1e-12, f"gradient {i} from {which}")


@pytest.mark.parametrize("mode", ON_CODES)
def test_surrogate(mode):
    """The surrogate with frozen ids and sg values passes gradcheck, and its gradients are the op's."""
    features, codebooks, options = case("oblong", mode, torch.float64, batch=2)
    inputs = leaves(features, *codebooks)
    quantized, ids, loss = ops.multiscale_quantize(inputs[0], inputs[1:], **options, backend="native")
    constants = (features, codebooks)

    def surrogate(features, *codebooks):
        return frozen_multiscale(features, codebooks, ids, options, at=constants)

    assert torch.autograd.gradcheck(surrogate, inputs, fast_mode=True)
    seen = normal(*quantized.shape, seed=5, dtype=torch.float64)
    expected_quantized, expected_loss = surrogate(*inputs)
    assert_near(quantized, expected_quantized, 1e-13)
    assert_near(loss, expected_loss, 1e-13)
    got = torch.autograd.grad((quantized * seen).sum() + loss, inputs)
    for a, b in zip(got, torch.autograd.grad((expected_quantized * seen).sum() + expected_loss, inputs)):
        assert_near(a, b, 1e-12)


def ids_of(grid: str, batch: int = 2, codes: int = 6, scales: int | None = None):
    size, grids = SCALES[grid]
    length = sum(s * s if isinstance(s, int) else s[0] * s[1] for s in grids[:scales])
    return torch.randint(codes, (batch, length), generator=torch.Generator().manual_seed(4)), size, grids


@pytest.mark.parametrize("options", [{}, {"metric": "l2"}, {"phi": True}], ids=str)
@pytest.mark.parametrize("grid", SCALES)
def test_decode_gradcheck(grid, options):
    ids, size, scales = ids_of(grid)
    inputs = leaves(*(normal(6, w, seed=w, dtype=torch.float64) for w in WIDTHS), *phi_of(scales, torch.float64)[:2])

    def decode(first, second, weight, bias):
        phi = (weight, bias, 0.5, [s % 2 for s in range(len(scales))]) if "phi" in options else None
        kept = {k: v for k, v in options.items() if k != "phi"}
        return ops.multiscale_decode(ids, [first, second], scales=scales, size=size, phi=phi, **kept, backend="native")

    assert torch.autograd.gradcheck(decode, inputs, fast_mode=True)


@pytest.mark.parametrize("prefix", [1, 2, None])
@pytest.mark.parametrize(
    "options",
    [{"rule": "accumulate"}, {"rule": "accumulate", "phi": True}, {"rule": "chain"}, {"rule": "chain", "refine": 2}],
    ids=str,
)
@pytest.mark.parametrize("grid", ["oblong", "any order, repeated, short of the map"])
def test_inputs_gradcheck_and_twin(grid, options, prefix):
    ids, size, scales = ids_of(grid, scales=prefix)
    if prefix == 1 and "refine" in options:
        options = {**options, "refine": None}
    inputs = leaves(*(normal(6, w, seed=w, dtype=torch.float64) for w in WIDTHS), *phi_of(scales, torch.float64)[:2])

    def rows(function, first, second, weight, bias, **more):
        phi = (weight, bias, 0.5, [s % 2 for s in range(len(scales))]) if "phi" in options else None
        return function(ids, [first, second], scales=scales, size=size, **{**options, "phi": phi}, **more)

    assert torch.autograd.gradcheck(
        lambda *a: rows(ops.multiscale_inputs, *a, backend="native"), inputs, fast_mode=True
    )
    assert_near(
        rows(ops.multiscale_inputs, *inputs, backend="native"), rows(reference.multiscale_inputs, *inputs), 1e-13
    )


@pytest.mark.parametrize("mode", ["cosine", "l2", "phi"])
def test_rows_gradcheck(mode):
    features, codebooks, options = case("oblong", mode, torch.float64, batch=2)
    ids = torch.randint(37, (2, 35), generator=torch.Generator().manual_seed(4))
    inputs = leaves(features)
    assert torch.autograd.gradcheck(
        lambda x: ops.multiscale_rows(x, ids, codebooks, **options, backend="native"), inputs, fast_mode=True
    )
    tables = leaves(*codebooks)
    assert not ops.multiscale_rows(features, ids, tables, **options, backend="native").requires_grad


def test_backward_does_not_read_the_codebook():
    """An EMA may move the tables between forward and backward."""
    grads = []
    for moved in (False, True):
        features, codebooks, options = case("square", "cosine")
        inputs = leaves(features, *codebooks)
        quantized, _, loss = ops.multiscale_quantize(inputs[0], inputs[1:], **options, backend="native")
        if moved:
            for table in inputs[1:]:
                table.data.fill_(7.0)
        grads.append(torch.autograd.grad(quantized.sum() + loss, inputs))
    assert all(same_bits(a, b) for a, b in zip(*grads))


def every_op(features, codebooks, ids, phi):
    """One differentiable call of each function, summed."""
    common = {"scales": (1, 2, 4), "backend": "native"}
    quantized, _, loss = ops.multiscale_quantize(features, codebooks, **common)
    accumulated = ops.multiscale_quantize(features, codebooks, **common, loss_on="accumulated", phi=phi)
    rows = ops.multiscale_rows(features, ids, codebooks, **common)
    decoded = ops.multiscale_decode(ids, codebooks, **common, size=4, phi=phi)
    inputs = [ops.multiscale_inputs(ids, codebooks, **common, size=4, rule=rule) for rule in ("accumulate", "chain")]
    tensors = (quantized, rows, decoded, *inputs)
    return sum(t.square().sum() for t in tensors) + loss + accumulated.loss + accumulated.quantized.sum()


def test_compile():
    """One graph, forward and backward, with the eager results."""
    inputs = leaves(normal(2, 8, 4, 4, seed=1), *(normal(9, w, seed=w) for w in WIDTHS), *phi_of((1, 2, 4))[:2])
    ids = torch.randint(9, (2, 21), generator=torch.Generator().manual_seed(4))

    def call(features, first, second, weight, bias):
        return every_op(features, [first, second], ids, (weight, bias, 0.5, [0, 1, 0]))

    expected = call(*inputs)
    got = compiled(call)(*inputs)
    assert_near(got, expected, 1e-6)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs)):
        assert_near(a, b, 1e-6)


def test_second_derivative_is_an_error():
    features, codebooks, options = case("square", "cosine")
    inputs = leaves(features, *codebooks)
    ids = torch.zeros(3, 39, dtype=torch.int64)
    results = {
        "multiscale_quantize": ops.multiscale_quantize(inputs[0], inputs[1:], **options, backend="native").loss,
        "multiscale_rows": ops.multiscale_rows(inputs[0], ids, inputs[1:], **options, backend="native").square().sum(),
        "multiscale_decode": ops.multiscale_decode(ids, inputs[1:], scales=options["scales"], size=5, backend="native").square().sum(),
        "multiscale_chain": ops.multiscale_inputs(ids, inputs[1:], scales=options["scales"], size=5, rule="chain", backend="native").square().sum(),
    }  # fmt: skip
    for name, value in results.items():
        wanted = [
            i
            for i, g in zip(inputs, torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True))
            if g is not None
        ]
        first = torch.autograd.grad(value, wanted, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}: it is differentiable once"):
            torch.autograd.grad(sum(g.sum() for g in first), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grids, widths = [1, 1, 0, 2, 3, 1, 4, 4, 0], list(WIDTHS)
    features, codebook = (
        normal(2, 8, 4, 4, dtype=dtype).requires_grad_(),
        normal(9, 8, seed=1, dtype=wide).requires_grad_(),
    )
    weight, bias = leaves(*phi_of((1, 2), wide)[:2])
    ids = torch.randint(9, (2, 23), generator=torch.Generator().manual_seed(4))
    loop = (grids, widths, [1.0, 2.0])
    opcheck("multiscale_quantize", features, codebook, None, None, *loop, "cosine", True, 0.0, False, 0.25, 1.0, True)
    opcheck("multiscale_quantize", features, codebook, weight, bias, *loop, "l2", False, 0.5, True, 0.25, 1.0, True)
    opcheck(
        "multiscale_rows", features, ids, codebook.detach(), weight.detach(), bias.detach(), grids, widths, True, 0.5
    )
    for as_inputs in (False, True):
        opcheck("multiscale_decode", ids, codebook, weight, bias, grids, 4, 4, widths, True, 0.5, as_inputs)
    opcheck("multiscale_chain", ids, codebook, grids, widths, True, 2)
