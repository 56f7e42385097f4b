"""Models in folders and on the hub: saved and read back, killed while saving, broken, from a cache."""

import json
import resource
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CLIP, CONFIGS, images_of, small
from tokenflow.errors import Missing
from tokenflow.models import VQVAE, ImageProcessor, TokenFlow, Tokenizer, saved


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name, tmp_path):
    size = (32, 64) if name == "vitamin" else (20, 30)
    model = small(CONFIGS[name]).resize(size, scales=(1, (2, 3)))
    model.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert type(again) is TokenFlow and again.config == model.config and not again.training
    assert torch.equal(again.encode(images_of(model)), model.encode(images_of(model)))
    assert ImageProcessor.from_pretrained(tmp_path).size == size
    values = json.loads((tmp_path / "config.json").read_text())
    saved.save(tmp_path, {**values, "colour": 1}, model.state_dict())
    with pytest.raises(ValueError, match="wanted fields of a Config, got colour"):
        TokenFlow.from_pretrained(tmp_path)
    saved.save(tmp_path, {**values, "model": "other"}, model.state_dict())
    with pytest.raises(ValueError, match="wanted a tokenflow or .*vqvae.* model"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("config.json", b"{", "wanted JSON in .*config.json"),
    ("config.json", b"\xff", "wanted JSON in .*config.json"),
    ("config.json", b"[]", "got another in"),
    ("config.json", b'{"model": ["vqvae"]}', "got another in"),
    ("config.json", b'{"model": "vqvae", "dim": {"a": 1}}', "dim: wanted a plain value"),
    ("config.json", b'{"model": "vqvae", "image_size": 32, "scales": [2], "widths": [8, 16]}', "describes, got .*Missing key"),
    ("model.safetensors", b"", "got .*header too small"),
    ("model.safetensors", None, "got .*not fully covered"),
])  # fmt: skip
def test_a_broken_folder_is_a_sentence(name, content, words, tmp_path):
    VQVAE(VQVAE.config_type(image_size=32, scales=(1, 2), dim=4, codebook_size=8, widths=(8, 8))).save_pretrained(
        tmp_path
    )
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights), weights)  # without the copy of config.json, as others write it
    assert Tokenizer.from_pretrained(tmp_path).config.dim == 4
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9] if content is None else content)
    with pytest.raises(ValueError, match=f"from_pretrained: .*{words}") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_saving_that_dies_between_the_files_is_noticed(tmp_path, monkeypatch):
    """Another model of the same shapes: nothing but the copy in the weights tells."""
    config = VQVAE.config_type(image_size=32, scales=(1, 2), dim=4, codebook_size=8, widths=(8, 8))
    models = [VQVAE(replace(config, phi_ratio=ratio)) for ratio in (0.5, 0.25)]
    models[0].save_pretrained(tmp_path)

    def dying(tensors, path, metadata):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tokenflow.models.saved.save_file", dying)
        with pytest.raises(KeyboardInterrupt):
            models[1].save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="of one model, got .* where they differ in phi_ratio: a saving was interrupted"
    ):
        Tokenizer.from_pretrained(tmp_path)
    models[1].save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).config.phi_ratio == 0.25
    first = (tmp_path / "model.safetensors").read_bytes()
    models[1].save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_a_saving_that_dies_leaves_the_weights_that_were_there(tmp_path, monkeypatch):
    model = VQVAE(VQVAE.config_type(image_size=32, scales=(1, 2), dim=4, codebook_size=8, widths=(8, 8)))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def dying(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenflow.models.saved.save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_full_disk_is_an_oserror_as_elsewhere(tmp_path):
    """What writes checkpoints spares a run those, and safetensors' own error is none."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="save_pretrained: .*model.safetensors could not be written"):
            small(CLIP).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_repository_of_the_hub_from_its_cache(tmp_path):
    pytest.importorskip("huggingface_hub")
    model, commit = small(CLIP), "0" * 40
    home = tmp_path / "models--owner--small"
    model.save_pretrained(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    again = TokenFlow.from_pretrained("owner/small", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(again.encode(images_of(model)), model.encode(images_of(model)))
    with pytest.raises(FileNotFoundError, match="got owner/absent") as caught:
        TokenFlow.from_pretrained("owner/absent", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_without_the_hubs_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Missing, match="pip install huggingface_hub"):
        TokenFlow.from_pretrained("owner/small")
    with pytest.raises(FileNotFoundError, match="config.json"):
        TokenFlow.from_pretrained(tmp_path / "owner")


def test_push_to_the_hub(monkeypatch):
    class HfApi:
        sent = []

        def __init__(self, token):
            self.token = token

        def create_repo(self, name, private, exist_ok):
            assert exist_ok
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            again = TokenFlow.from_pretrained(folder_path)
            self.sent.append((repo_id, again.config, self.token))

    monkeypatch.setitem(sys.modules, "huggingface_hub", type("hub", (), {"HfApi": HfApi}))
    assert small(CLIP).push_to_hub("owner/small", token="secret") == "https://hub/owner/small"
    assert HfApi.sent == [("owner/small", CLIP, "secret")]
