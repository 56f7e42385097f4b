"""Losses in float64 against their formulas written out, gradients, edges, bad input, and the weighted sum that training minimises."""

import math
from types import SimpleNamespace

import pytest
import torch
from harness import assert_near, assert_sentence, leaves, normal
from tokenflow.errors import Missing
from tokenflow.losses import LPIPS, Objective, Weights, distillation_loss, load_perceptual, perceptual
from tokenflow.losses.adversarial import (
    UNITOK_RANGE,
    LeCam,
    Ramp,
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    frozen,
    generator_loss,
)
from tokenflow.losses.blur import Fade
from tokenflow.losses.st_lpips import CONVOLUTIONS, STLPIPS
from torch import nn

SIDES = ((32, 32), (16, 40))


def double(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float64)


# LPIPS


def vgg16_distance(trunk, heads, a, b):
    """LPIPS as the paper writes it, on VGG16 as torchvision lists its layers."""
    taps, layers = [3, 8, 15, 22, 29], "CRCRMCRCRMCRCRCRMCRCRCRMCRCRCR"
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]

    def maps(x):
        h, found = ((x - shift) / scale)[None], []
        for n, layer in enumerate(layers):
            if layer == "C":
                weight, bias = (trunk[f"features.{n}.{kind}"].double() for kind in ("weight", "bias"))
                h = torch.conv2d(h, weight, bias, padding=1)
            else:
                h = h.clamp_min(0) if layer == "R" else h.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
            if n in taps:
                found.append(h[0])
        return found

    distances = []
    for x, y in zip(a, b):
        total = torch.zeros((), dtype=torch.float64)
        for level, (f, g) in enumerate(zip(maps(x), maps(y))):
            f, g = (v / ((v**2).sum(0).sqrt() + 1e-10) for v in (f, g))
            head = heads[f"lin{level}.model.1.weight"].double().flatten()
            total = total + sum(w * (p - q) ** 2 for w, p, q in zip(head, f, g)).mean()
        distances.append(total)
    return torch.stack(distances)


@pytest.mark.parametrize("sides", SIDES)
def test_lpips_is_its_formula(sides):
    trunk, heads = perceptual.random_weights(width=3)
    # A bias that keeps every cell alive: the formula's square root has no gradient at zero.
    trunk = {name: value + 0.5 if name.endswith("bias") else value for name, value in trunk.items()}
    metric = LPIPS(trunk, heads).double()
    a, b = leaves(double(2, 3, *sides), double(2, 3, *sides, seed=1))
    c, d = leaves(a, b)
    actual, expected = metric(a, b), vgg16_distance(trunk, heads, c, d)
    assert actual.shape == (2,) and expected.min() > 1e-3
    # The constructor keeps weights in float32: so do the constants of the paper here.
    assert_near(actual, expected, 1e-6)
    (actual * torch.tensor([1.0, 2.0])).sum().backward()
    (expected * torch.tensor([1.0, 2.0])).sum().backward()
    assert_near(a.grad, c.grad, 1e-5)
    assert_near(b.grad, d.grad, 1e-5)


def test_lpips_of_dead_cells_has_a_finite_gradient():
    trunk, heads = perceptual.random_weights(width=3)
    trunk = {name: value - 100 if name == "features.28.bias" else value for name, value in trunk.items()}
    (a,) = leaves(normal(1, 3, 16, 16))
    distance = LPIPS(trunk, heads)(a, -a.detach())
    distance.sum().backward()
    assert distance.isfinite().all() and a.grad.isfinite().all() and a.grad.abs().max() > 0


def test_lpips_reads_files_under_every_usual_name(tmp_path):
    trunk, heads = perceptual.random_weights(width=2)
    a, b = normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=1)
    expected = LPIPS(trunk, heads)(a, b)
    torch.save(heads, tmp_path / "heads.pth")
    slices = ((0, 4), (4, 9), (9, 16), (16, 23), (23, 30))

    def in_slices(name):
        number = int(name.split(".")[1])
        slice_ = next(n for n, (start, end) in enumerate(slices) if start <= number < end)
        return f"net.slice{slice_ + 1}.{name.removeprefix('features.')}"

    for rename in (str, lambda name: name.removeprefix("features."), in_slices):
        state = {rename(name): value for name, value in trunk.items()}
        torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "trunk.pth")
        metric = load_perceptual("lpips", trunk=tmp_path / "trunk.pth", heads=tmp_path / "heads.pth")
        assert torch.equal(metric(a, b), expected)
        assert not list(metric.parameters()) and not metric.state_dict() and not metric.training


