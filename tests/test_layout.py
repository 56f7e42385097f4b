"""In eval mode convolutions keep their weights channels last: another order in memory, and nothing else."""

import copy

import pytest
import torch
from tokenflow.models import VQVAE, TokenFlow
from tokenflow.models.vqvae import Config

SMALL = Config(image_size=32, scales=(1, 2, 4), dim=4, codebook_size=16, widths=(8, 8, 8, 16))


def kernels(model):
    """Weights of the convolutions whose layout can be seen, by name."""
    return {n: p for n, p in model.named_parameters() if p.dim() == 4 and min(p.shape[1:]) > 1}


def is_turned(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.parametrize("make", [lambda: TokenFlow.from_preset("tokenflow-tiny"), lambda: VQVAE(SMALL)])
def test_eval_turns_weights_and_train_turns_them_back(make):
    torch.manual_seed(0)
    model = make()
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    assert len(kernels(model)) > 4 and all(w.is_contiguous() for w in kernels(model).values())
    model.eval()
    assert all(is_turned(w) for w in kernels(model).values())
    assert all(p is before[n] for n, p in model.named_parameters())
    model.train()
    # FSDP2 takes contiguous parameters only.
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(torch.equal(values[n], v) for n, v in model.state_dict().items())


def test_ids_and_pictures_stay():
    torch.manual_seed(0)
    model = VQVAE(SMALL)
    turned = copy.deepcopy(model).eval()
    for layer in model.modules():
        layer.training = False
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        features = model.encode_features(x)
        torch.testing.assert_close(turned.encode_features(x), features, atol=1e-6, rtol=0)
        assert torch.equal(turned.encode(x), model.encode(x))
        torch.testing.assert_close(turned.reconstruct(x), model.reconstruct(x), atol=1e-6, rtol=0)


def test_what_somebody_else_turned_stays_so():
    model = TokenFlow.from_preset("tokenflow-tiny")
    for weight in kernels(model).values():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    model.eval().train()
    assert all(is_turned(w) for w in kernels(model).values())


def test_it_survives_what_users_do(tmp_path):
    model = VQVAE(SMALL).eval()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    ids = model.encode(x)
    model.save_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path)
    assert all(is_turned(w) for w in kernels(again).values()) and torch.equal(again.encode(x), ids)
    again.load_state_dict(model.state_dict())
    assert all(is_turned(w) for w in kernels(again.to(torch.float64)).values())
    assert all(is_turned(w) for w in kernels(copy.deepcopy(model)).values())
    assert all(w.is_contiguous() for w in kernels(copy.deepcopy(model).train()).values())


def test_the_optimiser_goes_on_after_an_evaluation():
    torch.manual_seed(0)
    model = VQVAE(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        out = model.train()(torch.rand(1, 3, 32, 32))
        (out.images.square().mean() + out.loss).backward()
        before = {n: w.detach().clone() for n, w in kernels(model).items()}
        optimizer.step()
        assert any((w != before[n]).any() for n, w in kernels(model).items())
        model.eval().encode(torch.rand(1, 3, 32, 32))
