"""What the host says to CUDA while ops run: csrc/cuda on a runtime that tells every call and launches in emulation.

The runtime (tests/fake_cuda) has no call that waits, copies or allocates: one in csrc/cuda would not compile here.
gpu.h's host side is the real one; its kernels keep the emulator's threads.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
from emulator.kernels import CUDA, KERNELS, OPS, program, replay
from emulator.programs import COMPILER, FOLDER, ROOT, build

FAKE = ROOT / "tests/fake_cuda"
DEVICE, STREAM = 3, 0x7700
ALLOWED = {
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaGetLastError",
    "cudaFuncSetAttribute",
    "cudaDeviceGetAttribute",
    "launch",
}


def host_side() -> str:
    """gpu.h with the kernels' part for the emulator and the host's part for CUDA."""
    text = (CUDA / "gpu.h").read_text()
    for old, new in (
        ('#include "cuda_emulator.h"\n', '#include "cuda_emulator.h"\n#include <atomic>\n#include <mutex>\n#include "cuda_runtime.h"\n'),
        ("// More than 48 KB of dynamic", "#endif\n// More than 48 KB of dynamic"),
        ("  return cudaGetLastError();\n}\n\n#endif\n", "  return cudaGetLastError();\n}\n"),
        (
            "kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(call.stream)>>>(args...);",
            "fake_cuda::launched(kernel, grid, block, dynamic_shared, static_cast<cudaStream_t>(call.stream), args...);",
        ),
    ):  # fmt: skip
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    device, host = text.split("// More than 48 KB of dynamic")
    host, rest = host.split("// A contiguous tensor that kernels")
    assert host.count("#if defined(TOKENFLOW_EMULATED)") == 2  # in launch and in multiprocessors
    host = host.replace("#if defined(TOKENFLOW_EMULATED)", "#if 0")
    return f"{device}// More than 48 KB of dynamic{host}// A contiguous tensor that kernels{rest}"


def host_program(device: int) -> Path:
    """Replays calls on a device and a stream."""
    folder = Path(FOLDER.name) / "host"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "cuda/gpu.h").write_text(host_side())
    (folder / "ops.inc").write_text("".join(f"TOKENFLOW_CUDA_OP({op});\n" for op in OPS))
    flags = f"-I{folder}", f"-I{FAKE}"
    where = f"-DTOKENFLOW_REPLAY_DEVICE={device}", f"-DTOKENFLOW_REPLAY_STREAM={STREAM}"
    sources = {**dict.fromkeys(KERNELS, flags), ROOT / "tests/replay/replay.cpp": (*flags, *where)}
    return build(f"host{device}", "plain", sources)


@pytest.fixture(scope="module")
def calls():
    from emulator.problems import recorded

    return recorded()


@pytest.fixture(scope="module")
def told(calls):
    """Per device: the calls to CUDA, as (name, words)."""
    _, wanted = replay(program("plain"), calls)
    said = {}
    for device in (0, DEVICE):
        ran, made = replay(host_program(device), calls)
        assert ran.code == 0, ran.text[-2000:]
        assert [m[2] for m in made] == [m[2] for m in wanted], "other numbers than on the emulator alone"
        said[device] = [tuple(line.split(" ")[1:]) for line in ran.text.splitlines() if line.startswith("api ")]
    return said


def test_nothing_is_called_that_a_capture_forbids(told):
    assert {call[0] for said in told.values() for call in said} == ALLOWED


def test_launches_have_their_device_and_stream(told):
    """The device is current in every launch and while a kernel gets shared memory, and the one before is again after."""
    for device, said in told.items():
        current, launches = 0, 0
        for name, *words in said:
            if name == "cudaSetDevice":
                assert words[0] == str(device if current == 0 else 0) and device != 0
                current = int(words[0])
            elif name == "cudaGetDevice":
                assert current == 0, "not restored"
            elif name in ("launch", "cudaFuncSetAttribute"):
                assert words[:2] == ["device", str(device)] and current == device
                assert name != "launch" or words[3] == hex(STREAM)
                launches += name == "launch"
            elif name == "cudaDeviceGetAttribute":
                assert words[-1] == str(device)
        assert current == 0 and launches > 500
        assert sum(name == "cudaSetDevice" for name, *_ in said) == (2 * launches if device else 0)


def test_large_shared_memory_is_asked_for_before_it_is_used(told):
    """Once a kernel and size; none is launched with more than it was allowed."""
    for said in told.values():
        allowed, large = {}, 0
        for name, *words in said:
            if name == "cudaFuncSetAttribute":
                kernel, size = words[3], int(words[5])
                assert size > allowed.get(kernel, 48 << 10), "asked for again"
                allowed[kernel] = size
            elif name == "launch":
                kernel, size = words[5], int(words[7])
                assert size <= allowed.get(kernel, 48 << 10)
                large += size > 48 << 10
        assert large > 0


def test_devices_are_asked_for_their_processors_once_a_file(told):
    for said in told.values():
        assert 1 <= sum(name == "cudaDeviceGetAttribute" for name, *_ in said) <= len(KERNELS)


@pytest.mark.parametrize("failing", ["cudaGetDevice", "cudaSetDevice", "cudaFuncSetAttribute", "launch"])
def test_the_first_error_ends_the_op_and_is_told(told, calls, failing, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_FAIL", failing)
    ran, _ = replay(host_program(DEVICE), calls)
    assert ran.code == 2 and "replay: cudaErrorLaunchFailure" in ran.text
    said = [line.split(" ")[1:] for line in ran.text.splitlines() if line.startswith("api ")]
    after = said[next(i for i, call in enumerate(said) if call[0] == failing) + 1 :]
    after = [call for call in after if call[0] != "cudaDeviceGetAttribute"]  # a later search may ask
    assert after == [["cudaSetDevice", "0"]]


def test_calls_to_cuda_stand_in_two_files():
    """All that is tested here, and device.cu below: no other file of csrc speaks to CUDA."""
    spoken = r"\bcuda[A-Z]\w+|<<<"
    files = [f for f in (ROOT / "csrc").rglob("*.*") if f.suffix in (".h", ".cu", ".cuh", ".cpp")]
    assert {f.name for f in files if re.search(spoken, re.sub(r"//.*", "", f.read_text()))} == {"gpu.h", "device.cu"}


@pytest.fixture(scope="module")
def problem():
    """device_problem with a driver, a runtime, devices and their capability."""
    source, made = Path(FOLDER.name) / "problem.cpp", Path(FOLDER.name) / "problem"
    source.write_text(
        '#include "cuda/device.h"\n#include <cstdio>\n#include <cstdlib>\nint main(int, char** given) {\n'
        "  const char* said = tokenflow_ext::device_problem(std::atoi(given[1]));\n"
        '  std::printf("said %s\\n", said ? said : "nothing");\n}\n'
    )
    command = [
        COMPILER,
        "-std=c++17",
        f"-I{FAKE}",
        f"-I{ROOT / 'csrc'}",
        source,
        "-x",
        "c++",
        CUDA / "device.cu",
        "-o",
        made,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def ask(device: int, **there: int | str) -> str:
        environment = {**os.environ, **{f"FAKE_CUDA_{key.upper()}": str(value) for key, value in there.items()}}
        done = subprocess.run([made, str(device)], capture_output=True, text=True, env=environment)
        return done.stdout.splitlines()[-1]

    return ask


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        (0, {}, "nothing"),
        (7, {"capability": 120, "driver": 13020}, "nothing"),
        (0, {"driver": 13000, "runtime": 13020}, "nothing"),  # a minor release runs on its major's driver
        (0, {"driver": 12090, "runtime": 12080}, "nothing"),
        (0, {"driver": 0}, "wanted a driver of NVIDIA, got none"),
        (0, {"fail": "cudaDriverGetVersion"}, "wanted a driver of NVIDIA, got none"),
        (0, {"driver": 12090}, "wanted a driver of CUDA 13, 580 or newer, got an older one"),
        (0, {"driver": 11080, "runtime": 12000}, "wanted a driver as new as the nvcc"),
        (8, {}, "wanted the ordinal of a device, got another number"),
        (0, {"devices": 0}, "wanted the ordinal of a device, got another number"),
        (0, {"capability": 75}, "wanted a device of compute capability 8.0 or newer, got an older one"),
    ],
)
def test_what_is_wrong_with_a_machine_is_a_sentence(problem, device, there, said):
    assert said in problem(device, **there)
