"""Released files: read as data alone, found out by names and shapes, loaded to the last tensor or refused in one sentence."""

import argparse
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch
from released_files import small_file
from safetensors.torch import save_file
from tokenflow.cli import main
from tokenflow.models import VQVAE, TokenFlow, Tokenizer, checkpoint

MODELS = {"var_vqvae": VQVAE, "tokenflow_b": TokenFlow, "tokenflow_l": TokenFlow, "tokenflow_xl": TokenFlow}


@pytest.fixture(scope="module", params=MODELS)
def file(request, tmp_path_factory):
    state = small_file(request.param)
    path = tmp_path_factory.mktemp("released") / f"{request.param}.pt"
    torch.save(state, path)
    return path, state, MODELS[request.param]


def one_sentence(caught):
    return "\n" not in str(caught.value) and str(caught.value).startswith("from_checkpoint: path: ")


def test_a_released_file_becomes_a_model(file, capsys):
    path, state, cls = file
    model = Tokenizer.from_checkpoint(path)
    said = capsys.readouterr().out
    assert type(model) is cls and not model.training
    for words in (
        "of no preset",
        r"M parameters",
        r"\ngrid +2 x 2\n" if cls is TokenFlow else r"\ngrid +16 x 16\n",
        r"\ndropped ",
    ):
        assert re.search(words, said), words
    images = torch.rand(2, 3, *model.image_size) * 2 - 1
    indices = model.encode(images)
    assert indices.shape == (2, sum(s * s for s in model.config.scales))
    assert model.decode(indices).shape == images.shape
    cls.from_checkpoint(path, quiet=True)
    assert capsys.readouterr().out == ""


def test_what_weights_do_not_tell_is_said_and_can_be_given(file, capsys):
    path, state, cls = file
    cls.from_checkpoint(path)
    said = capsys.readouterr().out
    assert re.search(r"\nassumed .*image_size \d+, scales .*weights do not tell", said)
    cell = 4 if "encoder_vqkd.vision_model.post_layernorm.bias" in state else 16
    model = cls.from_checkpoint(path, image_size=(3 * cell, 5 * cell), commitment_weight=0.5)
    said = capsys.readouterr().out
    assert model.grid == (3, 5) and tuple(model.config.scales[-1]) == (3, 5)
    assert re.search(r"\ngiven +image_size .*commitment_weight 0.5", said)
    assert model.reconstruct(torch.zeros(1, 3, *model.image_size)).shape == (1, 3, 3 * cell, 5 * cell)
    with pytest.raises(TypeError, match="colour"):
        cls.from_checkpoint(path, colour="red")


@pytest.mark.parametrize("name", ["var_vqvae", "tokenflow_b"])
def test_where_weights_lie_in_a_file(name, tmp_path):
    good, other = small_file(name), {"weight": torch.zeros(3)}
    path = tmp_path / "x.pt"
    settings = argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("runs"), dtype=torch.bfloat16, step=np.float32(3.0))
    for content, place in (
        (
            {"ema": good, "model": other, "args": settings, "steps": 5, "optimizer": {"state": {0: torch.zeros(2)}}},
            "ema",
        ),
        ({"ema": None, "model": good, "state_dict": other}, "model"),
        ({"ema": {}, "state_dict": {f"module._orig_mod.{k}": v for k, v in good.items()}}, "state_dict"),
        (good, ""),
    ):
        torch.save(content, path)
        read, found = checkpoint.read(path)
        assert found == place and set(read) == set(good) and all(torch.equal(read[k], good[k]) for k in good)
    torch.save(good, path, _use_new_zipfile_serialization=False)
    assert set(checkpoint.read(path)[0]) == set(good)
    save_file(good, tmp_path / "x.safetensors")
    model = MODELS[name].from_checkpoint(tmp_path / "x.safetensors", quiet=True)
    again = MODELS[name].from_checkpoint(path, quiet=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "prefix"), [("tokenflow_b", "visual."), ("tokenflow_l", "visual.trunk.")])
def test_towers_start_from_openais_and_open_clips_files(name, prefix, tmp_path):
    state = small_file(name)
    config = TokenFlow.recognise(state)
    clip = {k.replace("encoder_vqkd.", prefix): v for k, v in state.items() if k.startswith("encoder_vqkd.")}
    save_file(
        {**clip, "visual.proj": torch.zeros(2), "visual.head.proj.weight": torch.zeros(2)}, tmp_path / "x.safetensors"
    )
    model, whole = TokenFlow(config), TokenFlow(config)
    model.load_tower(tmp_path / "x.safetensors")
    checkpoint.fit(TokenFlow.convert(state, config), whole, name)
    for key, value in whole.semantic_encoder.tower.state_dict().items():
        assert torch.equal(model.semantic_encoder.tower.state_dict()[key], value), key


class Hostile:
    """Unpickled by Python's own reader, it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "model", "bare"])
def test_a_hostile_pickle_is_refused_and_does_nothing(zipped, place, tmp_path):
    made, path = tmp_path / "made", tmp_path / "hostile.pt"
    content = Hostile(made) if place == "bare" else {"model": small_file("var_vqvae"), place: Hostile(made)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="asks for (posix|nt).mkdir.*not loaded") as caught:
        Tokenizer.from_checkpoint(path)
    assert one_sentence(caught) and not made.exists()
    pickle.loads(pickle.dumps(Hostile(made)))
    assert made.exists(), "the attack itself works"


class Number:
    """A numpy scalar whose dtype carries flags of the file's choosing."""

    def __init__(self, flags, content):
        self.flags, self.content = flags, content

    def __reduce__(self):
        return np._core.multiarray.scalar, (Type(self.flags), self.content)


