"""The yardsticks of the benchmarks: what the machine's arithmetic units do at best."""

import pytest
import torch

from tokenflow_ext import _C, build_info


def test_rates_are_those_of_a_processor():
    rates = torch.empty(2, dtype=torch.float64)
    _C.peaks(rates, 0.01, 1)
    fma, int8 = rates.tolist()
    assert 1e8 < fma < 1e12
    assert int8 == 0 or fma < int8 < 1e13
    assert build_info()["instruction_set"] != "baseline" or int8 == 0


@pytest.mark.parametrize("rates, seconds", [(torch.empty(2), 0.01), (torch.empty(1, dtype=torch.float64), 0.01)])
def test_rates_must_hold_two_numbers(rates, seconds):
    with pytest.raises(ValueError, match="peaks: rates: wanted"):
        _C.peaks(rates, seconds, 1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), 11.0])
def test_seconds_must_be_few(seconds):
    with pytest.raises(ValueError, match="peaks: seconds: wanted"):
        _C.peaks(torch.empty(2, dtype=torch.float64), seconds, 1)
