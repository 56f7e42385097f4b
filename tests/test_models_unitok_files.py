"""UniTok's files: names and shapes as released, checkpoints of training, what is refused, folders, a CLIP to start from."""

import argparse
import math
from collections import OrderedDict

import pytest
import torch
from golden_values import published_shapes
from small_models import images
from small_models import small_unitok as small
from tokenflow.models import Tokenizer
from tokenflow.models.unitok import PRESETS, UniTok
from tokenflow.models.unitok_checkpoint import load_clip

pytestmark = pytest.mark.usefixtures("one_thread")


def released(model: UniTok) -> dict[str, torch.Tensor]:
    """The model's weights as UniTok's authors name them."""
    state = dict(model.state_dict())
    books = state.pop("quantizer.codebook.table_0").reshape(model.config.groups, model.config.codebook_size, -1)
    for k, book in enumerate(books):
        state[f"quantizer.codebooks.{k}.vocab_usage"] = torch.rand(len(book))
        state[f"quantizer.codebooks.{k}.codebook.weight"] = book.clone()
    state["encoder.pos_embed"] = torch.zeros(1, 1, model.config.dim)
    for part in ("quant_proj", "post_quant_proj") if model.config.projection == "attention" else ():
        state[f"{part}.attn.zero_k_bias"] = torch.zeros(model.config.dim)
    return state


class Bare(torch.utils.data.Dataset):
    """Not a type that a weight file may hold."""


@pytest.mark.parametrize(
    ("table", "preset", "dropped"), [("unitok_base", "unitok-b", 11), ("unitok_large", "unitok-l", 11)]
)
def test_released_names_and_shapes(table, preset, dropped):
    state = {key: torch.zeros(()).expand(shape) for key, shape in published_shapes(table).items()}
    config = UniTok.recognise(state)
    assert config == PRESETS[preset]
    converted = UniTok.convert(state, config)
    assert sum(map(len, converted.dropped.values())) == dropped
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in UniTok(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.state.items()} == wanted


@pytest.mark.parametrize("changes", [{}, {"projection": "linear"}, {"groups": 1}])
def test_released_file(tmp_path, capsys, changes):
    model = small(**changes)
    args = OrderedDict(img_size=64, dtype=torch.bfloat16, device="cuda", betas=(0.9, 0.95))
    trainer = {"config": {}, "unitok": released(model), "disc": {"head.0.weight": torch.zeros(1)}}
    torch.save({"args": args, "epoch": 1, "iter": 2, "trainer": trainer}, tmp_path / "unitok.pth")
    loaded = UniTok.from_checkpoint(tmp_path / "unitok.pth", heads=2, projection_heads=2, text_heads=2, image_size=64)
    said = capsys.readouterr().out
    assert '(under "trainer.unitok")' in said and "usage counters of training" in said
    assert "assumed" in said and "projection_causal False (weights do not tell)" in said and "given" in said
    x = images(2, 3, 64, 64)
    assert not loaded.training and torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    assert torch.equal(loaded.encode_image(x), model.encode_image(x))
    assert type(Tokenizer.from_checkpoint(tmp_path / "unitok.pth", quiet=True)) is UniTok
    for place in ("ema", "model", "state_dict"):
        torch.save({place: released(model), "steps": 3}, tmp_path / "other.pth")
        assert UniTok.from_checkpoint(tmp_path / "other.pth", quiet=True).config == loaded.config.__class__(
            **{**vars(loaded.config), "image_size": 256, "heads": 1, "projection_heads": 2, "text_heads": 1}
        )
    other = UniTok.from_checkpoint(tmp_path / "unitok.pth", heads=1, quiet=True)
    assert not torch.allclose(other.encode_features(x), model.encode_features(x))
    with pytest.raises(TypeError, match="head_count: wanted a field of Config"):
        UniTok.from_checkpoint(tmp_path / "unitok.pth", head_count=2)


def test_files_that_are_refused(tmp_path):
    state = released(small())
    path = tmp_path / "x.pth"
    for changed, words in [
        ({"encoder.pos_embed": torch.ones(1, 1, 16)}, "wanted zeros in encoder.pos_embed"),
        ({"decoder.extra": torch.ones(1)}, "no place for .decoder.extra"),
        ({"vision.weight": torch.ones(1)}, "no place for .vision.weight"),
        ({"fc_norm.weight": torch.ones(3)}, r"fc_norm.weight is \[3\]"),
    ]:
        torch.save({"trainer": {"unitok": {**state, **changed}}}, path)
        with pytest.raises(ValueError, match=words):
            UniTok.from_checkpoint(path, quiet=True)
    torch.save({"trainer": {"unitok": {k: v for k, v in state.items() if "codebook" not in k}}}, path)
    with pytest.raises(ValueError, match="wanted the weights of a UniTok, got a file without quantizer"):
        UniTok.from_checkpoint(path)
    torch.save({"trainer": {"unitok": state}, "args": Bare()}, path)
    with pytest.raises(ValueError, match="a pickle that asks for"):
        UniTok.from_checkpoint(path)
    torch.save({"trainer": {"unitok": state}, "args": argparse.Namespace(dtype=torch.float16)}, path)
    assert UniTok.from_checkpoint(path, quiet=True).config.groups == 4


def test_saved_model(tmp_path):
    model = small(projection_causal=True)
    model.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert type(loaded) is UniTok and loaded.config == model.config and loaded.config.widths == (4, 8)
    x = images(1, 3, 32, 48)
    assert torch.equal(loaded.encode(x), model.encode(x)) and torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_starting_from_a_clip():
    source, model = small(seed=3), small(seed=4)
    state = {f"visual.trunk.{k}": v for k, v in source.encoder.state_dict().items()}
    state |= {f"text.{k}": v for k, v in source.text_encoder.state_dict().items()}
    extra = {"visual.trunk.pos_embed": torch.ones(1, 16, 16), "visual.head.proj.weight": torch.ones(2, 2)}
    extra |= {"logit_scale": torch.ones(()), "text.attn_mask": torch.ones(9, 9)}
    assert sorted(load_clip(model, {**state, **extra})) == sorted(extra)
    x, ids = images(1, 3, 32, 32), torch.tensor([[3, 39]])
    assert torch.equal(model.encoder(x), source.encoder(x))
    assert torch.equal(model.encode_text(ids), source.encode_text(ids))
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))
    state.pop("text.ln_final.weight")
    with pytest.raises(ValueError, match="got 1 others .text_encoder.ln_final.weight"):
        load_clip(model, state)
