"""The published numbers of IBQ, FQGAN, CODA and ImageFolder against the modules: values, ids, losses, every gradient."""

import numpy as np
import pytest
import torch
from golden_values import Case, case_names

from tokenflow_ext.quantize import (
    AttentionQuantizer,
    IndexPropagationQuantizer,
    PrefixMultiScaleQuantizer,
    ProductQuantizer,
    SoftMultiScaleQuantizer,
    VectorQuantizer,
)

RELATED = "related_quantizers"
BACKENDS = ("native", "reference")


def cases(quantizer: str) -> list[str]:
    return [name for name in case_names(RELATED) if name.startswith(quantizer)]


def gradients(value, leaves):
    grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves)]


def close(case: Case, actual, *scalars: str) -> None:
    expected = sum(case.scalars[name] for name in scalars)
    assert abs(actual.item() - expected) <= case.limit("value") * max(1.0, abs(expected)), (case.name, scalars)


def test_all_cases_are_tested():
    assert len(case_names(RELATED)) == 9 == sum(len(cases(q)) for q in ("ibq", "fqgan", "coda", "imagefolder"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("ibq"))
def test_index_propagation(name, backend):
    case = Case(RELATED, name)
    o, z = case.options, case["z"].requires_grad_()

    def build(**weights):
        made = IndexPropagationQuantizer(
            o["width"], o["codebook_size"], entropy_temperature=o["entropy_temperature"], entropy_eps=o["entropy_eps"],
            channel_dim=1, backend=backend, **weights,
        )  # fmt: skip
        made.codebook.table_0.data.copy_(case["codebook"])
        return made

    plain = build(codebook_weight=o["beta"])
    out = plain(z)
    assert case.check_indices(out.indices) == 0
    case.check("value", out.quantized, case["z_q"])
    close(case, out.loss, "quant_loss")
    upstream = (out.quantized * case["upstream"]).sum()
    for value, part in ((upstream, "out"), (out.loss, "loss")):
        grad_z, grad_codebook = gradients(value, [z, *plain.codebooks()])
        case.check("gradient", grad_z, case[f"grad_z_{part}"])
        case.check("gradient", grad_codebook, case[f"grad_codebook_{part}"])
    if o["entropy"]:
        whole = build(codebook_weight=o["beta"], entropy_weight=1.0)
        entropy = whole(z).loss - plain(z).loss.detach()
        close(case, entropy, "entropy_loss")
        grads = gradients(entropy, [z, *whole.codebooks()])
        # The loss's own gradient is in there too, checked above.
        for grad, rest, key in zip(grads, ("grad_z_loss", "grad_codebook_loss"), ("grad_z", "grad_codebook")):
            case.check("gradient", grad - case[rest], case[f"{key}_entropy"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("fqgan"))
def test_independent_branches(name, backend):
    case = Case(RELATED, name)
    o, z = case.options, case["z"].requires_grad_()
    branches = range(o["branches"])

    def build(commitment=0.0, codebook=0.0, entropy=0.0, disentangle=0.0):
        options = {"commitment_weight": commitment, "codebook_weight": codebook, "entropy_weight": entropy}
        options |= {"entropy_temperature": o["entropy_temperature"], "entropy_eps": o["entropy_eps"]}
        made = ProductQuantizer(
            [VectorQuantizer(o["width"], o["codebook_size"], channel_dim=1, backend=backend, **options) for _ in branches],
            joined=False, disentangle_weight=disentangle,
        )  # fmt: skip
        for table, stored in zip(made.codebooks(), case["codebooks"]):
            table.data.copy_(stored)
        return made

    def check(quantizer, value, part):
        grad_z, *grad_codebooks = gradients(value, [z, *quantizer.codebooks()])
        case.check("gradient", grad_z, case[f"grad_z_{part}"])
        case.check("gradient", torch.stack(grad_codebooks), case[f"grad_codebooks_{part}"])

    plain = build(commitment=o["beta"], codebook=1.0)
    out = plain(list(z))
    assert case.check_indices(out.indices.movedim(-1, 0)) == 0
    case.check("value", torch.stack(out.quantized), case["out"])
    close(case, out.loss, *(f"{term}_loss_{g}" for term in ("vq", "commit") for g in branches))
    check(plain, (torch.stack(out.quantized) * case["upstream"]).sum(), "out")
    check(plain, out.loss, "loss")
    weight = float(o["disentangle"].split()[0])
    for options, part, scalars in (
        ({"entropy": o["entropy_ratio"]}, "entropy", [f"entropy_loss_{g}" for g in branches]),
        ({"disentangle": weight}, "disentangle", ["disentangle_loss"]),
    ):
        quantizer = build(**options)
        loss = quantizer(list(z)).loss
        close(case, loss, *scalars)
        check(quantizer, loss, part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("coda"))
def test_attention_residual(name, backend):
    case = Case(RELATED, name)
    o, x = case.options, case["x"].requires_grad_()
    published = [key.removeprefix("param/") for key in case._tensors if key.startswith("param/")]
    ours = {key: key.removeprefix("attn.").replace("codebooks.weight", "codebook.table_0") for key in published}

    def build(**options):
        quantizer = AttentionQuantizer(
            o["width"], o["codebook_size"], key_dim=o["key_width"], norm=o["key_norm"].removesuffix("_norm"),
            norm_eps=o["key_norm_eps"], codebook_weight=o["beta"], entropy_temperature=o["entropy_temperature"],
            entropy_eps=o["entropy_eps"], backend=backend, **options,
        )  # fmt: skip
        quantizer.load_state_dict({ours[key]: case[f"param/{key}"] for key in published})
        return SoftMultiScaleQuantizer(quantizer, o["scales"]), dict(quantizer.named_parameters())

    plain, parameters = build()
    out = plain(x)
    assert case.check_indices(out.indices) == 0
    case.check("value", out.quantized, case["f_hat"])
    close(case, out.loss, "vq_loss")
    with_entropy, its_parameters = build(entropy_weight=1.0)
    entropy = with_entropy(x).loss - out.loss.detach()
    close(case, entropy, "entropy_loss")
    leaves, its_leaves = ([p[ours[key]] for key in published] for p in (parameters, its_parameters))
    loss_gradients = gradients(out.loss, [x, *leaves])
    for part, grads in (
        ("out", gradients((out.quantized * case["upstream"]).sum(), [x, *leaves])),
        ("loss", loss_gradients),
        ("entropy", [a - b for a, b in zip(gradients(entropy, [x, *its_leaves]), loss_gradients)]),
    ):
        # A gradient that cancels (of a key's bias: the softmax does not see it) is rounding of the largest, as is what
        # remains where loss and entropy are told apart.
        names = [f"grad_x_{part}", *(f"grad_{part}/{key}" for key in published)]
        largest = max(float(g.abs().max()) for g in [*grads, *(loss_gradients if part == "entropy" else [])])
        for grad, key in zip(grads, names, strict=True):
            limit = max(case.limit("gradient", case[key]), 1e-6 * largest)
            assert float((grad - case[key]).abs().max()) <= limit, key


def phi_assignment(scales: int, rows: int) -> list[int]:
    """VAR's partially shared convolutions."""
    ticks = np.linspace(1 / 3 / rows, 1 - 1 / 3 / rows, rows)
    return [int(np.argmin(np.abs(ticks - s / (scales - 1)))) for s in range(scales)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("imagefolder"))
def test_product_of_multiscale(name, backend, monkeypatch):
    case = Case(RELATED, name)
    o, f = case.options, case["f"].requires_grad_()
    scales, rows, branches, width = o["scales"], o["phi_sharing"], range(o["branches"]), o["width"]
    keys = [f"quant_resi.qresi_ls.{p}" for p in range(rows)]

    def branch(g):
        phi = [
            torch.nn.Parameter(torch.stack([case[f"param/{g}/{key}.{kind}"] for key in keys]))
            for kind in ("weight", "bias")
        ]
        quantizer = VectorQuantizer(
            width, o["codebook_size"], commitment_weight=o["beta"] * len(scales), backend=backend
        )
        quantizer.codebook.table_0.data.copy_(case[f"param/{g}/embedding.weight"])
        phi = (*phi, o["phi_ratio"], phi_assignment(len(scales), rows))
        return PrefixMultiScaleQuantizer(quantizer, scales, dropped=0.5, phi=phi, normalize_codes=False)

    product = ProductQuantizer([branch(g) for g in branches])
    batch, kept = f.shape[1], o["dropped_samples"]
    depths = (o["dropout_depths"] or [])[:kept] + [len(scales)] * (batch - kept)
    monkeypatch.setattr(product.quantizers[0], "draw", lambda *_: torch.tensor(depths))
    x = torch.cat(list(f), dim=1)
    out = product(x)
    ids = product.encode(x)
    case.check("value", torch.stack(out.quantized.split(width, dim=1)), case["out"])
    assert torch.equal(ids.movedim(-1, 0), case["idx"])
    assert bool(((out.indices == ids) | (out.indices == -1)).all())
    close(case, out.loss, *case.scalars)
    leaves = [t for q in product.quantizers for t in (*q.codebooks(), q.phi_weight, q.phi_bias)]
    upstream = (torch.stack(out.quantized.split(width, dim=1)) * case["upstream"]).sum()
    grad_f, *others = gradients(upstream, [f, *leaves])
    case.check("gradient", grad_f, case["grad_f_out"])
    assert not any(g.any() for g in others)
    grad_f, *others = gradients(out.loss, [f, *leaves])
    case.check("gradient", grad_f, case["grad_f_loss"])
    for g in branches:
        grad_table, grad_weight, grad_bias = others[3 * g : 3 * g + 3]
        case.check("gradient", grad_table, case[f"grad_loss/{g}/embedding.weight"])
        for p, key in enumerate(keys):
            case.check("gradient", grad_weight[p], case[f"grad_loss/{g}/{key}.weight"])
            case.check("gradient", grad_bias[p], case[f"grad_loss/{g}/{key}.bias"])
    inputs = product.inputs(ids)
    case.check("value", torch.stack(inputs.split(width, dim=-1)), case["teacher_input"])
    length = 0
    for s, n in enumerate(scales):
        length += n * n
        prefix = product.decode(ids[:, :length], size=x.shape[2:])
        case.check("value", torch.stack(prefix.split(width, dim=1)), case["f_hat_per_scale"][:, s])
        for b, depth in enumerate(depths):
            assert depth != s + 1 or torch.equal(out.quantized[b], prefix[b]), "a dropped sample's map is the prefix's"
