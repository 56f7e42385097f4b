"""A training step of the module: forward, backward to the rows, the codebook's update; against vector-quantize-pytorch.

Both start from the same codebook. With update="ema" both move it by the same exponential average; ours moves the codes
that were hit, the other all of them, so those that were hit are compared, after the first step.
"""

import peers
import pytest
import torch
from harness import Problem, assert_close, assert_same_ids, compare, normal

from tokenflow_ext.quantize import VectorQuantizer

LUCIDRAINS = "vector-quantize-pytorch"
DECAY = 0.8

# rows, codes, width, metric, update
SIZES = {
    "TokenFlow's pixel table, EMA": (4096, 32768, 8, "l2", "ema"),
    "TokenFlow's pixel table, gradient": (4096, 32768, 8, "l2", "gradient"),
    "LlamaGen, EMA": (4096, 16384, 8, "cosine", "ema"),
    "VAR, EMA": (8192, 4096, 32, "l2", "ema"),
}


def problem(name: str) -> Problem:
    """`name` is one of SIZES."""
    rows, codes, width, metric, update = SIZES[name]
    x, codebook = normal(rows, width, seed=1), normal(codes, width, seed=2)
    if metric == "cosine":
        codebook = torch.nn.functional.normalize(codebook, dim=-1)
    upstream = normal(rows, width, seed=3) / rows

    def stepper(module, moving):
        parameters = list(module.parameters())

        def step():
            inputs = x.detach().requires_grad_()
            quantized, indices, loss = module(inputs)
            grads = torch.autograd.grad((quantized, loss), (inputs, *parameters), (upstream, torch.ones_like(loss)))
            return quantized, indices, loss, moving, *grads

        return step

    def ours(backend: str):
        options = dict(metric=metric, update=update, decay=DECAY, commitment_weight=1.0, backend=backend)
        module = VectorQuantizer(width, codes, **options).train()
        state = module.state_dict()
        fresh = {k: codebook.reshape(v.shape) for k, v in state.items() if v.shape[-2:] == codebook.shape}
        module.load_state_dict(state | fresh)
        return stepper(module, module.codebooks()[0].detach())

    def lucidrains():
        learnt = dict(ema_update=False, learnable_codebook=True) if update == "gradient" else dict(decay=DECAY)
        module = peers.lucidrains(codebook, metric, **learnt).train()
        return stepper(module, module._codebook.embed.detach()[0])

    calls = {
        "native": peers.Prepared(lambda: ours("native")),
        "twin": peers.Prepared(lambda: ours("reference")),
        LUCIDRAINS: peers.Prepared(lucidrains),
    }

    def check(results):
        quantized, indices, loss, moved, grad, *grad_codes = results["native"]
        for rival, (q, ids, other_loss, m, g, *g_codes) in results.items():
            equal = assert_same_ids(indices, ids, [x], [codebook], metric)
            assert_close(quantized[equal], q[equal])
            # Ours is the sum of both terms of the loss, of which the other reports one.
            assert_close(loss, other_loss * (2 if rival == LUCIDRAINS and grad_codes else 1))
            assert_close(grad[equal], g[equal])
            hit = torch.zeros(codes, dtype=torch.bool).index_fill_(0, indices, True)
            hit[torch.cat([indices[~equal], ids[~equal]])] = False
            assert_close(moved[hit], m[hit])
            for ours, theirs in zip(grad_codes, g_codes):
                assert_close(ours[hit], theirs.reshape(ours.shape)[hit])

    return Problem("training step", f"{name}: N {rows}, K {codes}, D {width}, {metric}", calls, check)


@pytest.mark.parametrize("name", SIZES)
def bench_training_step(benchmark, name):
    compare(benchmark, "bench_training_step", name)
