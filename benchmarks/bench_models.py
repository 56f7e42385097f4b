"""Whole models against an eager transcription, layer by layer, of their papers: encode, reconstruct, a training step.

Both have the same random weights. First the outputs: features and pictures within float32 rounding, ids equal or certified
near-ties of the same features (one near-tie changes all finer scales of its picture, so others are compared picture by picture).
The allocator is the system's, as users have it: glibc returns large maps, and a call pays for their pages again in either. `KEPT=1` in
the environment keeps freed memory in both, which shows the arithmetic alone (docs/speed.md has both).
"""

import os
from dataclasses import replace

import peers
import pytest
import torch
import torch.nn.functional as F
from harness import Problem, assert_close, assert_same_ids, compare, normal

from tokenflow_ext import ops

EAGER = "eager transcription"
KEPT = os.environ.get("KEPT") == "1"
STEP = {"lr": 1.5e-3, "betas": (0.9, 0.99), "weight_decay": 0.01}


def images_of(batch: int, side: int) -> torch.Tensor:
    """Smooth random pictures [B, 3, side, side] in [-1, 1]."""
    return F.interpolate(normal(batch, 3, side // 8, side // 8, seed=5), (side, side), mode="bicubic").clamp(-1, 1)


def tokenizer(preset: str, **changes):
    """A preset's model with weights of a fixed seed."""
    from tokenflow.models import Tokenizer

    torch.manual_seed(0)
    if not changes:
        return Tokenizer.from_preset(preset).eval()
    kind = next(k for k in Tokenizer.kinds().values() if preset in k.presets)
    return kind(replace(kind.presets[preset], **changes)).eval()


def eager(preset: str, model):
    """The transcription with the weights of a model."""
    import eager_models

    return (eager_models.UniTokEncoder if preset.startswith("unitok") else eager_models.TokenFlow)(model)


def keeping(model):
    """A list that always holds the last features that the model computed on its way to ids."""
    kept, compute = [None], model.encode_features

    def encode_features(images):
        kept[0] = compute(images)
        return kept[0]

    model.encode_features = encode_features
    return kept


def coder(preset: str, side: int, batch: int, method: str) -> Problem:
    """A tokenizer's method "encode" or "reconstruct" of a batch: features, ids and what it returned."""
    images = images_of(batch, side)

    def call(model):
        features, ids = keeping(model), [None]
        if method == "reconstruct":
            encode = model.encode

            def remembered(images):
                ids[0] = encode(images)
                return ids[0]

            model.encode = remembered

        def run():
            out = getattr(model, method)(images)
            return features[0], ids[0] if method == "reconstruct" else out, out

        return run

    calls = {
        "native": peers.Prepared(lambda: call(tokenizer(preset))),
        EAGER: peers.Prepared(lambda: call(eager(preset, tokenizer(preset)))),
    }

    def check(results):
        (features, ids, out), (other_features, other_ids, other_out) = results["native"], results[EAGER]
        model = tokenizer(preset)
        tables = [t.detach() for t in model.quantizer.codebooks()]
        if preset.startswith("unitok"):
            features = features.flatten(2).transpose(1, 2)
            groups = zip(
                *(x.reshape(-1, x.shape[-1]).chunk(model.config.groups, -1) for x in (features, other_features))
            )
            for g, (_, rows) in enumerate(groups):
                exact = ops.nearest_code(rows, tables[0][g], metric="cosine")
                assert_same_ids(exact, other_ids[:, g].flatten(), [rows], [tables[0][g]], "cosine")
        else:
            q = model.quantizer
            rows = ops.multiscale_rows(other_features, other_ids, tables, scales=q.scales, metric="cosine")
            flat = [r.reshape(-1, r.shape[-1]) for r in rows.split([t.shape[1] for t in tables], -1)]
            exact = ops.shared_nearest_code(flat, tables, metric="cosine", weights=q.quantizer.weights)
            assert_same_ids(exact, other_ids.flatten(), flat, tables, "cosine", q.quantizer.weights)
        assert_close(features, other_features)
        same = (ids == other_ids).flatten(1).all(1)
        print(
            f"  {int((ids != other_ids).sum())} of {ids.numel()} ids differ, {int(same.sum())} of {len(same)} pictures have none"
        )
        assert same.any()
        if method == "reconstruct":
            assert_close(out[same], other_out[same], 1e-3)

    return Problem(f"model: {method}", f"{preset} at {side}, batch {batch}", calls, check, keeps_memory=KEPT)


def training(preset: str, batch: int) -> Problem:
    """Forward, backward and optimiser, in float32, codebooks by moving averages; what random draws decide is off."""
    model_of = lambda: tokenizer(preset, scale_dropout=0.0, dead_code_threshold=0.0)  # noqa: E731
    images, target = images_of(batch, 64), normal(batch, 128, 8, 8, seed=6)

    def stepper(model, optimizer, tables):
        def step():
            pictures, semantic, ids, commitment = model(images)
            difference = pictures - images
            semantic = 1 - F.cosine_similarity(semantic, target, dim=1).mean()
            loss = difference.abs().mean() + difference.square().mean() + 0.5 * semantic + commitment
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return ids, pictures, loss, tables(), {name: p.grad for name, p in model.named_parameters()}

        return step

    def native():
        model = model_of().train().to(memory_format=torch.channels_last)
        return stepper(model, torch.optim.AdamW(model.parameters(), fused=True, **STEP), model.quantizer.codebooks)

    def transcription():
        from eager_tiny import Tiny

        model = Tiny(model_of())
        return stepper(model, torch.optim.AdamW(model.parameters(), **STEP), lambda: model.tables)

    calls = {"native": peers.Prepared(native), EAGER: peers.Prepared(transcription)}

    def check(results):
        (ids, pictures, loss, tables, grads), (other_ids, others, other_loss, other_tables, other_grads) = (
            results.values()
        )
        assert_close(loss, other_loss)
        same = (ids == other_ids).all(1)
        print(
            f"  {int((ids != other_ids).sum())} of {ids.numel()} ids differ, {int(same.sum())} of {len(same)} pictures have none"
        )
        assert same.float().mean() > 0.5
        assert_close(pictures[same], others[same])
        if same.all():
            for table, other in zip(tables, other_tables):
                assert_close(table, other)
            for name, grad in other_grads.items():
                assert_close(grads[name], grad, 1e-3)

    return Problem("model: training step", f"{preset}, batch {batch}, float32", calls, check, keeps_memory=KEPT)


PROBLEMS = {
    "tokenflow-b, encode, batch 1": lambda: coder("tokenflow-b", 224, 1, "encode"),
    "tokenflow-b, encode, batch 4": lambda: coder("tokenflow-b", 224, 4, "encode"),
    "tokenflow-b, reconstruct": lambda: coder("tokenflow-b", 224, 1, "reconstruct"),
    "tokenflow-tiny, training step": lambda: training("tokenflow-tiny", 16),
    "unitok-l, encode": lambda: coder("unitok-l", 256, 1, "encode"),
}


def problem(name: str) -> Problem:
    """One of PROBLEMS."""
    return PROBLEMS[name]()


@pytest.mark.parametrize("name", PROBLEMS)
def bench_models(benchmark, name):
    compare(benchmark, "bench_models", name)
