"""Ranks of torch.distributed: shards equal one process on the whole, codebooks keep the same bits, DDP and FSDP2 train.

Every rank runs every scenario once and leaves what it got; the tests compare. In float64 the order of sums is far below every
gap between two distances, so that ids, hits and draws have to be equal, and tables to 1e-10.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import assert_near, normal
from torch import nn

from tokenflow_ext.quantize import MultiScaleQuantizer, SharedIndexQuantizer, VectorQuantizer

STEPS = 50
ALIVE = {"kmeans_init": True, "dead_code_threshold": 0.2, "decay": 0.9, "backend": "native"}
BUILD = {
    "ema": lambda: VectorQuantizer(6, 32, update="ema", **ALIVE),
    "ema l2": lambda: VectorQuantizer(6, 32, update="ema", metric="l2", **ALIVE),
    "shared": lambda: SharedIndexQuantizer((4, 2), 32, update="ema", weights=(1.0, 3.0), **ALIVE),
    "groups": lambda: VectorQuantizer(6, 32, groups=2, update="ema", **ALIVE),
    "gradient": lambda: VectorQuantizer(6, 32, **ALIVE),
    "none": lambda: VectorQuantizer(6, 32, update="none", **ALIVE),
    "scales": lambda: MultiScaleQuantizer(
        VectorQuantizer(6, 32, update="ema", **ALIVE), (1, 2), scale_weights=(2.0, 1.0)
    ),
}
PARTS = {
    "even": lambda step: (0, 1, 2, 3, 4),
    "a rank without rows": lambda step: (0, 2, 2, 2, 4) if step % 3 else (0, 0, 3, 4, 4),
}
"""Quarters at which the ranks' parts of a batch begin and end; two ranks have two each."""


def batch(step: int, maps: bool):
    """One batch of all ranks with padding, NaN and a slow drift that leaves codes behind: x and mask."""
    x = normal(48, 6, 2, 2, seed=step, dtype=torch.float64) if maps else normal(64, 6, seed=step, dtype=torch.float64)
    x = x + 0.05 * step
    mask = torch.rand(len(x), generator=torch.Generator().manual_seed(step)) > 0.2
    x[~mask] = float("inf")
    x[5] = float("nan")
    return x, mask


def own(step: int, size: int, parts: str, rank: int, world: int) -> slice:
    ends = PARTS[parts](step)
    stride = 4 // world
    return slice(ends[rank * stride] * size // 4, ends[(rank + 1) * stride] * size // 4)


def train(name: str, parts: str, rank: int, world: int) -> dict:
    """State after STEPS steps; the gradient rule sums the gradients of sums, as no mean of means equals the whole's."""
    torch.manual_seed(0)
    module = BUILD[name]().double()
    learned = list(module.parameters())
    optimiser = torch.optim.SGD(learned, lr=0.5) if learned else None
    for step in range(STEPS):
        x, mask = batch(step, name == "scales")
        at = own(step, len(x), parts, rank, world)
        loss = module(x[at], mask[at]).loss * mask[at].sum() / mask.sum()
        if learned:
            optimiser.zero_grad()
            loss.backward()
            if world > 1:
                dist.all_reduce(learned[0].grad)
            optimiser.step()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    per = "scale" if name == "scales" else "group"
    numbers = [module.usage(), module.perplexity(), float(module.non_finite_rows())]
    return {**state, "usage": module.usage(per), "perplexity": module.perplexity(per), "numbers": torch.tensor(numbers)}


class Autoencoder(nn.Module):
    def __init__(self, update: str):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 6), nn.Linear(6, 5)
        self.quantizer = VectorQuantizer(6, 32, update=update, **ALIVE)

    def forward(self, x):
        quantized, _, loss = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().sum() / max(len(x), 1) + loss


def fit(model, rank: int, world: int) -> list[float]:
    """Losses of 20 steps; rank 1 has no rows in one of them."""
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for step in range(20):
        x = normal(32, 5, seed=step % 4).chunk(world)[rank]
        optimiser.zero_grad()
        loss = model(x[:0] if (step, rank) == (7, 1) else x)
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    return losses