def test_lpips_of_no_pictures():
    metric = LPIPS(*perceptual.random_weights())
    (a,) = leaves(torch.zeros(0, 3, 16, 16))
    distance = metric(a, a.detach())
    distance.sum().backward()
    assert distance.shape == (0,) and a.grad.shape == a.shape


def test_st_lpips_of_small_pictures():
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for level, (name, before, side) in enumerate(zip(CONVOLUTIONS, (3, 2, 2, 2, 2), (11, 5, 3, 3, 3), strict=True)):
        state |= {f"net.{name}.weight": torch.ones(2, before, side, side), f"net.{name}.bias": torch.zeros(2)}
        state[f"lin{level}.model.1.weight"] = torch.ones(1, 2, 1, 1)
    metric = STLPIPS(state)
    assert metric(torch.zeros(2, 3, 21, 40), torch.zeros(2, 3, 21, 40)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"ST-LPIPS: a: wanted sides of at least 21, got \[20, 40\]"):
        metric(torch.zeros(2, 3, 20, 40), torch.zeros(2, 3, 20, 40))


def test_perceptual_says_what_is_missing(tmp_path, monkeypatch):
    trunk, heads = perceptual.random_weights(width=2)
    metric = LPIPS(trunk, heads)
    images = torch.zeros(1, 3, 16, 16)
    assert_sentence(ValueError, "LPIPS", "a", metric, images[..., :8], images[..., :8])
    assert_sentence(ValueError, "LPIPS", "a", metric, images[0], images[0])
    assert_sentence(TypeError, "LPIPS", "a", metric, images.long(), images)
    assert_sentence(ValueError, "LPIPS", "b", metric, images, images[..., :12])
    assert_sentence(ValueError, "LPIPS", "trunk", LPIPS, {**trunk, "features.5.weight": torch.zeros(2, 3, 3, 3)}, heads)
    assert_sentence(ValueError, "LPIPS", "trunk", LPIPS, {}, heads)
    assert_sentence(
        ValueError, "LPIPS", "heads", LPIPS, trunk, {**heads, "lin2.model.1.weight": torch.zeros(1, 3, 1, 1)}
    )
    assert_sentence(ValueError, "load_perceptual", "name", load_perceptual, "ssim")
    assert_sentence(ValueError, "load_perceptual", "heads", load_perceptual, "lpips", trunk=tmp_path / "trunk.pth")
    torch.save(trunk, tmp_path / "trunk.pth")
    for files in ({"trunk": tmp_path / "no", "heads": "no"}, {"trunk": tmp_path / "trunk.pth", "heads": "no"}):
        with pytest.raises(Missing, match=r"wanted a copy of .* not downloaded, got .*no: no such file"):
            load_perceptual("lpips", **files)
    monkeypatch.setattr(perceptual.STLPIPS, "installed", classmethod(lambda cls: None))
    with pytest.raises(Missing, match="pip install --no-deps stlpips-pytorch"):
        load_perceptual("st-lpips")


# Adversarial losses


def softplus(v):
    return math.log1p(math.exp(-abs(v))) + max(v, 0.0)


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 1, 3, 4)])
def test_adversarial_losses_are_their_formulas(shape):
    real, fake = 2 * double(*shape), 2 * double(*shape, seed=1)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    n = len(r)
    expected = {
        "hinge": (sum(max(0, 1 - v) for v in r) / n + sum(max(0, 1 + v) for v in f) / n, -sum(f) / n),
        "non_saturating": (
            sum(softplus(-v) for v in r) / n + sum(softplus(v) for v in f) / n,
            sum(softplus(-v) for v in f) / n,
        ),
    }
    for kind, (of_discriminator, of_generator) in expected.items():
        assert float(discriminator_loss(real, fake, kind)) == pytest.approx(of_discriminator, rel=1e-12)
        assert float(generator_loss(fake, kind)) == pytest.approx(of_generator, rel=1e-12)
        torch.autograd.gradcheck(lambda a, b: discriminator_loss(a, b, kind), leaves(real, fake))
        torch.autograd.gradcheck(lambda a: generator_loss(a, kind), leaves(fake))
    other, another = double(*shape, seed=2), double(*shape, seed=3)
    squares = sum((a - b) ** 2 for a, b in zip(other.flatten().tolist(), r)) / n
    squares += sum((a - b) ** 2 for a, b in zip(another.flatten().tolist(), f)) / n
    assert float(consistency_loss(real, other, fake, another)) == pytest.approx(squares, rel=1e-12)
    torch.autograd.gradcheck(consistency_loss, leaves(real, other, fake, another))


