"""aarch64 with NEON gives the bits of this processor: ids, scores, values, losses, statistics, gradients.

The core is cross-compiled and run by a user-mode emulator on recorded calls of every op. Debian's packages
g++-aarch64-linux-gnu and qemu-user have both; without them the test is skipped. Nothing is said about speed.
"""

import platform
import shutil

import pytest
from replay import CMAKE, build, differences, replay, signatures
from replay.problems import problems

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None] + ["cmake"] * (CMAKE is None)


@pytest.mark.skipif(
    bool(MISSING), reason=f"aarch64 was not tested, missing: {', '.join(MISSING)}; `make tools` installs them"
)
def test_neon_gives_the_same_bits(tmp_path):
    program = build(
        "aarch64",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=COMPILER,
    )
    calls = problems()
    for threads in (1, 3):
        said, made = replay([EMULATOR, "-L", LIBRARIES, str(program)], calls, tmp_path, threads)
        assert said == f"neon {len(calls)}"
        wrong = differences(calls, made)
        assert not wrong, f"{threads} threads, {len(wrong)} differences:\n" + "\n".join(wrong[:40])
    print(f"{len(calls)} calls of {len(signatures())} ops have the same bits on {platform.machine()} and aarch64")
