"""The CUDA kernels, emulated, on recorded calls of every op: the same bits whoever runs first, no byte and no race wrong.

And the tests can fail: kernels with one barrier, wait, fence or atomic less are noticed. `make test-cuda-full` tries every one.
"""

import contextlib
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from emulator.kernels import CUDA, KERNELS, caught, expected, noticed_by_parts, plain, program, replay, some
from emulator.mutants import mutants, reached
from emulator.programs import MODES, SCHEDULES

FULL = os.environ.get("TOKENFLOW_CUDA_FULL") == "1"
EVERY = [mutant for file in sorted(CUDA.glob("*.cu*")) for mutant in mutants(file)]
KINDS = ("__syncthreads", "__syncwarp", "cp_async_wait", "__threadfence", "atomic")


@pytest.fixture(scope="module")
def programs():
    with ThreadPoolExecutor() as pool:
        return dict(zip(MODES, pool.map(program, MODES), strict=True))


@pytest.fixture(scope="module")
def calls(programs):
    return expected()


def test_certified_searches_return_the_bits_of_the_others(calls):
    """And they are certified: of the rows counted, some are handed over and most are not."""
    others, total = {call.encoded: call for call in calls if not call.certified}, [0, 0, 0]
    twins = [(others[plain(call).encoded], call) for call in calls if call.certified]
    assert len(twins) > 50
    for call, twin in twins:
        assert (twin.after, twin.error, twin.counts[:2]) == (call.after, call.error, call.counts[:2])
        total = [a + b for a, b in zip(total, twin.counts[2:], strict=True)]
    answered, handed_over, rescored = total
    assert answered > 2000 and 100 < handed_over < answered / 2 and rescored > answered


@pytest.mark.parametrize(("schedule", "seed"), [*product(SCHEDULES, (2,)), *product(SCHEDULES[2:], (3, 4))])
def test_the_order_of_threads_changes_no_bit(programs, calls, schedule, seed):
    assert noticed_by_parts(programs["plain"], calls, schedule=schedule, seed=seed) == ""


@pytest.mark.parametrize("schedule", SCHEDULES if FULL else ["threads"])
def test_memory_and_undefined_behaviour(programs, calls, schedule):
    assert noticed_by_parts(programs["memory"], calls, schedule=schedule) == ""


@pytest.mark.parametrize("schedule", SCHEDULES if FULL else ["warps"])
def test_races(programs, calls, schedule):
    assert noticed_by_parts(programs["races"], calls if FULL else some(calls, 3), schedule=schedule) == ""


def bounds(file) -> dict[str, int]:
    """The __launch_bounds__ of the kernels in a file of csrc/cuda."""
    text = "".join(re.sub(r"//[^\n]*", "", f.read_text()) for f in sorted(reached(file), key=lambda f: f != file))
    known = {}
    for _ in range(3):  # a constant may be made of those that come later in this text
        for name, value in re.findall(r"\b(k[A-Z]\w*) = ([^,;()<>{}]+)[,;]", text):
            with contextlib.suppress(NameError, SyntaxError):
                known.setdefault(name, eval(value.replace("/", "//"), {"__builtins__": {}}, known))
    kernel = r"__global__ void\s+(?:__launch_bounds__\(([^,()]+)[^()]*\)\s+)?(\w+)\("
    found = re.findall(kernel, file.read_text())
    return {name: eval(bound or "1024", {"__builtins__": {}}, known) for bound, name in found}


def test_every_kernel_is_launched_within_its_bounds(programs, calls):
    """More threads than __launch_bounds__ fail on a GPU alone; every architecture has the 99 KB of shared memory of sm_86."""
    files = {file for kernel in KERNELS for file in reached(kernel)}
    allowed = {name: bound for file in files for name, bound in bounds(file).items()}
    ran, _ = replay(programs["plain"], calls, architecture=86)
    launches = set(re.findall(r"^(\w+)(?:<.*>)?: (\d+) threads, ", ran.text, re.MULTILINE))
    assert ran.code == 0 and {name for name, _ in launches} == set(allowed), ran.text[-2000:]
    assert not [(name, threads) for name, threads in launches if int(threads) > allowed[name]]


def test_mutants_are_made_of_every_synchronisation(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text(
        "// __syncthreads();\nif (i > 0) __syncthreads();\ncp_async_wait<1>();\n__syncwarp(mask);\n"
        "const unsigned old = atomicAdd(&count[f(i)], 1u);\n__threadfence();\n"
    )
    made = mutants(file)
    assert [str(m) for m in made] == [
        "kernel.cu:2 without __syncthreads()",
        "kernel.cu:3 without cp_async_wait<1>()",
        "kernel.cu:4 without __syncwarp(mask)",
        "kernel.cu:5 plain atomicAdd",
        "kernel.cu:6 without __threadfence()",
    ]
    changed = [(m.csrc / "cuda/kernel.cu").read_text() for m in made]
    assert "if (i > 0) ;\n" in changed[0] and changed[0].startswith("// __syncthreads();\n")
    assert "const unsigned old = plain_Add(&count[f(i)], 1u);\n" in changed[3]


def test_mutants_are_noticed(programs, calls):
    """One of each kind; all of them in the full run, which prints them. What few calls do not notice, all have to."""
    chosen = EVERY if FULL else [next((m for m in EVERY if kind in m.what), None) for kind in KINDS]
    chosen = [mutant for mutant in chosen if mutant]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda mutant: caught(mutant, some(calls, 6)) or caught(mutant, calls), chosen)
        how = dict(zip(chosen, found, strict=True))
    for mutant, found in how.items():
        print(f"{mutant}: {found or 'NOT NOTICED'}")
    total, lost = Counter(m.file.name for m in how), Counter(m.file.name for m, found in how.items() if not found)
    for file, count in total.items():
        print(f"{file}: {count - lost[file]} of {count}")
    assert not lost, [str(mutant) for mutant, found in how.items() if not found]
