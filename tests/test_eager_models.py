"""What the models' speed is measured against computes the same: the transcriptions in benchmarks/ at small sizes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenflow.models import TokenFlow, UniTok
from tokenflow.models.semantic import Tower
from tokenflow.models.tokenflow import PUBLISHED
from tokenflow.models.unitok import Config

SMALL = replace(
    PUBLISHED,
    image_size=64,
    scales=(1, 2, 4),
    codebook_size=64,
    widths=(32, 32, 64, 64, 64),
    decoder_widths=(32, 32, 64, 64, 64),
    latent=32,
    decoder_heads=4,
    tower=Tower("clip", width=32, depth=2, heads=4, hidden=64, patch=16, grid=4),
)
UNITOK = Config(
    image_size=64, widths=(8, 16), dim=32, depth=2, heads=2, groups=2, codebook_size=16, code_dim=8, projection_heads=4,
    embed_dim=24, text_width=16, text_heads=2, text_depth=1, vocabulary=99,
)  # fmt: skip


@pytest.fixture(scope="module")
def eager():
    """The modules of benchmarks/ that hold the transcriptions."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    ours = sys.modules.pop("harness", None)  # benchmarks/ and tests/ have a module of that name each
    sys.path.insert(0, folder)
    try:
        import bench_models
        import eager_models
        import eager_tiny
    finally:
        sys.path.remove(folder)
        sys.modules.pop("harness", None)
        if ours is not None:
            sys.modules["harness"] = ours
    return bench_models, eager_models, eager_tiny


@torch.inference_mode()
def test_tokenflow_b_in_small(eager):
    torch.manual_seed(0)
    model, x = TokenFlow(SMALL).eval(), torch.rand(3, 3, 64, 64) * 2 - 1
    twin = eager[1].TokenFlow(model)
    torch.testing.assert_close(twin.encode_features(x), model.encode_features(x), atol=1e-5, rtol=0)
    ids = model.encode(x)
    assert torch.equal(twin.encode(x), ids)
    torch.testing.assert_close(twin.decode(ids), model.decode(ids), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_unitok_in_small(eager):
    torch.manual_seed(0)
    model, x = UniTok(UNITOK).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    twin = eager[1].UniTokEncoder(model)
    features = model.encode_features(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(twin.encode_features(x), features, atol=1e-5, rtol=0)
    assert torch.equal(twin.encode(x), model.encode(x))


def test_a_training_step_of_tokenflow_tiny(eager):
    """The benchmark's own check: loss, ids, pictures, moved codebooks and every gradient."""
    problem = eager[0].training("tokenflow-tiny", 2)
    results = {}
    for provider, call in problem.calls.items():
        call.prepare()
        results[provider] = call()
    problem.check(results)
    moved, other = (results[p][3][0] for p in results)
    assert not torch.equal(moved, eager[0].tokenizer("tokenflow-tiny").quantizer.codebooks()[0])
    ids, other_ids = (results[p][0] for p in results)
    assert torch.equal(ids, other_ids)
    torch.testing.assert_close(moved, other, atol=1e-5, rtol=0)