def test_losses_of_nothing_are_zero_with_gradient():
    (nothing,) = leaves(torch.zeros(0, 4))
    lecam = LeCam()
    for loss in (
        discriminator_loss(nothing, nothing),
        generator_loss(nothing, "non_saturating"),
        consistency_loss(nothing, nothing, nothing, nothing),
        lecam(nothing, nothing),
    ):
        loss.backward()
        assert float(loss.detach()) == 0 and nothing.grad.shape == (0, 4)
    assert float(lecam.real) == 0


def test_lecam_follows_its_averages():
    lecam, real_average, fake_average = LeCam(decay=0.8).double(), None, None
    for step in range(4):
        real, fake = double(6, seed=step) + 1, double(6, seed=9 + step) - 1
        r, f = sum(real.tolist()) / 6, sum(fake.tolist()) / 6
        real_average = r if step == 0 else 0.8 * real_average + 0.2 * r
        fake_average = f if step == 0 else 0.8 * fake_average + 0.2 * f
        expected = sum((v - fake_average) ** 2 for v in real.tolist()) / 6
        expected += sum((v - real_average) ** 2 for v in fake.tolist()) / 6
        assert float(lecam(real, fake)) == pytest.approx(expected, rel=1e-12)
    before = {name: value.clone() for name, value in lecam.state_dict().items()}
    lecam.eval()(real + 1, fake)
    assert int(before["updates"]) == 4 and all(torch.equal(before[k], v) for k, v in lecam.state_dict().items())


@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_adaptive_weight_is_the_ratio_of_closed_form_gradients(size):
    """x' = W h under mse to x, and -mean v x': dW = 2 (W h - x) h^T / n and -v h^T / n."""
    (w,), h, x = leaves(double(3, 4)), double(4, 5, seed=1), double(3, 5, seed=2)
    v = size * double(3, 5, seed=3)
    out = w @ h
    reconstruction, gan = (out - x).square().mean(), -(v * out).mean()
    with torch.no_grad():
        ratio = float((2 * (w @ h - x) @ h.T / 15).norm() / ((v @ h.T / 15).norm() + 1e-6))
    weight = adaptive_weight(reconstruction, gan, w)
    assert float(weight) == pytest.approx(min(ratio, 1e4), rel=1e-9) and not weight.requires_grad
    low = adaptive_weight(reconstruction, gan, w, limits=UNITOK_RANGE)
    assert float(low) == pytest.approx(min(max(ratio, 0.015), 1e4), rel=1e-9)
    assert (size == 1e9) == (ratio < 0.015)
    (reconstruction + gan).backward()
    assert w.grad.isfinite().all()


