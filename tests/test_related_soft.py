"""IBQ and CODA against dense float64 softmaxes, and what they need of memory."""

import copy

import pytest
import torch
from harness import assert_gradients, assert_near, leaves, normal, python, same_bits

from tokenflow_ext.quantize import AttentionQuantizer, IndexPropagationQuantizer, SoftMultiScaleQuantizer
from tokenflow_ext.quantize._resample import resample
from tokenflow_ext.reference.resample import resample as reference_resample


def dense_step(z, queries, keys, values, scale, weights, entropy=None):
    """The equations of SoftQuantizer with a matrix of probabilities: (z_q, ids, loss); weights: commitment, codebook."""
    logits = scale * queries @ keys.mT
    ids = logits.argmax(-1)
    soft = logits.softmax(-1)
    one_hot = torch.nn.functional.one_hot(ids, len(keys)).to(z.dtype)
    z_q = (one_hot - soft.detach() + soft) @ values
    hard = values[ids]
    loss = (z_q - z).square().mean() + weights[0] * (hard.detach() - z).square().mean()
    loss = loss + weights[1] * (hard - z.detach()).square().mean()
    if entropy is not None:
        weight, temperature, eps = entropy
        p = (logits / temperature).softmax(-1).reshape(-1, len(keys))
        mean = p.mean(0)
        loss = loss + weight * (torch.special.entr(p).sum(-1).mean() + (mean * (mean + eps).log()).sum())
    return z_q, ids, loss


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_index_propagation_is_dense(backend):
    torch.manual_seed(1)
    options = {"commitment_weight": 0.7, "codebook_weight": 0.3, "entropy_weight": 0.1, "entropy_temperature": 0.2}
    quantizer = IndexPropagationQuantizer(32, 4096, **options, backend=backend)
    (x,), upstream = leaves(normal(20, 3, 32)), normal(20, 3, 32, seed=2)
    out = quantizer(x)
    actual = torch.autograd.grad((out.quantized * upstream).sum() + 3 * out.loss, [x, *quantizer.codebooks()])
    z, table = leaves(x.double(), quantizer.codebooks()[0].double())
    z_q, ids, loss = dense_step(z, z, table, table, 1.0, (0.7, 0.3), (0.1, 0.2, 1e-5))
    assert torch.equal(out.indices, ids)
    assert_near(out.quantized, z_q, 1e-6)
    assert_near(out.loss, loss, 1e-5)
    assert_gradients(actual, torch.autograd.grad((z_q * upstream).sum() + 3 * loss, [z, table]), 1e-4)


class Dense(torch.nn.Module):
    """CODA's residual over scales with torch's own resampling and a matrix of probabilities, in float64."""

    def __init__(self, quantizer: AttentionQuantizer, scales):
        super().__init__()
        self.inner, self.scales = quantizer.double(), scales

    def forward(self, x, weights, entropy):
        q = self.inner
        (table,) = q.codebooks()
        keys, values = q.norm_k(q.to_k(table)), q.to_v(table)
        f_hat, ids, losses = 0, [], []
        for h, w in self.scales:
            z = torch.nn.functional.adaptive_avg_pool2d(x, (h, w)).movedim(1, -1)
            queries = q.norm_q(q.to_q(z))
            z_q, i, loss = dense_step(z, queries, keys, values, queries.shape[-1] ** -0.5, weights, entropy)
            step = torch.nn.functional.interpolate(z_q.movedim(-1, 1), x.shape[2:], mode="bicubic")
            f_hat, x = f_hat + step, x - step
            ids.append(i.flatten(1))
            losses.append(loss)
        return f_hat, torch.cat(ids, 1), sum(losses) / len(losses)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_attention_residual_is_dense(norm):
    torch.manual_seed(1)
    scales = ((1, 1), (2, 3), (2, 1), (5, 4))
    inner = AttentionQuantizer(
        8, 300, key_dim=12, norm=norm, entropy_weight=0.1, entropy_temperature=0.2, backend="native"
    )
    quantizer = SoftMultiScaleQuantizer(inner, scales)
    dense = Dense(copy.deepcopy(inner), scales)
    (x,), upstream = leaves(normal(3, 8, 5, 4)), normal(3, 8, 5, 4, seed=2)
    out = quantizer(x)
    actual = torch.autograd.grad((out.quantized * upstream).sum() + 3 * out.loss, [x, *inner.parameters()])
    (z,) = leaves(x.double())
    f_hat, ids, loss = dense(z, (1.0, 0.05), (0.1, 0.2, 1e-5))
    assert torch.equal(out.indices, ids)
    assert_near(out.quantized, f_hat, 1e-5)
    assert_near(out.loss, loss, 1e-5)
    assert_gradients(
        actual, torch.autograd.grad((f_hat * upstream).sum() + 3 * loss, [z, *dense.inner.parameters()]), 1e-4
    )


