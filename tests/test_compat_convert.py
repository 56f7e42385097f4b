"""quantize.convert and the names of state dicts: published quantizers load strictly, models keep their very tensors."""

import copy
import json
import logging

import pytest
import torch
from golden_values import FOLDER
from harness import assert_sentence, normal, same_bits
from torch import nn

from tokenflow_ext import compat
from tokenflow_ext.quantize import VectorQuantizer as OurVectorQuantizer
from tokenflow_ext.quantize import convert

KEYS = json.loads((FOLDER / "quantizer_keys.json").read_text())
"""Names and shapes of the quantizers' tensors in the published models' state dicts."""


def published(model: str) -> nn.Module:
    """The compatible quantizer with the released model's options."""
    if model.startswith("tokenflow"):
        return compat.tokenflow.VectorQuantizer(32768, 40, 0.25, 0.0, True, True, [32, 8])
    if model.startswith("unitok"):
        return compat.unitok.VectorQuantizerM(32768, 64, num_codebooks=8)
    return compat.var.VectorQuantizer2(4096, 32, False, v_patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


@pytest.mark.parametrize("model", KEYS)
def test_names_of_the_published_state_dicts(model):
    state = {name.split(".", 1)[1]: torch.ones(shape) for name, shape in KEYS[model].items()}
    quantizer = published(model)
    assert {name: list(t.shape) for name, t in quantizer.state_dict().items()} == {
        name: list(t.shape) for name, t in state.items()
    }
    quantizer.load_state_dict(state, strict=True)
    assert all(bool((t == 1).all()) for t in quantizer.state_dict().values())


# Stand-ins restated from the specification: class names, attributes, parameter names; no behaviour.


def named(name: str, *bases: type) -> type:
    """A class of that name, as the originals' scripts define it."""
    return type(name, bases or (nn.Module,), {"__module__": "their.scripts"})


def tokenflow_original(codes=16, split=(3, 2), **attributes) -> nn.Module:
    old = named("VectorQuantizer")()
    old.embedding_vqkd, old.embedding_vqgan = nn.Embedding(codes, split[0]), nn.Embedding(codes, split[1])
    old.register_buffer("codebook_used", nn.Parameter(torch.zeros(131072)))  # as the original has it
    attributes = {"n_e": codes, "e_dim": 5, "beta": 0.3, "entropy_loss_ratio": 0.1, "l2_norm": True, **attributes}
    vars(old).update({"show_usage": True, "kmeans": False, **attributes})
    return old


def unitok_original(groups=2, codes=12, width=4, where="parts") -> nn.Module:
    old = named("VectorQuantizerM")()
    options = {"beta": 0.3, "use_entropy_loss": True, "entropy_temp": 0.02}
    old.codebooks = nn.ModuleList()
    for _ in range(groups):
        part = named("VectorQuantizer")()
        part.codebook = nn.Embedding(codes, width)
        part.register_buffer("vocab_usage", torch.rand(codes))
        vars(part).update(options if where == "parts" else {})
        old.codebooks.append(part)
    vars(old).update(options if where == "whole" else {})
    return old


def phi_original(share: int, scales: int, ratio: float) -> nn.Module:
    def phi():
        if ratio == 0:
            return nn.Identity()
        conv = named("Phi", nn.Conv2d)(4, 4, 3, padding=1)
        conv.resi_ratio = ratio
        return conv

    if share == 0:
        return named("PhiNonShared", nn.ModuleList)([phi() for _ in range(scales)])
    holder = named("PhiShared" if share == 1 else "PhiPartiallyShared")()
    if share == 1:
        holder.qresi = phi()
    else:
        holder.qresi_ls = nn.ModuleList(phi() for _ in range(share))
    return holder


def var_original(share=4, ratio=0.5, scales=(1, 2, 3), znorm=False) -> nn.Module:
    old = named("VectorQuantizer2")()
    old.quant_resi = phi_original(share, len(scales), ratio)
    old.embedding = nn.Embedding(16, 4)
    old.register_buffer("ema_vocab_hit_SV", torch.rand(len(scales), 16))
    vars(old).update(using_znorm=znorm, beta=0.3, v_patch_nums=scales, record_hit=7, quant_resi_ratio=ratio)
    return old


class Autoencoder(nn.Module):
    def __init__(self, quantize: nn.Module):
        super().__init__()
        self.encoder, self.quantize = nn.Conv2d(3, 4, 1), quantize


def tensors(module: nn.Module) -> dict:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


ORIGINALS = {
    "tokenflow": (tokenflow_original, compat.tokenflow.VectorQuantizer),
    "unitok": (unitok_original, compat.unitok.VectorQuantizerM),
    "unitok, options on the whole": (lambda: unitok_original(where="whole"), compat.unitok.VectorQuantizerM),
    "var": (var_original, compat.var.VectorQuantizer2),
    "var, one phi": (lambda: var_original(share=1), compat.var.VectorQuantizer2),
    "var, phi per scale": (lambda: var_original(share=0), compat.var.VectorQuantizer2),
    "var, no phi": (lambda: var_original(ratio=0.0, znorm=True), compat.var.VectorQuantizer2),
}


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("kind", ORIGINALS)
def test_replaces(kind, training):
    make, wanted = ORIGINALS[kind]
    model = Autoencoder(make()).train(training)
    next(model.quantize.parameters()).requires_grad_(False)
    before, said = tensors(model), []
    assert convert(model, say=said.append) is model
    new = model.quantize
    assert type(new) is wanted and all(m.training is training for m in new.modules())
    assert said == [f"quantize: {wanted.__name__} is now {wanted.__module__}.{wanted.__name__}"]
    state = {**tensors(model)}
    for name, old in before.items():
        assert state[name].data_ptr() == old.data_ptr(), name
        if name.endswith("codebook_used"):
            assert not state[name].requires_grad, "the original's gathers an autograd graph that is never freed"
        else:
            assert isinstance(old, nn.Parameter) is isinstance(state[name], nn.Parameter)
            assert state[name] is old or not isinstance(old, nn.Parameter), "an optimizer's parameters stay its own"
    assert new.beta == 0.3
    again = []
    convert(model, say=again.append)
    assert again == [] and model.quantize is new


def test_options_are_read():
    new = convert(tokenflow_original(), say=print)
    assert (new.n_e, new.split, new.entropy_loss_ratio, new.l2_norm, new.e_dim) == (16, [3, 2], 0.1, True, 5)
    new = convert(unitok_original(), say=print)
    assert (new.vocab_size, new.vocab_width, new.num_codebooks) == (24, 8, 2)
    assert (new.use_entropy_loss, new.entropy_temp, int(new.steps)) == (True, 0.02, 100)
    new = convert(var_original(share=0, ratio=0.25, znorm=True), say=print)
    assert (new.using_znorm, new.quant_resi_ratio, new.v_patch_nums, len(new.phis())) == (True, 0.25, (1, 2, 3), 3)
    assert int(new.record_hit) == 100 and int(convert(var_original(), quirks=True, say=print).record_hit) == 7
    assert convert(var_original(), quirks=True, backend="reference", say=print).quirks


def test_a_converted_model_computes_what_one_built_anew_does():
    old = var_original()
    fresh = compat.var.VectorQuantizer2(16, 4, False, 0.3, v_patch_nums=(1, 2, 3))
    fresh.load_state_dict(old.state_dict(), strict=True)
    new, f = convert(old, say=print), normal(2, 4, 3, 3)
    for a, b in zip(new(f), fresh(f)):
        assert a is b is None or same_bits(a, b)
    assert torch.equal(new.ema_vocab_hit_SV, fresh.ema_vocab_hit_SV)


def test_finds_what_is_hidden():
    """VAR keeps its VQVAE in a tuple, TokenFlow's language model its tokenizer in a list; one quantizer stays one."""
    outer, inner = nn.Module(), Autoencoder(var_original())
    outer.vae_proxy, outer.vae_quant_proxy = (inner,), (inner.quantize,)
    outer.towers = [Autoencoder(tokenflow_original())]
    outer.by_name = {"u": unitok_original()}
    outer.layers = nn.ModuleList([nn.Linear(2, 2)])
    said = []
    convert(outer, say=said.append)
    assert type(inner.quantize) is compat.var.VectorQuantizer2 and outer.vae_proxy[0] is inner
    assert outer.vae_quant_proxy[0] is inner.quantize
    assert type(outer.towers[0].quantize) is compat.tokenflow.VectorQuantizer
    assert type(outer.by_name["u"]) is compat.unitok.VectorQuantizerM
    assert len(said) == 3 and said[0].startswith("vae_proxy[0].quantize: ")


def test_an_optimizer_goes_on():
    model = Autoencoder(var_original())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, say=print)
    before = model.quantize.embedding.weight.detach().clone()
    model.quantize(normal(2, 4, 3, 3))[2].backward()
    optimizer.step()
    assert not torch.equal(before, model.quantize.embedding.weight)


