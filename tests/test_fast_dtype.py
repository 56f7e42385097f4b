"""In which type networks compute on a device, and that a training which moves to another goes on and says so."""

import pytest
import torch
from tokenflow.models import precision
from tokenflow.training.run import Stage

X86 = "processor : 0\nflags\t\t: fpu sse2 avx2 {}\nbugs\t: none\n"
ARM = "processor : 0\nFeatures\t: fp asimd {} i8mm\n"


@pytest.fixture
def processor(monkeypatch):
    """Says what the processor has: torch's mapping, or Linux's text for a torch without one."""

    def says(*, torch_says=None, linux=None):
        precision._has_bfloat16_units.cache_clear()
        if torch_says is None:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: torch_says, raising=False)

        def read_text(path):
            assert str(path) == "/proc/cpuinfo"
            if linux is None:
                raise FileNotFoundError(path)
            return linux

        monkeypatch.setattr(precision.Path, "read_text", read_text)

    yield says
    monkeypatch.undo()
    precision._has_bfloat16_units.cache_clear()


@pytest.mark.parametrize(("found", "dtype"), [
    ({"torch_says": {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}}, torch.float32),
    ({"torch_says": {"avx512_bf16": True}}, torch.bfloat16),
    ({"torch_says": {"avx512_bf16": False, "amx_bf16": True}}, torch.bfloat16),
    ({"torch_says": {"architecture": "arm64", "bf16": True}}, torch.bfloat16),
    # What torch says counts, not what Linux says.
    ({"torch_says": {"avx512_bf16": False}, "linux": X86.format("avx512_bf16")}, torch.float32),
    ({"linux": X86.format("avx512f avx512_bf16")}, torch.bfloat16),
    ({"linux": X86.format("avx512f amx_bf16 amx_tile")}, torch.bfloat16),
    ({"linux": X86.format("avx512f")}, torch.float32),
    ({"linux": ARM.format("bf16")}, torch.bfloat16),
    ({"linux": ARM.format("fphp")}, torch.float32),
    ({}, torch.float32),
])  # fmt: skip
def test_bfloat16_where_the_processor_has_units(processor, found, dtype):
    processor(**found)
    assert precision.fast_dtype("cpu") == dtype
    x = torch.ones(2, 2)
    with precision.autocast(x.device):
        assert (x @ x).dtype == dtype
    assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_cuda_is_asked_for_units_and_not_for_emulation(monkeypatch, supported):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported or including_emulation)
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices.append(device) or torch.no_grad())
    dtype = precision.fast_dtype("cuda:1")
    assert dtype == (torch.bfloat16 if supported else torch.float32) and devices == [torch.device("cuda:1")]


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_compute_in_float32(device):
    assert precision.fast_dtype(device) == torch.float32


def stage(tmp_path, steps, dtype):
    return Stage("stage", tmp_path, steps=steps, seed=0, parts={"layer": torch.nn.Linear(1, 1)}, dtype=dtype)


def test_a_checkpoint_of_another_type_goes_on_and_says_so(tmp_path, capsys):
    first = stage(tmp_path, 2, torch.bfloat16)
    assert list(first) == [0, 1] and first.dtypes == ["bfloat16"]
    # Finished: it is read in any type, which computed nothing of it.
    assert stage(tmp_path, 2, torch.float32).dtypes == ["bfloat16"] and capsys.readouterr().out == ""
    second = stage(tmp_path, 4, torch.float32)
    assert "goes on in float32; until step 2 it was trained in bfloat16" in capsys.readouterr().out
    assert list(second) == [2, 3] and second.dtypes == ["bfloat16", "float32"]
    third = stage(tmp_path, 5, torch.float32)
    assert list(third) == [4] and third.dtypes == ["bfloat16", "float32"] and capsys.readouterr().out == ""


def test_a_checkpoint_that_tells_no_type_goes_on(tmp_path):
    list(stage(tmp_path, 1, torch.float32))
    saved = torch.load(tmp_path / "stage.ckpt", weights_only=True)
    del saved["dtypes"]
    torch.save(saved, tmp_path / "stage.ckpt")
    again = stage(tmp_path, 2, torch.float32)
    assert list(again) == [1] and again.dtypes == ["float32"]