def test_every_code_and_projection_learns_from_the_output_alone():
    torch.manual_seed(1)
    quantizer = SoftMultiScaleQuantizer(AttentionQuantizer(8, 300), (1, 4))
    quantizer(normal(2, 8, 4, 4)).quantized.sum().backward()
    for name, parameter in quantizer.named_parameters():
        if name != "quantizer.to_k.bias":  # the softmax sees it only through the norm
            assert parameter.grad.any(), name
    assert (quantizer.codebooks()[0].grad != 0).any(-1).all()


def test_prefixes_and_inputs():
    """Ids of ten scales round-trip; f_hat of a prefix, Down to the next scale, is what a next-scale model reads."""
    torch.manual_seed(1)
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    quantizer, x = SoftMultiScaleQuantizer(AttentionQuantizer(8, 300), scales).eval(), normal(2, 8, 16, 16)
    out = quantizer(x)
    assert out.indices.shape == (2, 680) and same_bits(quantizer.decode(out.indices), out.quantized)
    assert [m.shape[1] for m in quantizer.split(out.indices)] == list(scales)
    inputs, length, rows = quantizer.inputs(out.indices), 0, 0
    assert inputs.shape == (2, 679, 8)
    for n, following in zip(scales, scales[1:]):
        length += n * n
        prefix = quantizer.decode(out.indices[:, :length])
        expected = torch.nn.functional.adaptive_avg_pool2d(prefix, following).flatten(2).mT
        assert_near(inputs[:, rows : rows + following**2], expected, 1e-5)
        rows += following**2
    assert not quantizer.decode(out.indices[:, :0], size=(16, 17)).any()
    assert quantizer.inputs(out.indices[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("rule, size", [("area", (3, 2)), ("bicubic", (9, 11)), ("area", (5, 7))])
def test_resampling_is_the_twins(rule, size, value):
    """Also where a value is not a number: NaN in the outputs that it has a weight in, no gradient."""
    (x,), (y,) = leaves(normal(2, 3, 5, 7)), leaves(normal(2, 3, 5, 7))
    if value is not None:
        x.data[0, 1, 2, 3] = y.data[0, 1, 2, 3] = value
    out, expected = resample(x, size, rule), reference_resample(y.movedim(1, -1), size, rule).movedim(-1, 1)
    if size != (5, 7):  # the map itself, where the twin cleans
        assert_near(out, expected, 1e-6)
        out.nan_to_num().sin().sum().backward()
        expected.nan_to_num().sin().sum().backward()
        assert_near(x.grad, y.grad, 1e-6)
    else:
        assert out is x


def test_a_pixel_that_is_not_finite_spoils_what_pools_it():
    torch.manual_seed(1)
    quantizer, x = SoftMultiScaleQuantizer(AttentionQuantizer(8, 300), (2, 4)), normal(2, 8, 4, 4)
    x[1, 5, 0, 3] = float("inf")
    out = quantizer(x)
    coarse, _ = quantizer.split(out.indices)
    assert out.quantized[0].isfinite().all() and coarse[1, 0, 1] == 0
    assert torch.equal(
        out.quantized[1].isnan(),
        resample(torch.where(torch.arange(4) == 1, torch.nan, 0.0).view(1, 1, 2, 2), (4, 4), "bicubic")[0]
        .isnan()
        .expand(8, 4, 4),
    )


STEP = """
import resource, time, torch
from tokenflow_ext.quantize import IndexPropagationQuantizer
torch.set_num_threads(2)
quantizer = IndexPropagationQuantizer({width}, {codes}, entropy_weight={entropy}, backend="native")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(rows):
    x = torch.randn(rows, {width}, requires_grad=True)
    out = quantizer(x)
    (out.quantized.sum() + out.loss).backward()
    assert x.grad.isfinite().all() and x.grad.any(-1).all()
    assert quantizer.codebooks()[0].grad.any(-1).all(), "every code learns"
    quantizer.zero_grad(set_to_none=True)
"""


def measured(script: str, **options) -> list[float]:
    done = python(STEP.format(**options) + script)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in done.stdout.split()]


def test_the_papers_largest_codebook_trains():
    """64 rows on 262144 codes of 256 channels, forward and backward."""
    (seconds,) = measured(
        "start = time.time(); step(64); print(time.time() - start)", width=256, codes=262144, entropy=0
    )
    print(f"{seconds:.1f} s")


def test_memory_without_a_matrix():
    """2048 rows need hardly more than 8: no part of the 512 MB of N x K probabilities, with the entropy term."""
    script = "step(8); before = peak(); step(2048); print(peak() - before)"
    (grown,) = measured(script, width=16, codes=65536, entropy=0.05)
    print(f"{grown / 1e6:.1f} MB")
    assert grown < 0.25 * 4 * 2048 * 65536
