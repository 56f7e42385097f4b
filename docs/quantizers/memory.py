"""Peak memory of a training step of every quantizer: `python docs/quantizers/memory.py` prints the table of index.md.

Forward and backward of 16384 rows of 16 channels on K = 16384 codes, above what the same step with 16 rows has taken; each
quantizer in a process of its own. An N x K matrix of float32 alone would be 1074 MB.
"""

import resource
import subprocess
import sys

import torch

from tokenflow_ext import quantize as q

ROWS, CODES, DIM = 16384, 16384, 16
SCALES = (1, 2, 4, 8, 16)


def prefixes():
    return [q.PrefixMultiScaleQuantizer(q.VectorQuantizer(8, CODES), SCALES, dropped=0.5) for _ in range(2)]


KINDS = {
    "VectorQuantizer": lambda: q.VectorQuantizer(DIM, CODES),
    'VectorQuantizer(update="ema")': lambda: q.VectorQuantizer(DIM, CODES, update="ema"),
    "VectorQuantizer(groups=4)": lambda: q.VectorQuantizer(DIM, CODES, groups=4),
    "SharedIndexQuantizer((12, 4))": lambda: q.SharedIndexQuantizer((12, 4), CODES),
    "MultiScaleQuantizer, 5 scales": lambda: q.MultiScaleQuantizer(q.VectorQuantizer(DIM, CODES), SCALES),
    "ProductQuantizer of 2": lambda: q.ProductQuantizer([q.VectorQuantizer(8, CODES) for _ in range(2)]),
    "ProductQuantizer of 2 prefixes": lambda: q.ProductQuantizer(prefixes()),
    "IndexPropagationQuantizer": lambda: q.IndexPropagationQuantizer(DIM, CODES),
    "AttentionQuantizer": lambda: q.AttentionQuantizer(DIM, CODES),
    "SoftMultiScaleQuantizer, 5 scales": lambda: q.SoftMultiScaleQuantizer(q.AttentionQuantizer(DIM, CODES), SCALES),
    "ProjectedQuantizer": lambda: q.ProjectedQuantizer(torch.randn(CODES, 64), DIM),
    "SignQuantizer": lambda: q.SignQuantizer(DIM),
    "ResidualQuantizer, depth 4": lambda: q.ResidualQuantizer(DIM, CODES, 4),
}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> float:
    """Bytes that ROWS rows take above 16, or above one map where there are scales."""
    torch.set_num_threads(2)
    quantizer = KINDS[name]()
    maps = any("scales" in vars(m) for m in quantizer.modules())
    for rows in (256 if maps else 16, ROWS):
        x = torch.randn(rows // 256, DIM, 16, 16) if maps else torch.randn(rows, DIM)
        before = peak()
        x.requires_grad_()
        quantized, _, loss = quantizer(x)
        (quantized.square().mean() + loss).backward()
        quantizer.zero_grad()
    return peak() - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(sys.argv[1]))
    else:
        for name in KINDS:
            done = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True)
            print(f"| `{name}` | {float(done.stdout) / 1e6:.1f} MB |", flush=True)