def test_frozen_restores_what_was_learned_before():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    with pytest.raises(KeyError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


# Distillation


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (1, 1)])
def test_distillation_is_its_formula(grid):
    (student,), teacher = leaves(double(2, 5, 2, 3)), double(2, 5, *grid, seed=1)
    h, w = 2, 3

    def cell(b, i, j):
        rows = range(i * grid[0] // h, -((i + 1) * grid[0] // -h))
        columns = range(j * grid[1] // w, -((j + 1) * grid[1] // -w))
        return sum(teacher[b, :, y, x] for y in rows for x in columns) / (len(rows) * len(columns))

    cosines, squares = 0.0, 0.0
    for b in range(2):
        for i in range(h):
            for j in range(w):
                s, t = student[b, :, i, j], cell(b, i, j)
                cosines = cosines + (1 - (s @ t) / (s @ s).sqrt() / (t @ t).sqrt()) / 12
                squares = squares + ((s - t) ** 2).sum() / 60
    for kind, expected in (("cosine", cosines), ("l2", squares)):
        actual = distillation_loss(student, teacher, kind)
        assert_near(actual, expected, 1e-12)
        assert_near(*(torch.autograd.grad(v, student)[0] for v in (actual, expected)), 1e-12)


def test_distillation_at_the_edges():
    (student,) = leaves(torch.zeros(1, 4, 2, 2))
    loss = distillation_loss(student, normal(1, 4, 2, 2))
    loss.backward()
    assert float(loss.detach()) == 1 and student.grad.isfinite().all()
    assert float(distillation_loss(torch.zeros(0, 4, 2, 2), torch.zeros(0, 4, 8, 8))) == 0
    (teacher,) = leaves(normal(1, 4, 2, 2))
    assert not distillation_loss(normal(1, 4, 2, 2, seed=1), teacher).requires_grad
    half = distillation_loss(normal(1, 4, 2, 2).bfloat16(), normal(1, 4, 2, 2))
    assert half.dtype == torch.float32 and float(half) < 0.01


# The weighted sum


class Forbidden(nn.Module):
    def forward(self, *args):
        raise AssertionError("was run")


class Judge(nn.Module):
    """The mean of 2 x 2 cells through a small network; counts its passes."""

    def __init__(self, joint):
        super().__init__()
        self.joint, self.passes = joint, 0
        self.net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Tanh(), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        self.passes += 1
        return self.net(x)


class Distance(nn.Module):
    def forward(self, a, b):
        return (a - b).square().square().mean((1, 2, 3))


@pytest.fixture
def batch():
    """A decoder of one convolution and what it is trained with."""
    torch.manual_seed(0)
    decoder = nn.Conv2d(3, 3, 1).double()
    images = double(3, 3, 12, 12)
    return SimpleNamespace(images=images, decoder=decoder, out=decoder(images), judge=Judge(joint=False).double())


def everything(seed=0):
    (student,) = leaves(double(3, 4, 2, 2, seed=seed))
    rows = nn.functional.normalize(double(2, 3, 6, seed=seed + 1), dim=-1)
    quantizer, entropy = leaves(torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64))
    return {
        "quantizer": quantizer,
        "entropy": entropy,
        "semantic": (student, double(3, 4, 2, 2, seed=seed + 2)),
        "contrastive": (*rows, torch.tensor(3.0)),
    }


@pytest.mark.parametrize("adaptive", [None, UNITOK_RANGE])
def test_total_is_the_weighted_sum_of_the_formulas(batch, adaptive):
    weights = Weights(
        l1=0.2, mse=0.9, perceptual=0.3, semantic=0.8, quantizer=1.1, entropy=0.6, contrastive=0.7, adversarial=0.4,
        adaptive=adaptive, ramp=Ramp(10, 4),
    )  # fmt: skip
    objective, given = Objective(weights, perceptual=Distance()), everything()
    last = batch.decoder.weight
    loss = objective.generator(11, batch.images, batch.out, discriminator=batch.judge, last_layer=last, **given)
    d = batch.out - batch.images
    student, teacher = given["semantic"]
    image, text, scale = given["contrastive"]
    logits = scale * image @ text.T
    clip = sum(torch.logsumexp(m, dim=1) - m.diagonal() for m in (logits, logits.T)).mean() / 2
    cosine = (student * teacher).sum(1) / (student.square().sum(1) * teacher.square().sum(1)).sqrt()
    expected = {
        "l1": (d.abs().sum() / d.numel()),
        "mse": (d**2).sum() / d.numel(),
        "perceptual": (d**4).sum() / d.numel(),
        "semantic": 1 - cosine.mean(),
        "quantizer": given["quantizer"],
        "entropy": given["entropy"],
        "contrastive": clip,
        "adversarial": -batch.judge.net(batch.out).mean(),
    }
    pixels = 0.2 * expected["l1"] + 0.9 * expected["mse"] + 0.3 * expected["perceptual"]
    ratio = 1.0
    if adaptive:
        norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (pixels, expected["adversarial"])]
        ratio = float(norms[0] / (norms[1] + 1e-6))
        assert float(loss.terms["adaptive_weight"]) == pytest.approx(ratio, rel=1e-9)
    assert loss.terms.keys() == expected.keys() | ({"adaptive_weight"} if adaptive else set())
    for name, value in expected.items():
        assert_near(loss.terms[name], value, 1e-12, name)
        assert not loss.terms[name].requires_grad
    total = sum(getattr(weights, name) * expected[name] for name in expected if name != "adversarial")
    total = total + 0.4 * 0.5 * ratio * expected["adversarial"]
    assert_near(loss.total, total, 1e-9)
    wanted = [*batch.decoder.parameters(), student, given["quantizer"], given["entropy"]]
    actual, twin = (torch.autograd.grad(v, wanted, retain_graph=True) for v in (loss.total, total))
    for a, b in zip(actual, twin):
        assert_near(a, b, 1e-9)
    assert all(p.requires_grad for p in batch.judge.parameters())


