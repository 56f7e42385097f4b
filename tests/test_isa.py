"""Every instruction set gives the same bits: ids, scores, values, losses and gradients, in processes of their own."""

import platform
import subprocess

import pytest
import torch
from harness import python

import tokenflow_ext

SETS = ("baseline", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("neon",)

# Prints one hash a result, of all its bits; small, since the baseline has no vector unit for fused multiply-adds.
SCRIPT = """
import hashlib, sys, warnings
import torch
from tokenflow_ext import build_info, ops
warnings.simplefilter("ignore")
print(build_info()["instruction_set"])

def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def show(name, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    print(name, digest.hexdigest())

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for metric in ("cosine", "l2", "dot"):
        x, codebook = normal(67, 2, 9, seed=1, dtype=dtype), normal(2, 171, 9, seed=2)
        x[5, 0, 3] = float("nan")
        show(f"nearest_code {dtype} {metric}", *ops.nearest_code(x, codebook, metric=metric, return_scores=True))
        show(f"topk {dtype} {metric}", *ops.nearest_code(x, codebook, metric=metric, topk=9, window=(3, 170), return_scores=True))
        x.requires_grad_(), codebook.requires_grad_()
        out = ops.quantize(x, codebook, metric=metric)
        show(f"quantize {dtype} {metric}", *out)
        upstream = normal(67, 2, 9, seed=3, dtype=dtype)
        show(f"its gradients {dtype} {metric}", *torch.autograd.grad((out.quantized, out.loss), (x, codebook), (upstream, out.loss * 2)))
    xs = [normal(70, w, seed=4 + w, dtype=dtype).requires_grad_() for w in (6, 3)]
    tables = [normal(99, w, seed=8 + w).requires_grad_() for w in (6, 3)]
    out = ops.shared_quantize(xs, tables, weights=(1, 0.3))
    show(f"shared_quantize {dtype}", *out.quantized, out.indices, out.loss, *torch.autograd.grad(out.loss, xs + tables))
    features = normal(2, 9, 5, 4, seed=5, dtype=dtype).requires_grad_()
    out = ops.multiscale_quantize(features, tables, scales=((1, 1), (2, 3), (5, 4)), weights=(1, 0.3))
    upstream = normal(2, 9, 5, 4, seed=6, dtype=dtype)
    show(f"multiscale_quantize {dtype}", *out)
    show(f"its gradients {dtype}", *torch.autograd.grad((out.quantized, out.loss), [features] + tables, (upstream, out.loss * 2)))
    codes = [t.detach().to(dtype) for t in tables]
    show(f"multiscale_decode {dtype}", ops.multiscale_decode(out.indices, codes, scales=((1, 1), (2, 3), (5, 4)), size=(5, 4)))
    rows, ids = normal(300, 9, seed=7, dtype=dtype), torch.arange(300) % 7
    counts, sums = ops.code_statistics(rows, ids, 9)
    state = normal(9, 9, seed=9, dtype=sums.dtype), torch.ones(9, dtype=sums.dtype), normal(9, 9, seed=9, dtype=sums.dtype)
    ops.ema_update_(*state, counts, sums, decay=0.9)
    show(f"ema {dtype}", counts, sums, *state)
    show(f"normalize_rows {dtype}", ops.normalize_rows(rows))
"""


def run(isa: str) -> subprocess.CompletedProcess:
    """SCRIPT under TOKENFLOW_ISA=isa, with the package that this process imported."""
    return python(SCRIPT, TOKENFLOW_ISA=isa, OMP_NUM_THREADS="2")


def available() -> list[str]:
    """The instruction sets that were built and that this processor has: all up to the one that runs unforced."""
    built = tokenflow_ext.build_info()["instruction_sets"]
    best = run("").stdout.split("\n")[0]
    return built[: built.index(best) + 1]


def test_every_instruction_set_gives_the_same_bits():
    results = {}
    for isa in available():
        done = run(isa)
        assert done.returncode == 0, done.stderr
        name, *lines = done.stdout.strip().split("\n")
        assert name == isa
        results[isa] = dict(line.rsplit(" ", 1) for line in lines)
    print(f"instruction sets compared: {', '.join(results)}")
    assert {len(digests) for digests in results.values()} == {4 * 18}
    for isa, digests in results.items():
        differ = [name for name in digests if digests[name] != results[SETS[0]][name]]
        assert not differ, f"{isa} differs from {SETS[0]} in {differ}"


@pytest.mark.parametrize("wrong", ["sse", "AVX2"])
def test_an_unknown_instruction_set_is_a_sentence(wrong):
    """Whoever names an instruction set wants that one: import stops instead of going on slowly with the reference."""
    done = python("import tokenflow_ext", TOKENFLOW_ISA=wrong)
    assert done.returncode == 1
    names = f"{', '.join(SETS[:-1])}{' or ' * (len(SETS) > 1)}{SETS[-1]}"
    assert done.stderr.strip().split("\n")[-1] == f"ValueError: TOKENFLOW_ISA: wanted {names}, got {wrong}", done.stderr


def test_the_running_set_is_reported():
    info = tokenflow_ext.build_info()
    assert info["instruction_set"] in info["instruction_sets"] and set(info["instruction_sets"]) <= set(SETS)
    assert info["instruction_sets"][0] == SETS[0] and info["threads"] == torch.get_num_threads()
