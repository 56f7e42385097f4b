"""Every argument of the modules, wrong in every way: a sentence that names the class, the argument, what was wanted and got."""

import inspect
import re

import pytest
import torch
from harness import METRICS
from module_cases import KINDS, SCALES, build, features

from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer
from tokenflow_ext.quantize._codebook import UPDATES as RULES

NAN, INF = float("nan"), float("inf")
TENSOR = torch.tensor(1.0)

# What is of the wrong type, and what has a wrong value, by what an argument stands for.
COUNT = ([True, 2.5, 2.0, "2", None, [2], torch.tensor(2)], [0, -1])
WEIGHT = ([True, "1", None, [1.0], TENSOR, 1j], [-1, -1e-9, NAN, INF])
POSITIVE = (WEIGHT[0], [*WEIGHT[1], 0, 0.0])
SHARE = (WEIGHT[0], [-0.1, 1.1, NAN, INF])
FLAG = ([1, 0.0, "yes", None, torch.tensor(True)], [])
NAME = ([], ["x", "", "Cosine", None, 3, True, ["cosine"]])
AXIS = ([True, 1.0, "last", None, TENSOR], [])

COMMON = {
    "codebook_size": COUNT,
    "metric": NAME,
    "update": NAME,
    "commitment_weight": WEIGHT,
    "codebook_weight": WEIGHT,
    "entropy_weight": WEIGHT,
    "entropy_temperature": POSITIVE,
    "entropy_eps": WEIGHT,
    "decay": SHARE,
    "kmeans_init": FLAG,
    "dead_code_threshold": WEIGHT,
    "gradient": NAME,
    "channel_dim": AXIS,
    "backend": NAME,
}
PHI_WEIGHT, PHI_BIAS = torch.zeros(2, 12, 12, 3, 3), torch.zeros(2, 12)


def phi(**change):
    parts = {"weight": PHI_WEIGHT, "bias": PHI_BIAS, "ratio": 0.5, "assignment": (0, 0, 1), **change}
    return tuple(parts.values())


WRONG = {
    VectorQuantizer: {"dim": COUNT, "groups": COUNT, "normalize_mean": FLAG, **COMMON},
    SharedIndexQuantizer: {
        "groups": (COUNT[0], [*COUNT[1], 2]),
        "dims": (
            [12, "84", None, torch.tensor([8, 4]), {8, 4}, (True, 4), (8, "4"), (8, 4.0), (8, None)],
            [(), (8, 0), (8, -4), (1,) * 17],
        ),
        "weights": (
            [1.0, "ab", {1.0, 3.0}, (1.0, "3"), (1.0, None), (True, 1.0)],
            [(), (1.0,), (1.0, 1.0, 1.0), (1.0, -3.0), (1.0, NAN), (INF, 1.0), torch.ones(3)],
        ),
        **COMMON,
    },
    MultiScaleQuantizer: {
        "quantizer": (
            [None, "vector", torch.nn.Linear(3, 3), VectorQuantizer, torch.zeros(4, 3)],
            [VectorQuantizer(12, 40, groups=3)],
        ),
        "scales": (
            [4, "124", None, {1, 2}, torch.tensor([1, 2]), (1, 2.0), (1, True), (1, "2"), ((1, 2, 3),), ((1, 2.0),), ((1, True),)],
            [(), (0,), (1, -2), ((2, 0),)],
        ),
        "phi": (
            [1, "phi", phi()[:3], dict(enumerate(phi())), {"weight", "bias"}, phi(weight=None), phi(weight=PHI_WEIGHT.long()),
             phi(bias=0.0), phi(ratio="half"), phi(ratio=True), phi(ratio=None), phi(assignment=0), phi(assignment=(0, 0, 1.0)),
             phi(assignment="001"), phi(assignment=(0, 0, True))],
            [phi(weight=PHI_WEIGHT[0]), phi(weight=PHI_WEIGHT[:0]), phi(weight=PHI_WEIGHT[:, :6]), phi(bias=PHI_BIAS[:1]),
             phi(ratio=NAN), phi(ratio=INF), phi(assignment=(0, 0)), phi(assignment=(0, 0, 2)), phi(assignment=(0, 0, -1))],
        ),
        "loss_on": NAME,
        "normalize_codes": ([1, "yes", 0.0, TENSOR], []),
        "scale_dropout": SHARE,
        "backend": ([], [name for name in NAME[1] if name is not None]),
        "scale_weights": (
            [1.0, "111", {1.0, 2.0, 3.0}, (1.0, 1.0, "1"), (1.0, None, 1.0), (True, 1.0, 1.0)],
            [(), (1.0, 1.0), (1.0, -1.0, 1.0), (1.0, NAN, 1.0), (INF, 1.0, 1.0), (0.0, 0.0, 0.0)],
        ),
    },
}  # fmt: skip
"""By class and argument: values of a wrong type, and wrong values."""

