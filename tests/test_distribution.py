"""Frechet and kernel distance against their formulas in float64, and the network whose features FID is defined on."""

import math

import inception_weights
import pytest
import torch
from tokenflow.evaluation import distribution
from tokenflow.evaluation.distribution import DistributionMeter, Gaussian, frechet, frechet_of, kid
from tokenflow.evaluation.inception import Inception, installed_weights, resized
from tokenflow.evaluation.measure import Seen


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_is_its_formula():
    x, y = randn(60, 7) @ randn(7, 7, seed=2), randn(80, 7, seed=1) + 0.5
    sx, sy = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(sx @ sy).sqrt().real.sum()
    want = (x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * root
    assert frechet(x, y) == pytest.approx(want.item(), rel=1e-10) and frechet(x, y) == pytest.approx(
        frechet(y, x), rel=1e-10
    )
    assert frechet(x, x) < 1e-10 and frechet(x, x + 2) == pytest.approx(4 * 7, rel=1e-10)


@pytest.mark.parametrize("n", [2, 5, 40, 41, 60])
def test_frechet_with_fewer_pictures_than_dimensions(n):
    # Scaling by s: tr S (1 - s)^2, whatever the rank. A root of the product of covariances loses half of the digits here.
    x = 1e3 * randn(n, 40, seed=n)
    x = x - x.mean(0)
    want = 1e-12 * x.T.cov().trace().item()
    assert frechet(x, x * (1 + 1e-6)) == pytest.approx(want, rel=1e-3, abs=1e-9 * x.square().sum().item() / n)
    assert frechet(x, 3 * x) == pytest.approx(4 * x.T.cov().trace().item(), rel=1e-10)


@pytest.mark.parametrize("batches", [[1] * 50, [50], [7, 1, 30, 0, 12], [3, 47]])
def test_a_gaussian_in_batches_is_that_of_two_passes(batches):
    # Far from the origin, where sums of squares would lose eleven of the sixteen digits.
    rows = 1e6 + randn(50, 6) @ randn(6, 6, seed=2)
    found = Gaussian(6)
    for part in rows.split(batches):
        found.update(part)
    assert found.count == 50 and found.factor().shape == (6, 6)
    torch.testing.assert_close(found.mean(), rows.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.factor().T @ found.factor(), (rows - 1e6).T.cov(), rtol=1e-8, atol=1e-8)
    found.update(rows)  # goes on after it was asked
    torch.testing.assert_close(found.mean(), rows.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(
        found.factor().T @ found.factor(), (rows - 1e6).repeat(2, 1).T.cov(), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("n", [3, 20, 41, 200])
def test_frechet_in_batches_keeps_its_digits(n):
    """With a rank below the dimension too, where a root of accumulated covariances would lose half of them."""
    x = 1e3 * randn(n, 40, seed=n)
    fitted = [Gaussian(40), Gaussian(40)]
    for rows in x.split(16):
        fitted[0].update(rows)
    for rows in (x * (1 + 1e-3)).split(9):
        fitted[1].update(rows)
    want = 1e-6 * (x.T.cov().trace() + x.mean(0).square().sum()).item()
    assert frechet_of(*fitted) == pytest.approx(want, rel=1e-7)


def kept(thing, found=None):
    """Bytes of all tensors that an object holds."""
    found = {} if found is None else found
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, list | tuple):
        for part in thing:
            kept(part, found)
    elif type(thing).__module__ == distribution.__name__:
        for part in vars(thing).values():
            kept(part, found)
    return sum(found.values())


@pytest.mark.parametrize("kernel", [False, True])
def test_memory_does_not_grow_with_the_number_of_pictures(kernel, monkeypatch):
    monkeypatch.setattr(distribution, "KEPT", 60)
    meter, sizes, dim = DistributionMeter("d", lambda t: t.double().mean(3).flatten(1), "p", kernel=kernel), [], 24
    images = rand(1200, 3, 8, 2).float() * 2 - 1
    for start in range(0, 1200, 30):
        one = images[start : start + 30]
        meter.update(Seen(list(range(30)), one, one.flip(2), torch.zeros(0), torch.zeros(0)))
        sizes.append(kept(meter))
    assert max(sizes) <= (60 * dim * 2 * 4 if kernel else 2 * (2 * dim + 30 + 1) * dim * 8) and min(sizes) > 0
    (measure,) = meter.measures()
    if kernel:
        assert measure.protocol == "p, 1 block of 60 of a random 60 of the pictures"
        return
    look = lambda t: ((t + 1) * 127.5).round().double().mean(3).flatten(1)  # noqa: E731
    assert measure.value == pytest.approx(frechet(look(images), look(images.flip(2))), rel=1e-6)


def test_a_sample_of_pairs_takes_each_as_often(monkeypatch):
    monkeypatch.setattr(distribution, "KEPT", 5)
    hits, runs = torch.zeros(20), 2000
    for seed in range(runs):
        sample = distribution._Kernel(1)
        sample.draw.seed(seed)
        rows = torch.arange(20.0)[:, None]
        for part in rows.split([1, 12, 7]):
            sample.update(part, part + 100)
        originals, images = torch.stack(sample.pairs, 1)
        assert torch.equal(images, originals + 100) and len(originals.unique()) == 5
        hits[originals.long().flatten()] += 1
    spread = (runs * 0.25 * 0.75) ** 0.5
    assert (hits - runs * 0.25).abs().max() < 4 * spread


def test_kid_is_its_formula_and_leaves_out_a_pictures_own_reconstruction():
    x, y = randn(12, 5), randn(12, 5, seed=1) + 0.3
    kernel = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    want = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs)
    value, error = kid(x, y)
    assert value == pytest.approx((want / len(pairs)).item(), rel=1e-10) and error is None
    assert kid(x, x)[0] == pytest.approx(0.0, abs=1e-12)
    value, error = kid(x, y, block=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    blocks = torch.tensor([kid(x[rows], y[rows])[0] for rows in order.split(4)], dtype=torch.float64)
    assert value == pytest.approx(blocks.mean().item(), rel=1e-10)
    assert error == pytest.approx(blocks.std().item() / math.sqrt(3), rel=1e-10)


@pytest.mark.parametrize(
    ("count", "said"), [(7, "1 block of 7"), (1999, "1 block of 1999"), (2500, "2 blocks of 1250")]
)
def test_kid_says_its_blocks_as_they_are(count, said):
    kernel = distribution._Kernel(1)
    kernel.update(randn(count, 1), randn(count, 1, seed=1))
    measure = kernel.measure("k", "p")
    assert measure.protocol == f"p, {said}" and (measure.error is None) == ("blocks" not in said)


def test_kid_of_equal_distributions_is_zero_on_average():
    values = [kid(randn(30, 4, seed=s), randn(30, 4, seed=1000 + s))[0] for s in range(100)]
    assert abs(torch.tensor(values).mean()) < 3 * torch.tensor(values).std() / 10


@pytest.mark.parametrize("function", [frechet, kid])
def test_bad_features_are_a_sentence(function):
    good = torch.zeros(3, 4)
    for x, y in ((good[:1], good), (good, good[:, :2]), (good[0], good), (torch.full((3, 4), torch.nan), good)):
        with pytest.raises(ValueError, match=f"{function.__name__}: x: wanted"):
            function(x, y)
    with pytest.raises(ValueError, match="kid: y: wanted as many rows as x, 3, got 2"):
        kid(good, good[:2])
    with pytest.raises(ValueError, match=r"Gaussian: rows: wanted finite values \[k, 4\], got \[3, 2\]"):
        Gaussian(4).update(good[:, :2])


def test_inception_gives_what_torch_fidelity_gives():
    # Made by calling torch-fidelity 0.4.0 with the same weights; largest difference of all 4096 numbers there 2.4e-6.
    found = Inception(inception_weights.state())(inception_weights.pictures())
    expected = torch.tensor([
        [0.04555152, 0.008758641, 0.3120324, 0.6506462, 0.0, 0.4641135, 0.01399832, 0.05627925],
        [0.02492255, 0.01556394, 0.1955451, 0.7608021, 0.0, 0.3441325, 0.04204762, 0.03874463],
    ])  # fmt: skip
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[:, ::256], expected, rtol=1e-4, atol=1e-5)
    sums, norms = found.double().sum(1), found.double().square().sum(1).sqrt()
    torch.testing.assert_close(sums, torch.tensor([1282.40881, 1080.96479], dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms, torch.tensor([46.2883941, 39.0687237], dtype=torch.float64), rtol=1e-5, atol=0)


def test_inception_refuses_other_weights_and_finds_its_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the 94 convolutions of FID's network, got 1"):
        Inception({"a.conv.weight": torch.zeros(1)})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert installed_weights() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").touch()
    assert installed_weights() is not None


def test_resizing_starts_at_the_corner():
    x = rand(1, 1, 5, 3)
    out = resized(x.float(), 7)[0, 0].double()
    for i in range(7):
        for j in range(7):
            a, b = i * 5 / 7, j * 3 / 7
            i0, j0 = int(a), int(b)
            i1, j1, u, v = min(i0 + 1, 4), min(j0 + 1, 2), a - i0, b - j0
            t = x[0, 0]
            want = (1 - u) * ((1 - v) * t[i0, j0] + v * t[i0, j1]) + u * ((1 - v) * t[i1, j0] + v * t[i1, j1])
            assert out[i, j].item() == pytest.approx(want.item(), abs=1e-5)
