"""Problems for the kernels from PTX alone: wider ones than ThreadSanitizer has time for, and the models' own widths."""

import torch
from harness import METRICS, normal
from multiscale_cases import MODES, decoding
from replay.problems import gradients, rows, table

from emulator.problems import FLOATS
from tokenflow_ext import ops


def wide() -> None:
    """What takes kernels through loops that compilers unroll: wide rows, maps that shrink and grow many times."""
    for i, dtype in enumerate(FLOATS):
        x, ids = rows(77, 140, seed=30, dtype=dtype), torch.arange(77) % 3
        gradients([ops.normalize_rows(x.requires_grad_())], [x], seed=31)
        counts, sums = ops.code_statistics(x.detach(), ids, 64)
        for mean in (False, True):
            state = table(64, 140, seed=32), torch.ones(64), sums.nan_to_num().clone()
            ops.ema_update_(*state, counts, sums, decay=0.9, metric=METRICS[i], normalize_mean=mean)
        codebook = table(61, 140, seed=33, dtype=dtype).requires_grad_()
        gradients([ops.lookup(ids, codebook)], [codebook], seed=34)
        codes = table(3, 140, seed=35).requires_grad_()  # each of many rows
        for metric in METRICS:
            gradients(ops.quantize(x, codes, metric=metric), [x, codes], seed=36)
        ops.nearest_code(x.detach(), table(300, 140, seed=37), topk=20, return_scores=True)
    for mode in ("weighted cosine", "accumulated", "phi"):
        features, scales = normal(2, 40, 24, 26, seed=38), [(1, 1), (2, 3), (7, 5), (13, 26), (24, 26)]
        codebooks, options = [normal(37, w, seed=39) for w in (25, 15)], {"scales": scales, **MODES[mode]}
        leaves = [t.requires_grad_() for t in (features, *codebooks)]
        if options.pop("phi", False):
            weight, bias = 0.05 * normal(2, 40, 40, 3, 3, seed=40), 0.1 * normal(2, 40, seed=41)
            options["phi"] = weight.requires_grad_(), bias.requires_grad_(), 0.5, [s % 2 for s in range(len(scales))]
            leaves += [weight, bias]
        out = ops.multiscale_quantize(features, codebooks, **options)
        gradients(out, leaves, seed=42)
        ids, how = out.indices, decoding(options, features.shape[2:])
        gradients([ops.multiscale_rows(features, ids, codebooks, **options)], [features], seed=43)
        gradients([ops.multiscale_decode(ids, codebooks, **how)], leaves[1:], seed=44)
        for rule in ("accumulate", "chain") if "phi" not in options else ("accumulate",):
            gradients([ops.multiscale_inputs(ids, codebooks, rule=rule, **how)], leaves[1:], seed=45)


def typical() -> None:
    """Models' widths and scales, few rows: for counting what requests of memory take."""
    x, codebook = normal(1024, 40, seed=50), normal(2048, 40, seed=51)
    x.requires_grad_(), codebook.requires_grad_()
    out = ops.quantize(x, codebook)
    gradients(out, [x, codebook], seed=52)
    gradients([ops.normalize_rows(x)], [x], seed=53)
    gradients(ops.entropy_loss(x[:256], codebook, metric="cosine", temperature=0.3), [x, codebook], seed=65)
    gradients(ops.soft_quantize(x[:256], codebook, codebook), [x, codebook], seed=66)
    counts, sums = ops.code_statistics(x.detach(), out.indices, 2048)
    ops.ema_update_(normal(2048, 40, seed=54), torch.ones(2048), sums.clone(), counts, sums, decay=0.9, metric="cosine")
    gradients([ops.lookup(out.indices, codebook)], [codebook], seed=55)
    ops.nearest_code(normal(64, 40, seed=56), codebook.detach(), topk=2)
    for options, width in (({}, 40), ({"loss_on": "accumulated", "normalize_codes": False}, 32)):
        features, scales = normal(2, width, 16, 16, seed=57), [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
        leaves, options = [features, normal(512, width, seed=58)], {"scales": scales, **options}
        if width == 32:
            weight, bias = 0.05 * normal(4, 32, 32, 3, 3, seed=59), 0.1 * normal(4, 32, seed=60)
            options["phi"] = weight.requires_grad_(), bias.requires_grad_(), 0.5, [s * 4 // 10 for s in range(10)]
            leaves += [weight, bias]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = ops.multiscale_quantize(features, [leaves[1]], **options)
        gradients(out, leaves, seed=61)
        ids, how = out.indices, decoding(options, 16)
        gradients([ops.multiscale_rows(features, ids, [leaves[1]], **options)], [features], seed=62)
        gradients([ops.multiscale_decode(ids, [leaves[1]], **how)], leaves[1:], seed=63)
        rule = "accumulate" if width == 32 else "chain"
        gradients([ops.multiscale_inputs(ids, [leaves[1]], rule=rule, **how)], leaves[1:], seed=64)