@pytest.mark.parametrize("joint", [False, True])
def test_discriminator_loss_is_the_weighted_sum_of_the_formulas(batch, joint):
    weights = Weights(perceptual=0.0, adversarial=0.5, discriminator=0.7, consistency=4.0, lecam=0.3)
    batch.judge.joint = joint
    objective = Objective(weights).double()
    seen = []
    watch = batch.judge.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(3)
    loss = objective.discriminator(0, batch.images, batch.out, batch.judge)
    watch.remove()
    seen = torch.cat(seen).chunk(4)
    assert batch.judge.passes == (1 if joint else 4)
    assert torch.equal(seen[0], batch.images) and torch.equal(seen[1], batch.out) and not seen[1].requires_grad
    assert not torch.equal(seen[2], seen[0]) and not torch.equal(seen[3], seen[1])
    real, fake, strong_real, strong_fake = (batch.judge.net(x) for x in seen)
    hinge = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    consistency = ((strong_real - real) ** 2).mean() + ((strong_fake - fake) ** 2).mean()
    # The first averages are the first means.
    lecam = ((real - fake.detach().mean()) ** 2).mean() + ((fake - real.detach().mean()) ** 2).mean()
    assert_near(loss.total, 0.7 * hinge + 4 * consistency + 0.3 * lecam, 1e-12)
    assert_near(loss.terms["consistency"], consistency, 1e-12)
    assert_near(loss.terms["real"], real.mean(), 1e-12)
    actual, twin = (torch.autograd.grad(v, list(batch.judge.parameters())) for v in
                    (loss.total, 0.7 * hinge + 4 * consistency + 0.3 * lecam))  # fmt: skip
    for a, b in zip(actual, twin):
        assert_near(a, b, 1e-10, size=1)
    torch.manual_seed(3)
    again = Objective(weights).double().discriminator(0, batch.images, batch.out, batch.judge)
    assert torch.equal(again.total, loss.total), "the same seed, the same draws"
    torch.manual_seed(4)
    assert not torch.equal(Objective(weights).discriminator(0, batch.images, batch.out, batch.judge).total, loss.total)


def test_weight_zero_costs_nothing(batch):
    """Neither before the ramp nor with weight 0 is a discriminator, a metric or another loss run."""
    for weights in (
        Weights(perceptual=0.0, quantizer=0.0, adversarial=0.5, ramp=Ramp(5), adaptive=UNITOK_RANGE, consistency=4.0),
        Weights(perceptual=0.0, quantizer=0.0, adversarial=0.0, consistency=4.0, lecam=1.0),
    ):
        objective = Objective(weights, perceptual=Forbidden())
        bad = torch.full((), float("nan"))
        given = {"quantizer": bad, "entropy": bad, "semantic": (bad, bad), "contrastive": (bad, bad, bad)}
        loss = objective.generator(4, batch.images, batch.out, discriminator=Forbidden(), **given)
        assert loss.terms.keys() == {"mse"} and float(loss.total.detach()) == float(loss.terms["mse"])
        assert objective.discriminator(4, batch.images, batch.out, Forbidden()) is None
    none = Objective(Weights(mse=0.0, perceptual=0.0)).generator(0, batch.images, batch.out)
    none.total.backward()
    assert not none.terms and float(none.total.detach()) == 0


def test_a_batch_without_text_or_teacher(batch):
    loss = Objective(Weights.unitok(1000), perceptual=Forbidden()).generator(0, batch.images, batch.out)
    assert loss.terms.keys() == {"l1", "mse"}, "pictures below 48 pixels have no perceptual term"


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("joint", [False, True])
def test_few_pictures(batch, count, joint):
    weights = Weights(
        l1=1.0, adversarial=1.0, consistency=4.0, lecam=0.1, fade=Fade(1.0, 0, 10), augment=True, adaptive=UNITOK_RANGE
    )
    objective, images = Objective(weights, perceptual=Distance()), batch.images[:count]
    batch.judge.joint = joint
    out = batch.decoder(images)
    loss = objective.generator(0, images, out, discriminator=batch.judge, last_layer=batch.decoder.weight)
    loss.total.backward()
    assert all(p.grad is None for p in batch.judge.parameters()), "the generator's step leaves the discriminator alone"
    objective.discriminator(0, images, out, batch.judge).total.backward()
    for parameter in (*batch.decoder.parameters(), *batch.judge.parameters()):
        assert parameter.grad.isfinite().all()