RIGHT = {
    VectorQuantizer: {"dim": 12, "codebook_size": 40},
    SharedIndexQuantizer: {"dims": (8, 4), "codebook_size": 40},
    MultiScaleQuantizer: {"quantizer": VectorQuantizer(12, 40), "scales": SCALES},
}
CASES = [
    pytest.param(kind, argument, error, value, id=f"{kind.__name__}-{argument}-{i}{error.__name__[0]}")
    for kind, arguments in WRONG.items()
    for argument, values in arguments.items()
    for error, wrong in zip((TypeError, ValueError), values)
    for i, value in enumerate(wrong)
]


def refuses(error, owner, argument, call, *args, **options):
    """Exactly that error, "owner: argument: wanted ..., got ..."; the argument may go into its element."""
    with pytest.raises(Exception) as caught:
        call(*args, **options)
    said = str(caught.value)
    assert caught.type is error, f"{caught.type.__name__}: {said}"
    assert re.match(rf"({owner}): {argument}(\[\d+\]| [a-z]+)?: wanted .+, got .+", said, re.DOTALL), said


@pytest.mark.parametrize("kind", WRONG)
def test_every_argument_is_here(kind):
    named = {name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert named == set(WRONG[kind])


@pytest.mark.parametrize(("kind", "argument", "error", "value"), CASES)
def test_constructors(kind, argument, error, value):
    options = {**RIGHT[kind], argument: value}
    if argument == "phi":
        options["loss_on"] = "accumulated"
    refuses(error, kind.__name__, argument, kind, **options)


@pytest.mark.parametrize("update", RULES)
@pytest.mark.parametrize("argument", [name for name in COMMON if name != "update"])
def test_arguments_that_a_rule_does_not_use_are_checked_too(argument, update):
    for error, wrong in zip((TypeError, ValueError), COMMON[argument]):
        for value in wrong:
            options = {**RIGHT[VectorQuantizer], "update": update, argument: value}
            refuses(error, "VectorQuantizer", argument, VectorQuantizer, **options)


def test_arguments_that_do_not_fit_each_other():
    refuses(ValueError, "VectorQuantizer", "dim", VectorQuantizer, 12, 40, groups=5)
    inner = VectorQuantizer(12, 40, metric="l2")
    refuses(
        ValueError, "MultiScaleQuantizer", "normalize_codes", MultiScaleQuantizer, inner, SCALES, normalize_codes=True
    )
    refuses(ValueError, "MultiScaleQuantizer", "phi", MultiScaleQuantizer, inner, SCALES, phi=phi(), loss_on="codes")


def test_a_backend_of_the_pyramid_is_the_quantizers_too(monkeypatch):
    made = MultiScaleQuantizer(VectorQuantizer(12, 40, backend="native"), SCALES, backend="reference")
    asked = []
    monkeypatch.setattr("tokenflow_ext.ops.multiscale.use_native", lambda op, backend, *_: asked.append(backend))
    made(features("multi"))
    assert set(asked) == {"reference"} and made.quantizer.backend == "reference"
    inner = VectorQuantizer(12, 40, backend="native")
    refuses(
        ValueError, "MultiScaleQuantizer", "loss_on", MultiScaleQuantizer, inner, SCALES, loss_on="x", backend="auto"
    )
    assert MultiScaleQuantizer(inner, SCALES).quantizer.backend == "native"


@pytest.mark.parametrize("argument", ["dead_code_threshold", "commitment_weight", "decay", "entropy_eps"])
def test_numbers_of_any_kind_are_numbers(argument):
    """Integers, fractions and NumPy's scalars: stored as floats, which torch.compile and state readers know."""
    from fractions import Fraction

    import numpy

    for value in (1, Fraction(1, 2), numpy.float32(0.5), numpy.float64(0.5)):
        quantizer = VectorQuantizer(12, 40, **{argument: value})
        stored = getattr(quantizer, argument, getattr(quantizer.codebook, argument, None))
        assert type(stored) is float and stored == float(value)
    for metric in METRICS:
        assert VectorQuantizer(12, 40, metric=metric).metric == metric


def bad_rows(kind):
    """Inputs that no forward and no encode takes: (error, value)."""
    good = features(kind, 2)
    channels = 1 if "multi" in kind else good.dim() - 1
    yield TypeError, None
    yield TypeError, good.tolist()
    yield TypeError, good.numpy()
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        yield TypeError, good.to(dtype)
    yield ValueError, good.narrow(channels, 0, 11)
    yield ValueError, torch.cat([good, good], channels)
    yield ValueError, torch.zeros(())
    if "multi" in kind:
        yield ValueError, good[0]
        yield ValueError, good[None]
        yield ValueError, good[..., :3]  # smaller than the last scale
        yield ValueError, good[..., :0]
        yield ValueError, good.movedim(1, -1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_forward_and_encode(kind, training):
    quantizer = build(kind, "ema").train(training)
    before = [b.clone() for b in quantizer.buffers()]
    owner, argument = ("MultiScaleQuantizer|multiscale_quantize", "(features|scales)") if "multi" in kind else (
        type(quantizer).__name__, "x")  # fmt: skip
    for error, x in bad_rows(kind):
        for call in (quantizer, quantizer.encode):
            refuses(error, owner, argument, call, x)
    assert all(torch.equal(a, b) for a, b in zip(quantizer.buffers(), before)), "a refused batch counts nowhere"


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_on_another_device(kind):
    refuses(ValueError, "(multiscale_|shared_)?quantize", "codebooks?", build(kind), features(kind, 2).to("meta"))


@pytest.mark.parametrize("kind", KINDS)
def test_indices_of_decode(kind):
    quantizer = build(kind)
    good = quantizer.encode(features(kind, 2))
    owner = "multiscale_decode" if "multi" in kind else "lookup"
    wrong = [(TypeError, v) for v in (None, good.tolist(), good.int(), good.float(), good.bool(), good.numpy())]
    high, low = good.clone(), good.clone()
    high.view(-1)[0], low.view(-1)[0] = 40, -2
    wrong += [(ValueError, high), (ValueError, low)]
    if "multi" in kind:
        wrong += [(ValueError, good[0]), (ValueError, good[:, :2]), (ValueError, torch.cat([good, good], 1))]
    elif kind == "groups":
        wrong += [(ValueError, good[:, :2]), (ValueError, torch.zeros((), dtype=torch.int64))]
    for error, indices in wrong:
        refuses(error, owner, "indices", quantizer.decode, indices)


@pytest.mark.parametrize("size", [0, -1, (4,), (4, 4, 4), (4, 0), 2.0, "4", True, (4, True), (3, 4)], ids=str)
def test_sizes_of_multiscale_decode_and_inputs(size):
    quantizer = build("multi vector")
    ids = quantizer.encode(features("multi vector", 2))
    argument = "scales" if size == (3, 4) else "size"
    for call, op in ((quantizer.decode, "multiscale_decode"), (quantizer.inputs, "multiscale_inputs")):
        refuses(ValueError if size in (0, -1, (4, 0), (3, 4)) else TypeError, op, argument, call, ids, size=size)


def test_rules_of_multiscale_inputs():
    quantizer = build("multi vector")
    ids = quantizer.encode(features("multi vector", 2))
    for rule in ("x", None, 3):
        refuses(ValueError, "multiscale_inputs", "rule", quantizer.inputs, ids, rule)
    for error, refine in ((TypeError, "1"), (TypeError, 1.0), (TypeError, True), (ValueError, -1), (ValueError, 9)):
        refuses(error, "multiscale_inputs", "refine", quantizer.inputs, ids, "chain", refine=refine)
    for error, ids in ((TypeError, None), (TypeError, ids.int()), (ValueError, ids[:, :3]), (ValueError, ids[0])):
        refuses(error, "MultiScaleQuantizer.split", "indices", quantizer.split, ids)
