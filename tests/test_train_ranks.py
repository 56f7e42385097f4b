"""Training on two gloo ranks: the run of one process up to rounding, equal weights on both, and exact going on."""

import pytest
import torch
from safetensors.torch import load_file
from tokenflow.errors import Missing
from tokenflow.training import sharding
from tokenflow.training.engine import train
from training_runs import curve, fork_server, on_ranks, pictures, small, vocabulary


@pytest.fixture(scope="module")
def forks():
    with fork_server() as context:
        yield context


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", captions=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal_ranks(ranks):
    first, other = ranks
    assert first.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


def assert_near(lines, others, tolerance):
    assert len(lines) == len(others)
    for a, b in zip(lines, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


@pytest.mark.parametrize("preset", ["tokenflow-tiny", "unitok-b"])
def test_two_ranks_are_one_process(preset, data, tmp_path, forks):
    """EMA codebooks with revival, gradients, negatives of the other rank, a discriminator whose pictures are apart.

    What is drawn for a rank is left out: scale dropout, drop path, augmentation. So is the adaptive weight, which each rank has
    its own of.
    """
    extra = {"model": ("scale_dropout=0.0",)} if preset.startswith("tokenflow") else {}
    if preset == "unitok-b":
        extra = {"words": vocabulary(tmp_path / "tokenizer.json"), "model": ("drop_path=0.0",), "checkpointing": True}
    changes = dict(
        steps=5, batch=8, adversarial=0.1, adversarial_from=2, adaptive=None, augment=False, consistency=0.0, lecam=0.1
    )
    whole = small(preset, data, tmp_path / "whole", **changes, **extra)
    train(whole)
    parted = small(preset, data, tmp_path / "parted", **changes, **extra)
    assert_equal_ranks(on_ranks(forks, parted))
    assert_near(curve(parted.out), curve(whole.out), 2e-3)


def test_told_to_stop_one_rank_stops_both_and_both_go_on(data, tmp_path, forks):
    """Everything random is on; the curve is that of an undisturbed run on two ranks, bit for bit."""
    changes = dict(
        adversarial=0.5, adversarial_from=1, augment=True, consistency=1.0, crop="random", batch=8, lecam=0.1
    )
    whole = small("tokenflow-tiny", data, tmp_path / "whole", **changes)
    assert_equal_ranks(on_ranks(forks, whole))
    cut = small("tokenflow-tiny", data, tmp_path / "cut", workers=1, **changes)
    on_ranks(forks, cut, stop_at=3)
    assert [line["step"] for line in curve(cut.out)] == [1, 2, 3]
    on_ranks(forks, cut)
    assert curve(cut.out) == curve(whole.out)
    one, other = (load_file(config.out / "model" / "model.safetensors") for config in (cut, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_goes_on_with_another_number_of_ranks(data, tmp_path, forks):
    whole = small(
        "tokenflow-tiny", data, tmp_path / "whole", batch=8, model=("scale_dropout=0.0",), schedule="constant"
    )
    train(whole)
    config = small(
        "tokenflow-tiny", data, tmp_path / "run", batch=8, model=("scale_dropout=0.0",), schedule="constant", steps=4
    )
    on_ranks(forks, config)
    train(small("tokenflow-tiny", data, tmp_path / "run", batch=8, model=("scale_dropout=0.0",), schedule="constant"))
    assert_near(curve(config.out), curve(whole.out), 2e-3)


def test_a_batch_that_the_ranks_cannot_share(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch: wanted a multiple of 3, for 3 ranks of 1 passes, got 4"):
        train(small("tokenflow-tiny", data, tmp_path / "r"))


def test_sharded_ranks_are_one_process(data, tmp_path, forks):
    """FSDP2: the curve and the averaged model of one process, stopped in between; the codebooks learn by gradient."""
    changes = dict(
        steps=4, batch=8, accumulate=2, adversarial=0.1, adversarial_from=1, pictures_every=4, average=0.9,
        schedule="constant", model=("scale_dropout=0.0",),
    )  # fmt: skip
    whole = small("tokenflow-b", data, tmp_path / "whole", **changes)
    train(whole)
    sharded = small("tokenflow-b", data, tmp_path / "sharded", shard=True, **changes)
    on_ranks(forks, sharded, stop_at=2, keep=False)
    on_ranks(forks, sharded, keep=False)
    assert_near(curve(sharded.out), curve(whole.out), 2e-3)
    one, other = (load_file(config.out / "model" / "model.safetensors") for config in (whole, sharded))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-2, atol=2e-3)
    assert (sharded.out / "pictures" / "step-00000004.png").exists()


def test_a_torch_that_cannot_shard_is_a_sentence(monkeypatch):
    monkeypatch.setattr(sharding, "fully_shard", lambda module, *, mesh: module)
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(Missing, match="train: shard: wanted torch 2.7 or newer, got "):
        sharding.shard(layer, layer.weight, torch.device("cpu"))


def test_sharded_unitok_contrasts_and_weighs_by_its_last_layer(data, tmp_path, forks):
    """A parameter without dimensions, recomputed blocks, and the adaptive weight, which each rank has its own of."""
    words = vocabulary(tmp_path / "tokenizer.json")
    changes = dict(words=words, model=("drop_path=0.0",), checkpointing=True, steps=3, batch=8, adversarial_from=0)
    whole = small("unitok-b", data, tmp_path / "whole", **changes)
    train(whole)
    sharded = small("unitok-b", data, tmp_path / "sharded", shard=True, **changes)
    on_ranks(forks, sharded, keep=False)
    a, b = curve(sharded.out)[-1], curve(whole.out)[-1]
    assert a["contrastive"] == pytest.approx(b["contrastive"], rel=0.02)
    assert a["adaptive_weight"] == pytest.approx(b["adaptive_weight"], rel=0.7)


def test_sharding_wants_ranks(data, tmp_path):
    with pytest.raises(
        ValueError, match="shard: wanted several ranks .torchrun. in float32 or bfloat16, got 1 in float32"
    ):
        train(small("tokenflow-tiny", data, tmp_path / "r", shard=True))