def test_low_precision_is_summed_in_full(batch):
    out = batch.out.detach().bfloat16()
    loss = Objective(Weights(l1=1.0, perceptual=0.0)).generator(0, batch.images.float(), out)
    assert loss.total.dtype == torch.float32
    assert_near(loss.terms["mse"], (out.float() - batch.images.float()).square().mean(), 1e-7)


def test_published_weights():
    ours, theirs = Weights.tokenflow(), Weights.unitok(steps_per_epoch=10_000)
    terms = ("l1", "mse", "perceptual", "semantic", "quantizer", "entropy", "contrastive", "adversarial", "consistency")
    assert [getattr(ours, term) for term in terms] == [0, 1, 1, 1, 1, 1, 0, 0.5, 0]
    assert [getattr(theirs, term) for term in terms] == [0.2, 1, 1, 0, 1, 0, 1, 0.4, 4]
    objective = Objective(ours, perceptual=Distance())
    assert [objective.adversarial_weight(step) for step in (0, 19_999, 20_000, 10**6)] == [0, 0, 0.5, 0.5]
    objective = Objective(theirs, perceptual=Distance())
    weights = [objective.adversarial_weight(step) for step in (0, 3_749, 3_750, 3_899, 4_049, 10**6)]
    assert weights == pytest.approx([0, 0, 0.4 / 300, 0.2, 0.4, 0.4])
    assert [theirs.fade(step) for step in (3_750, 4_050, 4_350)] == pytest.approx([2.0, 1.0, 0.0])


def test_metric_stays_frozen_and_in_eval():
    objective = Objective(Weights(lecam=1.0), perceptual=nn.Sequential(nn.Dropout(), nn.Linear(1, 1))).train()
    assert not objective.perceptual[0].training and objective.lecam.training
    assert not any(p.requires_grad for p in objective.parameters())


def test_bad_arguments_are_sentences(batch):
    x = batch.images
    assert_sentence(ValueError, "discriminator_loss", "kind", discriminator_loss, x, x, "wasserstein")
    assert_sentence(ValueError, "generator_loss", "kind", generator_loss, x, "wasserstein")
    assert_sentence(ValueError, "consistency_loss", "fake_augmented", consistency_loss, x, x, x, x[:1])
    assert_sentence(ValueError, "LeCam", "decay", LeCam, 1.0)
    loss = batch.decoder.weight.sum()
    assert_sentence(ValueError, "adaptive_weight", "limits", adaptive_weight, loss, loss, loss, limits=(2, 1))
    assert_sentence(ValueError, "adaptive_weight", "adversarial", adaptive_weight, loss, loss[None], loss)
    assert_sentence(ValueError, "Ramp", "length", Ramp, 0, -1)
    assert_sentence(ValueError, "Fade", "sigma", Fade, float("nan"))
    assert_sentence(ValueError, "distillation_loss", "kind", distillation_loss, x, x, "l1")
    assert_sentence(ValueError, "distillation_loss", "student", distillation_loss, x[0], x)
    assert_sentence(ValueError, "distillation_loss", "teacher", distillation_loss, x, x[:1])
    assert_sentence(ValueError, "Weights", "mse", Weights, mse=-1.0)
    assert_sentence(ValueError, "Weights", "lecam", Weights, lecam=float("inf"))
    assert_sentence(ValueError, "Weights", "kind", Weights, kind="hinges")
    assert_sentence(ValueError, "Weights.unitok", "steps_per_epoch", Weights.unitok, 0)
    assert_sentence(ValueError, "Objective", "perceptual", Objective, Weights())
    assert_sentence(ValueError, "Objective", "distillation", Objective, Weights(perceptual=0.0), distillation="l3")
    assert_sentence(ValueError, "Weights", "cutout", Weights, cutout=1.5)
    for limits in ((1.0, 0.5), (-1.0, 1.0), (math.nan, 1.0)):
        assert_sentence(ValueError, "Weights", "adaptive", Weights, adaptive=limits)
    objective = Objective(Weights(perceptual=0.0, adversarial=1.0, adaptive=(0.0, 1.0)))
    assert_sentence(ValueError, "Objective", "discriminator", objective.generator, 0, x, batch.out)
    assert_sentence(
        ValueError, "Objective", "last_layer", objective.generator, 0, x, batch.out, discriminator=batch.judge
    )
    assert_sentence(ValueError, "Objective", "images", objective.generator, 0, x[0], x[0])
    assert_sentence(TypeError, "Objective", "images", objective.generator, 0, x.long(), x)
    assert_sentence(ValueError, "Objective", "reconstruction", objective.discriminator, 0, x, x[:1], batch.judge)
