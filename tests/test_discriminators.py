"""Discriminators, augmentation and blur: against layers written out, by their properties, at the edges, with bad input."""

import pytest
import torch
from harness import assert_near, assert_sentence, leaves, normal
from tokenflow.errors import Missing
from tokenflow.losses import DinoDiscriminator, PatchGAN, dinov2_tower
from tokenflow.losses.augment import diffaug
from tokenflow.losses.blur import gaussian_blur
from tokenflow.losses.dino_discriminator import BLOCKS, Dinov2Tower, Head
from torch import nn


def double(*shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.float64)


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


# PatchGAN


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patchgan_is_its_layers(norm):
    model, (x,) = PatchGAN(base=16, norm=norm).double(), leaves(double(2, 3, 32, 40))
    p = dict(model.named_parameters())
    h = leaky(torch.conv2d(x, p["main.0.weight"], p["main.0.bias"], 2, 1))
    for at, stride in ((2, 2), (5, 2), (8, 1)):
        h = torch.conv2d(h, p[f"main.{at}.weight"], None, stride, 1)
        b, c = h.shape[:2]
        over = h.transpose(0, 1).reshape(1, c, -1) if norm == "batch" else h.reshape(b, 32, -1)
        mean, variance = over.mean(-1), over.var(-1, unbiased=False)
        if norm == "group":
            mean, variance = (v.repeat_interleave(c // 32, dim=1) for v in (mean, variance))
        h = (h - mean[..., None, None]) / (variance[..., None, None] + 1e-5).sqrt()
        h = leaky(h * p[f"main.{at + 1}.weight"][:, None, None] + p[f"main.{at + 1}.bias"][:, None, None])
    expected = torch.conv2d(h, p["main.11.weight"], p["main.11.bias"], 1, 1)
    actual = model(x)
    assert actual.shape == (2, 1, 2, 3)
    assert_near(actual, expected, 1e-10)
    assert_near(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (actual, expected)), 1e-9)


def test_patchgan_as_published():
    model = PatchGAN().eval()
    assert sum(p.numel() for p in model.parameters()) == 2_765_633
    (x,) = leaves(normal(1, 3, 256, 256))
    out = model(x)
    assert out.shape == (1, 1, 30, 30)
    out[0, 0, 15, 15].backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_patchgan_starts_as_published():
    torch.manual_seed(0)
    convolution, norm = PatchGAN(base=32).main[5], PatchGAN(base=32).main[6]
    assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and convolution.bias is None
    assert (
        float(norm.weight.detach().mean()) == pytest.approx(1.0, abs=0.02)
        and float(norm.bias.detach().abs().max()) == 0
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_patchgan_joint_means_that_pictures_do_not_meet(norm):
    model, x = PatchGAN(base=16, norm=norm).double(), double(3, 3, 24, 24)
    together, alone = model(x), torch.cat([model(one[None]) for one in x])
    assert (float((together - alone).abs().max().detach()) < 1e-10) == model.joint == (norm == "group")


# The discriminator on DINOv2's features


class TinyTower(nn.Module):
    """Two levels of a random transformer's shapes: patches of 14, a class token, one mixing layer."""

    def __init__(self, width=32):
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, width, 14, stride=14), nn.Linear(width, width)
        self.dropout, self.seen = nn.Dropout(), None

    def forward(self, x):
        self.seen = x
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        return [tokens, self.dropout(torch.tanh(self.mix(tokens)))]


def test_head_is_its_layers():
    head, (x,) = Head(64).double(), leaves(double(2, 64, 5))
    p = dict(head.named_parameters())

    def norm(h, at):
        grouped = h.reshape(2, 32, -1)
        deviation = (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = ((grouped - grouped.mean(-1, keepdim=True)) / deviation).reshape(h.shape)
        return leaky(h * p[f"{at}.weight"][:, None] + p[f"{at}.bias"][:, None])

    h = norm(torch.einsum("oi,bin->bon", p["point.0.weight"][..., 0], x) + p["point.0.bias"][:, None], "point.1")
    # Kernel 9 on 5 cells: the circle is walked almost twice.
    wide = sum(torch.einsum("oi,bin->bon", p["wide.0.weight"][..., k], h.roll(4 - k, dims=-1)) for k in range(9))
    h = (h + norm(wide + p["wide.0.bias"][:, None], "wide.1")) / 2**0.5
    expected = torch.einsum("i,bin->bn", p["out.weight"][0, :, 0], h) + p["out.bias"]
    actual = head(x)
    assert_near(actual, expected, 1e-10)
    assert_near(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (actual, expected)), 1e-9)


def test_dino_discriminator_adds_class_to_patches_and_judges_every_level():
    # With one channel a group the norm would take the class token away again.
    tower = TinyTower(64)
    model = DinoDiscriminator(tower, width=64, levels=2, side=28).double().eval()
    (x,) = leaves(double(2, 3, 28, 28))
    out = model(x)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    assert_near(tower.seen, ((x + 1) / 2 - mean) / deviation, 1e-6)
    levels = tower(tower.seen)
    expected = [
        model.heads[n](torch.stack([level[:, 1 + i] + level[:, 0] for i in range(4)], dim=2))
        for n, level in enumerate(levels)
    ]
    assert_near(out, torch.cat(expected, dim=1), 1e-12)
    out.sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in tower.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
    assert not model.train().tower.training and model.heads.training


def test_pictures_are_cropped_or_shrunk_to_whole_patches():
    tower = TinyTower()
    model = DinoDiscriminator(tower, width=32, levels=2, side=28)
    x = normal(1, 3, 32, 45)
    model.eval()(x)
    area = torch.nn.functional.adaptive_avg_pool2d(x, (28, 28))
    raw = tower.seen * model.deviation + model.mean
    assert_near(raw, area, 1e-5)
    generator, model = torch.Generator().manual_seed(0), model.train()
    windows, shrunk = set(), 0
    for _ in range(200):
        assert model(x, generator).shape == (1, 8)
        raw = tower.seen * model.deviation + model.mean
        places = [
            (top, left) for top in range(5) for left in range(18)
            if torch.allclose(raw, x[:, :, top : top + 28, left : left + 28], atol=1e-5)
        ]  # fmt: skip
        shrunk += not places
        windows.update(places)
    assert 70 < shrunk < 130, "half of the passes"
    assert {top for top, _ in windows} == set(range(5)) and {left for _, left in windows} >= {0, 17}
    small = model(normal(2, 3, 20, 30))
    assert small.shape == (2, 2 * 1 * 2) and tower.seen.shape == (2, 3, 14, 28)
    assert model(x[:0]).shape == (0, 8)


def test_dino_discriminator_learns():
    torch.manual_seed(0)
    model = DinoDiscriminator(TinyTower(), width=32, levels=2, side=28)
    optimiser = torch.optim.Adam(model.heads.parameters(), lr=1e-2)
    real, fake = normal(4, 3, 28, 28), normal(4, 3, 28, 28, seed=1)
    fake = gaussian_blur(fake, 2.0)
    for _ in range(60):
        loss = (1 - model(real)).relu().mean() + (1 + model(fake)).relu().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.5


def test_dinov2_tower_gives_the_blocks_before_the_last_norm(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    tower = dinov2_tower(tmp_path, blocks=(0, 2))
    x = normal(2, 3, 42, 28)
    caught = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: caught.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(x)
        found = tower(x)
    assert_near(found[0], caught[0], 1e-6)
    assert_near(found[1], caught[2], 1e-6)
    discriminator = DinoDiscriminator(tower, width=32, levels=2, side=28)
    assert discriminator(normal(2, 3, 32, 32)).shape == (2, 8)
    assert_sentence(ValueError, "Dinov2Tower", "blocks", Dinov2Tower, model, BLOCKS)


def test_dinov2_tower_without_weights(tmp_path):
    with pytest.raises(Missing, match=r"wanted a copy of facebook/dinov2-small, .* got .*none"):
        dinov2_tower(tmp_path / "none")


def test_dinov2_tower_refuses_other_weights(tmp_path):
    """Of another model's file transformers would take what fits, and draw the rest."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    transformers.ViTModel(transformers.ViTConfig(intermediate_size=64, **sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="dinov2_tower: folder: wanted the weights of a DINOv2, got .*vit"):
        dinov2_tower(tmp_path / "vit", blocks=(0, 1))
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in dinov2_tower(tmp_path / "half", blocks=(0, 1)).parameters()} == {torch.float32}
    (tmp_path / "half" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="dinov2_tower: folder: wanted the weights of a DINOv2, got .*half"):
        dinov2_tower(tmp_path / "half", blocks=(0, 1))


# Augmentation and blur


def test_colour_is_brightness_saturation_contrast():
    x = double(400, 3, 4, 5)
    y = diffaug(x, ("colour",), generator=torch.Generator().manual_seed(0))
    mean = x.mean((1, 2, 3), keepdim=True)
    brightness = y.mean((1, 2, 3), keepdim=True) - mean
    grey, grey_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    contrast = ((grey_y - grey_y.mean((2, 3), keepdim=True)) * (grey - mean)).sum((1, 2, 3)) / (
        grey - mean
    ).square().sum((1, 2, 3))
    contrast = contrast.view(-1, 1, 1, 1)
    both = ((y - grey_y) * (x - grey)).sum((1, 2, 3)) / (x - grey).square().sum((1, 2, 3))
    saturation = both.view(-1, 1, 1, 1) / contrast
    rebuilt = mean + brightness + contrast * (grey - mean + saturation * (x - grey))
    assert_near(y, rebuilt, 1e-12)
    for draws, low, high in ((brightness, -0.5, 0.5), (saturation, 0, 2), (contrast, 0.5, 1.5)):
        assert low <= draws.min() < low + 0.03 * (high - low) and high - 0.03 * (high - low) < draws.max() <= high
        assert abs(float(draws.mean()) - (low + high) / 2) < 0.1 * (high - low)
    assert abs(float(torch.corrcoef(torch.cat([saturation, contrast], 1).flatten(1).T)[0, 1])) < 0.15


def test_translation_moves_whole_pictures():
    x = double(300, 3, 16, 24) + 10
    y = diffaug(x, ("translation",), generator=torch.Generator().manual_seed(0))
    moves = set()
    for before, after in zip(x, y):
        seen = (after[0] != 0).nonzero()
        (top, left), (bottom, right) = seen.amin(0).tolist(), seen.amax(0).tolist()
        down = top if top else bottom - 15
        across = left if left else right - 23
        expected = torch.zeros_like(before)
        rows, columns = slice(max(down, 0), 16 + min(down, 0)), slice(max(across, 0), 24 + min(across, 0))
        sources = slice(max(-down, 0), 16 - max(down, 0)), slice(max(-across, 0), 24 - max(across, 0))
        expected[:, rows, columns] = before[:, sources[0], sources[1]]
        assert torch.equal(after, expected)
        moves.add((down, across))
    assert {d for d, _ in moves} == set(range(-2, 3)) and {a for _, a in moves} == set(range(-3, 4))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_cutout_is_one_rectangle_that_reaches_every_pixel(share):
    x = double(600, 3, 10, 15) + 10
    y = diffaug(x, ("cutout",), cutout=share, generator=torch.Generator().manual_seed(0))
    holes = y[:, 0] == 0
    assert torch.equal(y, torch.where(holes[:, None], 0, x))
    height, width = int(10 * share + 0.5), int(15 * share + 0.5)
    sizes = set()
    for hole in holes:
        cells = hole.nonzero()
        if not len(cells):
            continue
        low, high = cells.amin(0).tolist(), cells.amax(0).tolist()
        size = (high[0] - low[0] + 1, high[1] - low[1] + 1)
        assert size[0] * size[1] == len(cells)
        # Only a border makes a hole smaller.
        assert size[0] == height or low[0] == 0 or high[0] == 9
        assert size[1] == width or low[1] == 0 or high[1] == 14
        sizes.add(size)
    assert (height, width) in sizes and holes.any(0).all() and not holes.all(0).any()


def test_augmentation_repeats_and_passes_gradients():
    (x,) = leaves(double(2, 3, 8, 8))
    torch.manual_seed(5)
    first = diffaug(x)
    torch.manual_seed(5)
    assert torch.equal(first, diffaug(x)) and not torch.equal(first, diffaug(x))
    assert torch.autograd.gradcheck(lambda v: diffaug(v, generator=torch.Generator().manual_seed(1)), (x,))
    assert torch.equal(diffaug(x, ()), x) and torch.equal(diffaug(x, ("cutout",), cutout=0.0), x)
    assert diffaug(x[:0]).shape == (0, 3, 8, 8)
    one = double(1, 3, 8, 8)
    assert not torch.equal(*diffaug(one.expand(2, -1, -1, -1), ("colour",))), "each picture draws for itself"


@pytest.mark.parametrize("sigma", [0.4, 1.3])
def test_blur_is_a_gaussian_with_repeated_borders(sigma):
    (x,) = leaves(double(1, 3, 5, 4))
    radius = -int(-3 * sigma // 1)
    steps = range(-radius, radius + 1)
    kernel = {(i, j): torch.tensor(-(i * i + j * j) / (2 * sigma**2)).double().exp() for i in steps for j in steps}
    total = sum(kernel.values())
    expected = torch.stack([
        torch.stack([
            sum(k * x[..., min(max(r + i, 0), 4), min(max(c + j, 0), 3)] for (i, j), k in kernel.items()) / total
            for c in range(4)
        ], dim=-1)
        for r in range(5)
    ], dim=-2)  # fmt: skip
    actual = gaussian_blur(x, sigma)
    assert_near(actual, expected, 1e-6)
    assert_near(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (actual, expected)), 1e-6)
    assert gaussian_blur(x, 0.0) is x and gaussian_blur(x[:0], 2.0).shape == (0, 3, 5, 4)
    assert_near(gaussian_blur(torch.ones(1, 3, 6, 6), 2.0), torch.ones(1, 3, 6, 6), 1e-6)


def test_bad_arguments_are_sentences():
    x, tower = torch.zeros(2, 3, 28, 28), TinyTower()
    assert_sentence(ValueError, "PatchGAN", "n_layers", PatchGAN, 0)
    assert_sentence(ValueError, "PatchGAN", "base", PatchGAN, 3, 0)
    assert_sentence(ValueError, "PatchGAN", "base", PatchGAN, 3, 24, norm="group")
    assert_sentence(ValueError, "PatchGAN", "norm", PatchGAN, norm="actnorm")
    assert_sentence(ValueError, "PatchGAN", "images", PatchGAN(base=8), x[..., :23])
    assert PatchGAN(base=8)(x[..., :24]).shape == (2, 1, 1, 1)
    assert_sentence(ValueError, "DinoDiscriminator", "width", DinoDiscriminator, tower, width=48)
    assert_sentence(ValueError, "DinoDiscriminator", "side", DinoDiscriminator, tower, side=13)
    assert_sentence(ValueError, "DinoDiscriminator", "levels", DinoDiscriminator, tower, levels=0)
    assert_sentence(ValueError, "DinoDiscriminator", "crop", DinoDiscriminator, tower, crop=1.5)
    model = DinoDiscriminator(tower, width=32, levels=2)
    assert_sentence(ValueError, "DinoDiscriminator", "images", model, x[..., :13])
    assert_sentence(TypeError, "DinoDiscriminator", "images", model, x.byte())
    assert_sentence(ValueError, "DinoDiscriminator", "tower", DinoDiscriminator(tower, width=32, levels=3), x)
    assert_sentence(ValueError, "DinoDiscriminator", "tower", DinoDiscriminator(tower, width=64, levels=2), x)
    assert_sentence(ValueError, "diffaug", "policy", diffaug, x, ("color",))
    assert_sentence(ValueError, "diffaug", "cutout", diffaug, x, cutout=1.5)
    assert_sentence(ValueError, "diffaug", "images", diffaug, x[0])
    assert_sentence(ValueError, "gaussian_blur", "sigma", gaussian_blur, x, -1.0)