def test_a_model_in_half_precision():
    """The parameters are the optimizer's and stay; a window of ids goes on in float32, for float16 ends at 2048."""
    old = tokenflow_original(codes=4096).half()
    table = old.embedding_vqkd.weight
    new = convert(old).train()
    assert new.embedding_vqkd.weight is table and table.dtype == torch.float16
    _, _, (_, _, ids) = new(normal(2, 5, 8, 8).half())
    assert torch.equal(new.codebook_used[-len(ids) :].long(), ids) and bool((ids > 2048).any())


def test_tied_codebooks_stay_tied():
    old = unitok_original()
    old.codebooks[1].codebook.weight = old.codebooks[0].codebook.weight
    new = convert(old, say=print)
    assert new.codebooks[0].codebook.weight is new.codebooks[1].codebook.weight
    assert len(list(new.parameters())) == 1


class ResidualVQ(nn.Module):
    pass


def altered(old: nn.Module, change) -> nn.Module:
    change(old)
    return old


LEFT = {
    "of no kind": (ResidualVQ, "of no kind that convert knows"),
    "TokenFlow with EMA": (lambda: tokenflow_original(kmeans=True), "moving averages"),
    "without its weight": (lambda: altered(var_original(), lambda m: delattr(m, "beta")), "has no beta"),
    "with an option that is none": (lambda: altered(var_original(), lambda m: setattr(m, "beta", -1.0)), "beta: wanted"),
    "with another tensor": (
        lambda: altered(unitok_original(), lambda m: m.register_buffer("extra", torch.zeros(1))), "differs in extra"),
    "of another shape": (
        lambda: altered(tokenflow_original(), lambda m: m.register_buffer("codebook_used", torch.zeros(8))), "shape"),
    "a VQGAN's quantizer": (lambda: named("VectorQuantizer")(), "of no kind"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_leaves_alone_and_names(kind, caplog):
    make, why = LEFT[kind]
    model = Autoencoder(make())
    old = model.quantize
    with caplog.at_level(logging.INFO, logger="tokenflow_ext"):
        convert(model)
    assert model.quantize is old
    (record,) = [r for r in caplog.records if r.message.startswith("quantize:")]
    assert record.levelno == logging.WARNING and why in record.message, record.message


def test_ours_and_plain_modules_are_not_mentioned(caplog):
    model = nn.Sequential(nn.Linear(2, 2), OurVectorQuantizer(4, 8), compat.vq.VectorQuantize(4, 8))
    before = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, logger="tokenflow_ext"):
        convert(model)
    assert not caplog.records and [type(m) for m in model] == [type(m) for m in before]


def test_bad_input():
    with pytest.raises(TypeError, match="convert: model: wanted an nn.Module, got dict"):
        convert({})
    assert_sentence(ValueError, "convert", "backend", lambda: convert(nn.Identity(), backend="fast"))
    assert_sentence(TypeError, "convert", "quirks", lambda: convert(nn.Identity(), quirks=1))
