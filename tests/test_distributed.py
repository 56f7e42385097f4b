"""Ranks of torch.distributed keep one codebook: EMA, k-means and revival, with a rank that has no rows in one step."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tokenflow_ext.quantize import SharedIndexQuantizer

WORLD = 2


def train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    options = {"update": "ema", "decay": 0.9, "dead_code_threshold": 0.05, "kmeans_init": True}
    quantizer = SharedIndexQuantizer((6, 4), 64, **options)
    torch.manual_seed(1 + rank)
    for step in range(12):
        quantizer(torch.randn(0 if (step, rank) == (7, 1) else 32, 10))
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_bit_for_bit(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].isfinite().all(), name
