"""Muon: its polar factor against the written-out iteration, one step by hand, and which weights it takes."""

import pytest
import torch
from tokenflow.models.tokenflow import TokenFlow
from tokenflow.training.muon import Muon, matrices, polar
from torch import nn


def iterated(matrix):
    """Five steps on the matrix itself, as the source writes them, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 216), (216, 24), (32, 32)])
def test_polar_is_the_iteration_of_the_source(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix * torch.logspace(0, -3, shape[1])
    torch.testing.assert_close(polar(matrix).double(), iterated(matrix), atol=1e-3, rtol=0)
    assert torch.equal(polar(torch.zeros(shape)), torch.zeros(shape))


def test_two_steps_by_hand():
    generator = torch.Generator().manual_seed(0)
    start, first, second = (torch.randn(6, 2, 3, 3, generator=generator) for _ in range(3))
    weight = nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    optimizer = Muon([weight], 0.1, momentum=0.9, weight_decay=0.5)
    average, want = torch.zeros_like(start), start.clone()
    for gradient in (first, second):
        average = 0.9 * average + 0.1 * gradient
        direction = iterated((0.1 * gradient + 0.9 * average).flatten(1)).float().view_as(start)
        want = want * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 18**0.5 * direction
        weight.grad = gradient
        optimizer.step()
        torch.testing.assert_close(weight.detach(), want, atol=1e-4, rtol=1e-4)
    rms = (0.2 * 18**0.5 * polar(torch.randn(6, 18, generator=generator))).square().mean().sqrt()
    assert 0.15 < rms < 0.25


def test_it_takes_the_weights_of_layers_and_nothing_else():
    model = TokenFlow.from_preset("tokenflow-tiny")
    taken = {id(p) for p in matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert len(names) > 40 and all(name.endswith("weight") for name in names)
    assert not any("norm" in name or "position" in name or "quantizer" in name for name in names)
    rest = sum(p.numel() for p in model.parameters() if id(p) not in taken)
    assert rest < 0.05 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match=r"wanted two or more dimensions, got \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))], 0.1)
