"""The contrastive loss against logsumexp in float64, and two ranks against one process on the whole, values and gradients."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import assert_near, assert_sentence, leaves, normal
from tokenflow.losses.adversarial import LeCam
from tokenflow.losses.contrastive import LARGEST, LOGIT_SCALE, clamp_logit_scale_, contrastive_loss
from torch import nn

SPLITS = {"even": (0, 4, 8), "uneven": (0, 5, 8), "a rank without rows": (0, 8, 8), "nothing": (0, 0, 0)}


def unit(*shape, seed):
    return nn.functional.normalize(normal(*shape, seed=seed, dtype=torch.float64), dim=-1)


def dense(image, text, scale):
    """The mean over rows of -log softmax, both ways, one pair after the other."""
    n, total = len(image), 0.0
    for a, b in ((image, text), (text, image)):
        for i in range(n):
            scores = torch.stack([scale * (a[i] * b[j]).sum() for j in range(n)])
            total = total + torch.log(torch.exp(scores).sum()) - scores[i]
    return total / (2 * n)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("local_loss", [True, False])
def test_loss_is_its_formula(rows, local_loss):
    inputs = leaves(unit(rows, 5, seed=0), unit(rows, 5, seed=1), torch.tensor(4.0, dtype=torch.float64))
    actual, expected = contrastive_loss(*inputs, local_loss=local_loss), dense(*inputs)
    assert_near(actual, expected, 1e-12, size=1)
    for a, b in zip(*(torch.autograd.grad(v, inputs) for v in (actual, expected))):
        assert_near(a, b, 1e-12, size=1)
    torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, local_loss=local_loss), inputs)


def test_scores_are_computed_in_full():
    image, text = (unit(6, 8, seed=s).bfloat16() for s in (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        actual = contrastive_loss(image, text, 50.0)
    assert actual.dtype == torch.float32
    assert_near(actual, dense(image.double(), text.double(), 50.0), 1e-6)


def test_logit_scale_is_clamped():
    assert math.exp(LOGIT_SCALE) == pytest.approx(1 / 0.07) and math.exp(LARGEST) == pytest.approx(100)
    for value, expected in ((-1.0, 0.0), (2.5, 2.5), (9.0, LARGEST)):
        scale = nn.Parameter(torch.tensor(value))
        clamp_logit_scale_(scale)
        assert float(scale.detach()) == pytest.approx(expected) and scale.requires_grad


def test_bad_arguments_are_sentences():
    x = torch.zeros(2, 4)
    assert_sentence(ValueError, "contrastive_loss", "image", contrastive_loss, x[0], x, 1.0)
    assert_sentence(ValueError, "contrastive_loss", "text", contrastive_loss, x, x[:1], 1.0)
    assert_sentence(TypeError, "contrastive_loss", "text", contrastive_loss, x, x.long(), 1.0)
    assert_sentence(TypeError, "contrastive_loss", "image", contrastive_loss, None, x, 1.0)


class Towers(nn.Module):
    """Two linear towers and a logit scale."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 5), nn.Linear(4, 5)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def forward(self, pictures, captions, local_loss):
        image, text = self.image(pictures), self.text(captions)
        image, text = nn.functional.normalize(image, dim=-1), nn.functional.normalize(text, dim=-1)
        return contrastive_loss(image, text, self.logit_scale.exp(), local_loss=local_loss)


def step(rows: slice, local_loss: bool, world: int) -> dict:
    """Loss and gradients of these rows, averaged over ranks by DDP."""
    torch.manual_seed(0)
    model = Towers().double()
    run = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    pictures, captions = normal(8, 6, dtype=torch.float64), normal(8, 4, seed=1, dtype=torch.float64)
    loss = run(pictures[rows], captions[rows], local_loss)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def averages(rows: slice) -> dict:
    lecam, real = LeCam(decay=0.5).double(), normal(8, seed=2, dtype=torch.float64)
    for _ in range(2):
        lecam(real[rows], 2 * real[rows])
        real = real + 1
    return lecam.state_dict()


def everything(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name, ends in SPLITS.items():
        rows = slice(ends[rank], ends[rank + 1])
        results[name, "lecam"] = averages(rows)
        for local_loss in (True, False):
            results[name, local_loss] = step(rows, local_loss, world)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(everything, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("local_loss", [True, False])
def test_two_ranks_equal_one_process_on_the_whole(ranks, name, local_loss):
    whole = step(slice(0, SPLITS[name][-1]), local_loss, 1)
    got = [rank[name, local_loss] for rank in ranks]
    losses = torch.stack([rank["loss"] for rank in got])
    assert_near(losses.mean(), whole["loss"], 1e-12)
    assert not local_loss or name in ("nothing",) or losses[0] != losses[1]
    assert local_loss or losses[0] == losses[1]
    for key in whole.keys() - {"loss"}:
        assert torch.equal(got[0][key], got[1][key]), key
        assert_near(got[0][key], whole[key], 1e-11, key)
        assert name == "nothing" or whole[key].abs().max() > 1e-4, key


@pytest.mark.parametrize("name", SPLITS)
def test_lecam_averages_all_ranks(ranks, name):
    whole = averages(slice(0, SPLITS[name][-1]))
    for rank in ranks:
        for key, value in whole.items():
            assert_near(rank[name, "lecam"][key], value, 1e-12, key)
