"""Usage counters of the compatible quantizers on two ranks: clean ones add the ranks up, quirks do what the originals do."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness import assert_near, normal

from tokenflow_ext.compat.tokenflow import VectorQuantizer
from tokenflow_ext.compat.unitok import VectorQuantizerM
from tokenflow_ext.compat.var import VectorQuantizer2

WORLD, CODES = 2, 16
STEPS = {"tokenflow": 8, "unitok": 8, "var": 36}  # of which VAR's are more than 100 scales
SCALES = (1, 2, 4)


def build(kind: str, quirks: bool):
    torch.manual_seed(0)
    options = {"quirks": quirks, "backend": "native"}
    if kind == "tokenflow":
        return VectorQuantizer(CODES, 5, 0.25, 0.0, True, True, [3, 2], **options)
    if kind == "unitok":
        return VectorQuantizerM(2 * CODES, 6, num_codebooks=2, **options)
    return VectorQuantizer2(CODES, 6, False, v_patch_nums=SCALES, **options)


def batch(kind: str, rank: int, step: int) -> torch.Tensor:
    rows = 0 if (rank, step) == (1, 5) else 2  # a rank without rows
    seed = 100 * rank + step
    return {"tokenflow": normal(rows, 5, 2, 2, seed=seed), "unitok": normal(rows, 4, 6, seed=seed)}.get(
        kind, normal(rows, 6, 4, 4, seed=seed)
    )


def call(kind: str, quantizer, x):
    """The usage that a call returns: one number, or one a scale."""
    if kind == "tokenflow":
        return float(quantizer(x)[1][3])
    return float(quantizer(x)[3]) if kind == "unitok" else quantizer(x, ret_usages=True)[1]


def counter(quantizer) -> torch.Tensor:
    names = ("codebook_used", "vocab_usage", "ema_vocab_hit_SV")
    return torch.cat([b.flatten() for n, b in quantizer.named_buffers() if n.endswith(names)])


def train(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    saved = {}
    for kind in ("tokenflow", "unitok", "var"):
        for quirks in (False, True):
            quantizer = build(kind, quirks)
            usages = [call(kind, quantizer, batch(kind, rank, step)) for step in range(STEPS[kind])]
            saved[f"{kind}, {quirks}"] = (usages, counter(quantizer))
            quantizer.eval()
            call(kind, quantizer, batch(kind, rank, 0))
            saved[f"{kind}, {quirks}, eval"] = counter(quantizer)
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def whole(kind: str, step: int) -> torch.Tensor:
    return torch.cat([batch(kind, rank, step) for rank in range(WORLD)])


def one_process(kind: str):
    """What a clean counter says of the whole batches."""
    quantizer = build(kind, False)
    return [call(kind, quantizer, whole(kind, step)) for step in range(STEPS[kind])], counter(quantizer)


def test_counters(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for kind in ("tokenflow", "unitok", "var"):
        expected, buffer = one_process(kind)
        for saved in ranks:
            usages, mine = saved[f"{kind}, False"]
            assert_near(torch.tensor(usages), torch.tensor(expected), 1e-5, kind)
            if kind != "tokenflow":  # whose window holds the ids of its own rank
                assert_near(mine, buffer, 1e-5, kind)
            assert torch.equal(saved[f"{kind}, False, eval"], mine), "eval moves nothing"

    for rank, saved in enumerate(ranks):
        # TokenFlow: its own rank's window of zeros, no collective.
        usages, _ = saved["tokenflow, True"]
        alone, seen = build("tokenflow", True), {0}
        for step in range(STEPS["tokenflow"]):
            seen |= set(alone(batch("tokenflow", rank, step))[2][2].tolist())
            assert abs(usages[step] - len(seen) / CODES) < 1e-6
        # UniTok: the batch of all ranks, and eval moves the buffer by the rank's own.
        usages, mine = saved["unitok, True"]
        alone = build("unitok", True)
        for step in range(STEPS["unitok"]):
            assert abs(usages[step] - call("unitok", alone, whole("unitok", step))) < 1e-3
        assert_near(mine, counter(alone), 1e-5)
        alone(batch("unitok", rank, 0))
        assert_near(saved["unitok, True, eval"], counter(alone), 1e-5)

    # VAR: the switch comes after 100 scales in place of 100 steps, and only scale 0 of step 0 is copied.
    quantizer, hits, number = build("var", False).eval(), torch.zeros(len(SCALES), CODES), 0
    for step in range(STEPS["var"]):
        f = whole("var", step)
        ids = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
        for s, i in enumerate(ids):
            rate = 1.0 if number == 0 else 0.1 if number < 100 else 0.01
            hits[s] += rate * (torch.bincount(i.flatten(), minlength=CODES) - hits[s])
            number += 1
    for saved in ranks:
        usages, mine = saved["var, True"]
        assert_near(mine, hits.flatten(), 1e-5)
        threshold = WORLD * (2 * 16) / CODES * 0.08  # the finest scale's, for every scale
        assert usages[-1] == (100 * (hits >= threshold).float().mean(-1)).tolist()
        assert torch.equal(saved["var, True, eval"], mine)
