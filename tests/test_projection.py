"""UniTok's attention projection against published values with gradients, in both directions; and what a causal one promises."""

import pytest
import torch
from golden_values import Case, case_names, normals, value
from tokenflow.models.projection import AttnProjection

FIXTURE = "unitok_attention_projection"


def golden_module(case: Case) -> AttnProjection:
    """The case's module with its generated weights; the published `zero_k_bias`, always zero, is none of ours."""
    o = case.options
    module = AttnProjection(o["in_dim"], o["out_dim"], heads=o["heads"], causal=o["causal"])
    shapes = {name: shape for name, shape in o["weights"]["shapes"].items() if name != "attn.zero_k_bias"}
    made = {name: torch.from_numpy(value(name, shape, o["weights"]["salt"])) for name, shape in shapes.items()}
    module.load_state_dict(made)
    return module


def golden_input(case: Case, name: str) -> torch.Tensor:
    made = case.options["inputs"][name]
    return torch.from_numpy(normals(made["name"], made["shape"], made["salt"]))


@pytest.mark.parametrize("name", case_names(FIXTURE))
def test_published_values_and_gradients(name):
    case = Case(FIXTURE, name)
    module, x = golden_module(case), golden_input(case, "x").requires_grad_()
    y = module(x)
    y.backward(golden_input(case, "upstream"))
    if "y" in case:
        case.check("y", y, case["y"])
        case.check("gradient", x.grad, case["grad_x"])
        named = [key for key in case._tensors if key.startswith("grad/")]
        assert len(named) == 7
        for key in named:
            case.check("gradient", module.get_parameter(key.removeprefix("grad/")).grad, case[key])
    else:
        case.check("y", y[:, :4], case["y_head"])
        assert float((y.norm(dim=-1) - case["y_token_norm"]).detach().abs().max()) < 1e-3
        case.check("gradient", x.grad[:, :2], case["grad_x_head"])
    for kind, got in (("y_mean", y.detach().mean()), ("y_std", y.detach().std())):
        assert abs(float(got) - case.scalars[kind]) < 2e-5


@pytest.mark.parametrize(("dim", "out"), [(12, 4), (4, 12), (6, 6)])
def test_causal_prefixes_agree_and_full_ones_do_not(dim, out):
    torch.manual_seed(0)
    x = torch.randn(2, 7, dim)
    for causal in (True, False):
        module = AttnProjection(dim, out, heads=2, causal=causal)
        prefix, whole = module(x[:, :4]), module(x)[:, :4]
        assert torch.allclose(prefix, whole, atol=1e-5) == causal
    assert module(x[:0]).shape == (0, 7, out) and module(x[:, :1]).shape == (2, 1, out)


@pytest.mark.parametrize(("arguments", "words"), [
    ((0, 4, 1), "dim: wanted a positive integer, got 0"),
    ((4, 2.0, 1), "out: wanted a positive integer, got 2.0"),
    ((8, 4, 3), "heads: wanted a divisor of 8, got 3"),
    ((4, 8, None), "heads: wanted a positive integer, got None"),
])  # fmt: skip
def test_bad_sizes(arguments, words):
    with pytest.raises(ValueError, match=words):
        AttnProjection(*arguments[:2], heads=arguments[2])