def ddp(update: str, broadcast_buffers: bool, rank: int, world: int) -> dict:
    torch.manual_seed(rank)
    model = Autoencoder(update)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    losses = fit(wrapped, rank, world)
    hits = model.quantizer.codebook.hits.clone()
    return {
        **model.state_dict(),
        "losses": torch.tensor(losses),
        "hits": hits,
        "usage": torch.tensor(model.quantizer.usage()),
    }


def fsdp(update: str, ignored: bool, rank: int, world: int) -> dict:
    """Codebooks of parameters are left out of the sharding where k-means or revival write to them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Autoencoder(update)
    codebooks = set(model.quantizer.parameters()) if ignored else set()
    if not ignored and update == "gradient":
        model.quantizer = VectorQuantizer(6, 32)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=codebooks)

    def average(parameter):
        dist.all_reduce(parameter.grad)
        parameter.grad /= world

    for parameter in codebooks:
        parameter.register_post_accumulate_grad_hook(average)
    losses = fit(model, rank, world)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    return {
        **state,
        "losses": torch.tensor(losses),
        "sharded": torch.tensor(hasattr(model.encoder.weight, "full_tensor")),
    }


TRAINED = [(name, parts) for name in BUILD for parts in PARTS]
DDP = [(update, broadcast) for update in ("gradient", "ema", "none") for broadcast in (True, False)]
FSDP = [("ema", False), ("gradient", True), ("gradient", False)]


def runs(key: tuple, world: int) -> bool:
    """Four ranks on two cores wait for each other: they leave out the easy half."""
    return world == 2 or key[1] not in ("even", False)


def everything(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {key: train(*key, rank, world) for key in TRAINED if runs(key, world)}
    results.update({("ddp", *key): ddp(*key, rank, world) for key in DDP if runs(key, world)})
    if world == 2:
        results.update({("fsdp", *key): fsdp(*key, rank, world) for key in FSDP})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank got, rank 0 first."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(everything, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def whole():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: train(name, "even", 0, 1) for name in BUILD}


@pytest.mark.parametrize("name, parts", TRAINED)
def test_shards_equal_the_whole(ranks, whole, name, parts):
    """Tables, averages, usage: k-means, revival, padding, NaN and ranks without rows included."""
    if not runs((name, parts), len(ranks)):
        pytest.skip("run on two ranks")
    first, expected = ranks[0][name, parts], whole[name]
    for key, value in expected.items():
        for other in ranks[1:]:
            assert torch.equal(other[name, parts][key], first[key]), f"{key} differs between ranks"
        assert value.isfinite().all(), key
        if name == "none" or not value.is_floating_point() or key in ("numbers", "usage", "perplexity"):
            assert torch.equal(first[key], value), key
        else:
            assert_near(first[key], value, 1e-10, key)
    revivals = [value for key, value in expected.items() if key.endswith("revivals")]
    assert name == "none" or int(revivals[0]) == STEPS
    assert expected["numbers"][2] > 0, "the NaN rows were counted"


@pytest.mark.parametrize("update, broadcast_buffers", DDP)
def test_ddp_trains(ranks, update, broadcast_buffers):
    if not runs((update, broadcast_buffers), len(ranks)):
        pytest.skip("run on two ranks")
    results = [rank["ddp", update, broadcast_buffers] for rank in ranks]
    for key in results[0].keys() - {"losses", "hits"}:
        for other in results[1:]:
            assert torch.equal(other[key], results[0][key]), key
    for result in results:
        assert result["losses"].isfinite().all() and result["losses"][-4:].mean() < 0.7 * result["losses"][:4].mean()
    hits = sum(result["hits"] for result in results)
    assert hits.sum() == 20 * 32 - 32 // len(ranks), "every rank keeps its own count"
    assert results[0]["usage"] == (hits > 0).double().mean().float()


@pytest.mark.parametrize("update, ignored", FSDP)
def test_fsdp_trains(ranks, update, ignored):
    if len(ranks) != 2:
        pytest.skip("run on two ranks")
    results = [rank["fsdp", update, ignored] for rank in ranks]
    assert all(result["sharded"] for result in results)
    for key in results[0].keys() - {"losses"}:
        assert torch.equal(results[1][key], results[0][key]), key
        assert results[0][key].isfinite().all(), key
    for result in results:
        assert result["losses"][-4:].mean() < 0.7 * result["losses"][:4].mean()
