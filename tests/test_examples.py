"""Every docstring example of the core, and of data, evaluation, losses, models, report and training runs."""

import doctest
import importlib
import pkgutil

import pytest
import tokenflow.data
import tokenflow.evaluation
import tokenflow.losses
import tokenflow.models
import tokenflow.report
import tokenflow.training
import torch

import tokenflow_ext

MODULES = [
    m.name
    for package in (
        tokenflow_ext,
        tokenflow.data,
        tokenflow.evaluation,
        tokenflow.losses,
        tokenflow.models,
        tokenflow.report,
        tokenflow.training,
    )
    for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not m.name.endswith("._C")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    functions = {**vars(torch.nn), **vars(tokenflow_ext.ops), **vars(tokenflow_ext.quantize), "torch": torch}
    result = doctest.testmod(
        module, extraglobs={k: v for k, v in functions.items() if k not in vars(module) and k[0] != "_"}
    )
    assert result.failed == 0


def test_ops_have_examples():
    for name in tokenflow_ext.ops.__all__:
        assert ">>>" in getattr(tokenflow_ext.ops, name).__doc__ or name.startswith("multiscale"), name
