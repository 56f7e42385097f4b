"""The kernels under sanitizers, on the recorded calls of every op: no fault, and the same bits. `make test-sanitize`.

Each tensor gets memory of exactly its size, so that one number read or written beside it is a fault. Races are looked for
with clang and its OpenMP, whose runtime tells ThreadSanitizer where threads meet (libarcher); g++'s does not.
"""

import os
import pickle
import shutil
from pathlib import Path

import pytest
from harness import python
from replay import build, differences, replay

import tokenflow_ext

WANTED = os.environ.get("TOKENFLOW_SANITIZE") == "1"
CLANG = next((path for name in ("clang++-19", "clang++-16", "clang++") if (path := shutil.which(name))), None)
ONCE = "-g1 -fno-omit-frame-pointer"

# In a process of its own: how much scratch an op is given depends on the instruction set.
RECORD = """
import pickle, sys
sys.path.insert(0, {tests!r})
from replay.problems import problems
pickle.dump(problems(), open({file!r}, "wb"))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The calls per instruction set that this processor has."""
    folder, built = tmp_path_factory.mktemp("recorded"), tokenflow_ext.build_info()["instruction_sets"]
    calls = {}
    for isa in built[: built.index(tokenflow_ext.build_info()["instruction_set"]) + 1]:
        script = RECORD.format(tests=str(Path(__file__).parent), file=str(folder / isa))
        done = python(script, TOKENFLOW_ISA=isa)
        assert done.returncode == 0, done.stderr
        calls[isa] = pickle.loads((folder / isa).read_bytes())
    return calls


def clean(program, recorded, folder, **environment: str) -> None:
    """Every instruction set runs its calls with three threads without a fault, and to the same bits."""
    for isa, calls in recorded.items():
        said, made = replay([str(program)], calls, folder, 3, TOKENFLOW_ISA=isa, **environment)
        assert said == f"{isa} {len(calls)}"
        wrong = differences(calls, made)
        assert not wrong, f"{isa}, {len(wrong)} differences:\n" + "\n".join(wrong[:40])


@pytest.mark.skipif(not WANTED, reason="minutes of compiling; `make test-sanitize` runs it")
def test_memory_and_undefined_behaviour(recorded, tmp_path):
    program = build("sanitize", CMAKE_CXX_FLAGS=f"{ONCE} -fsanitize=address,undefined -fno-sanitize-recover=undefined")
    clean(program, recorded, tmp_path)


@pytest.mark.skipif(
    not WANTED or CLANG is None, reason="minutes of compiling, with clang; `make test-sanitize` runs it"
)
def test_races(recorded, tmp_path):
    program = build("races", CMAKE_CXX_COMPILER=CLANG, CMAKE_CXX_FLAGS=f"{ONCE} -fsanitize=thread")
    clean(program, recorded, tmp_path, TSAN_OPTIONS="ignore_noninstrumented_modules=1")