class Type:
    def __init__(self, flags):
        self.flags = flags

    def __reduce__(self):
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, self.flags)


@pytest.mark.parametrize("flags", [0, 2, 4])
def test_a_number_is_its_bytes_whatever_its_dtype_says(flags, tmp_path):
    """Flag 4 has numpy's own reader take the address of the bytes for the number."""
    torch.save({"loss": Number(flags, np.float64(1.5).tobytes())}, tmp_path / "x.pt")
    assert checkpoint._load(tmp_path / "x.pt")["loss"] == 1.5
    torch.save({"loss": Number(flags, b"short")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="from_checkpoint: path: wanted"):
        checkpoint._load(tmp_path / "x.pt")


@pytest.mark.parametrize(("content", "words"), [
    (b"", "wanted a weight file"),
    (b"not a pickle at all", "got"),
    (b"PK\x03\x04 half a zip", "got"),
])  # fmt: skip
def test_what_is_no_weight_file_is_a_sentence(content, words, tmp_path):
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            Tokenizer.from_checkpoint(tmp_path / name)
        assert one_sentence(caught)


def test_other_content_is_a_sentence(tmp_path):
    path = tmp_path / "x.pt"
    for content, words in (
        (torch.zeros(3), "got .* with a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "with epoch, lr"),
        ({"model": {"a": torch.zeros(1)}}, "with other names"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as caught:
            Tokenizer.from_checkpoint(path)
        assert one_sentence(caught)
    torch.save({"model": {**small_file("var_vqvae"), "quantize.embedding.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="of a VQVAE, got .* with tensors of other shapes") as caught:
        VQVAE.from_checkpoint(path)
    assert one_sentence(caught)
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="without quantize.embedding.weight"):
        VQVAE.from_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no.pt"):
        Tokenizer.from_checkpoint(tmp_path / "no.pt")


def test_loading_is_strict(file, tmp_path):
    _, state, cls = file
    path = tmp_path / "x.pt"
    first, *_ = state
    for changed, words in (
        ({**state, "decoder.surprise": torch.zeros(1)}, "1 tensors that the model has no place for .*surprise"),
        ({k: v for k, v in state.items() if "norm_out.bias" not in k}, "2 tensors missing .*norm_out.bias"),
        ({**state, first: torch.zeros(3, 3)}, r"1 wrong shapes .*is \[3, 3\] instead of"),
        ({k: v for k, v in state.items() if not k.endswith(".0.k.weight")} if "encoder.mid.1.k.weight" in state else
         {**state, first: torch.zeros(3, 3)}, "wrong shapes"),
    ):  # fmt: skip
        torch.save(changed, path)
        with pytest.raises(ValueError, match=words) as caught:
            cls.from_checkpoint(path)
        assert one_sentence(caught)


def test_every_tensor_reaches_one_place(file):
    """A file whose tensors hold each its own number: the model holds each number that was not dropped, as often."""
    _, state, cls = file
    config = cls.recognise(state)
    numbers = dict(enumerate(state, start=1))
    converted = cls.convert({name: torch.full_like(state[name], n) for n, name in numbers.items()}, config)
    checkpoint.fit(converted, cls(config), "numbers")
    found = torch.cat([v.flatten() for v in converted.state.values()]).long().bincount(minlength=len(state) + 1)
    dropped = {name for names in converted.dropped.values() for name in names}
    for n, name in numbers.items():
        assert found[n] == (0 if name in dropped else state[name].numel()), name
    for name, value in converted.state.items():
        pieces = value.flatten().unique_consecutive()
        assert len(pieces) <= (
            3 if name.endswith(("qkv.weight", "qkv.bias")) else config.phis if "phi" in name else 1
        ), name


def test_commands_read_released_files(file, tmp_path, capsys):
    from PIL import Image

    path, _, cls = file
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    main(["info", str(path)])
    assert cls.__name__ in capsys.readouterr().out
    out = tmp_path / "tokens.jsonl"
    main(["encode", str(tmp_path / "a.png"), "--model", str(path), "--out", str(out)])
    main(["reconstruct", str(tmp_path / "a.png"), "--model", str(path), "--out", str(tmp_path / "r")])
    size = cls.from_checkpoint(path, quiet=True).image_size[0]
    with Image.open(tmp_path / "r" / "a.png") as image:
        assert image.size == (2 * size, size)
    with pytest.raises(SystemExit):
        main(["info", str(tmp_path / "absent.pt")])
    assert "absent.pt" in capsys.readouterr().err


def test_names_that_rules_make():
    state = {"a.q": torch.zeros(2), "a.k": torch.ones(2), "b.x": torch.zeros(1), "kept": torch.zeros(1)}
    rules = [(r"^a\.q$", "qk[0]"), (r"^a\.k$", "qk[1]")]
    out = checkpoint.rename(state, rules, [(r"b\..*", "not read")])
    assert out.state["qk"].tolist() == [0, 0, 1, 1] and out.dropped == {"not read": ["b.x"]} and "kept" in out.state
    assert checkpoint.dropped_lines({"unused": ["head.a", "head.b"]}) == ["head.* (2): unused"]
    assert checkpoint.count({"l.0.a": 0, "l.3.a": 0, "m.9": 0}, r"l\.(\d+)\.") == 4
    assert checkpoint.table({"a": "1", "long": ["x", "y"]}).splitlines() == ["a     1", "long  x", "      y"]
