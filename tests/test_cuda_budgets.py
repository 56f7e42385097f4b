"""What the compiled kernels take of a GPU, against tests/emulator/budgets.json: a change shows in the file, or fails here."""

import json
import os
import re

import pytest
from emulator.budgets import COMMAND, FILE, LIMITS, REGISTERS, cuobjdump, instructions, occupancy, threads, usage
from emulator.budgets_table import PAGE, floor_columns, kernel_columns, row
from emulator.floors import FLOORS
from emulator.mutants import CUDA

import tokenflow_ext

BUILT = [int(name.removeprefix("sm_")) for name in tokenflow_ext.build_info()["cuda"]]
FULL = os.environ.get("TOKENFLOW_CUDA_FULL") == "1"
SASS = BUILT if FULL else [a for a in BUILT if a in (80, 120)]
"""Where instructions are read, which takes seconds an architecture."""
SLACK = 4
BUDGETS = json.loads(FILE.read_text())

pytestmark = pytest.mark.skipif(not BUILT, reason="this package was built without nvcc")


def exceeded(kernel: str, architecture: int, now: dict, block: int, budget: dict) -> list[str]:
    """What is wrong about one kernel on one architecture."""
    said, allowed = [], budget[str(architecture)]
    if now["stack"] or now["local"]:
        said.append(f"stack {now['stack']}, local {now['local']} bytes, wanted none")
    if now["registers"] > allowed["registers"] + SLACK:
        said.append(f"{now['registers']} registers, wanted {allowed['registers']}")
    if now["shared"] > allowed["shared"]:
        said.append(f"{now['shared']} shared bytes, wanted {allowed['shared']}")
    if block != budget["threads"]:
        said.append(f"{block} threads in __launch_bounds__, wanted {budget['threads']}")
    if -(-now["registers"] // 8) * 8 * block > REGISTERS:
        said.append(f"{now['registers']} registers of {block} threads are more than {REGISTERS}")
    filled = occupancy(architecture, now["registers"], now["shared"], block)[1]
    if filled < occupancy(architecture, allowed["registers"], allowed["shared"], budget["threads"])[1]:
        said.append(f"occupancy {filled:.0%}, wanted more")
    return [f"{kernel}, sm_{architecture}: {what}" for what in said]


def mixed(kernel: str, architecture: int, now: dict, budget: dict) -> list[str]:
    """What is wrong about the instructions of one kernel's busiest loop."""
    said, loop, allowed = [], now["loop"], budget[str(architecture)]["loop"]
    if now["local"]:
        said.append(f"{now['local']} loads and stores of local memory")
    if allowed.get("wide LDS") and not loop.get("wide LDS"):
        said.append("no LDS.128")

    def share(mix):
        return mix.get("integer", 0) / max(1, mix.get("float", 0) + 8 * mix.get("matrix", 0))

    if share(loop) > 1.2 * share(allowed) + 0.1:
        said.append(f"{share(loop):.2f} integer instructions a float one, wanted {share(allowed):.2f}")
    return [f"{kernel}, sm_{architecture}: {what}" for what in said]


def test_every_kernel_has_a_budget():
    new, gone = sorted(usage().keys() - BUDGETS.keys()), sorted(BUDGETS.keys() - usage().keys())
    assert not new + gone, f"new {new}, gone {gone}: {COMMAND}"


def test_registers_memory_and_occupancy():
    assert all(set(of) == set(BUILT) for of in usage().values())
    said = [
        line
        for kernel, of in usage().items()
        for architecture, now in of.items()
        for line in exceeded(kernel, architecture, now, threads()[kernel], BUDGETS[kernel])
    ]
    assert not said, "\n".join([*said, f"if it has to be so: {COMMAND}"])


@pytest.mark.parametrize("architecture", SASS)
def test_the_busiest_loops(architecture):
    now = instructions(architecture)
    assert now.keys() == BUDGETS.keys()
    said = [line for kernel in now for line in mixed(kernel, architecture, now[kernel], BUDGETS[kernel])]
    assert not said, "\n".join([*said, f"if it has to be so: {COMMAND}"])


def test_the_search_is_made_of_what_it_should_be():
    """Wide reads of shared memory in every search, and more float than integer instructions."""
    for kernel, of in BUDGETS.items():
        if kernel.startswith("search: search_kernel"):
            for architecture in map(str, LIMITS):
                loop = of[architecture]["loop"]
                assert loop["wide LDS"] and loop["float"] > 2 * loop["integer"], f"{kernel}, sm_{architecture}: {loop}"


def test_a_worse_kernel_is_noticed():
    kernel = "search: search_kernel<128, true>"
    budget, good = BUDGETS[kernel], {**BUDGETS[kernel]["80"], "stack": 0, "local": 0}
    block = budget["threads"]
    assert exceeded(kernel, 80, good, block, budget) == mixed(kernel, 80, good, budget) == []
    for key, value, said in (
        ("registers", good["registers"] + SLACK + 1, "registers, wanted"),
        ("registers", 255, "occupancy"),
        ("shared", good["shared"] + 16, "shared bytes, wanted"),
        ("stack", 8, "stack 8"),
        ("local", 8, "local 8 bytes"),
    ):
        assert any(said in line for line in exceeded(kernel, 80, {**good, key: value}, block, budget)), said
    assert "threads in __launch_bounds__" in exceeded(kernel, 80, good, 2 * block, budget)[0]
    loop = good["loop"]
    narrow = {**good, "loop": {**loop, "wide LDS": 0}}
    slow = {**good, "loop": {**loop, "integer": 2 * loop["integer"] + loop["float"]}}
    assert "no LDS.128" in mixed(kernel, 80, narrow, budget)[0]
    assert "integer instructions" in mixed(kernel, 80, slow, budget)[0]


def test_occupancy():
    """Against CUDA's occupancy calculator: blocks of 256 threads with these registers and shared bytes."""
    assert occupancy(80, 62, 7680, 256) == (4, 0.5)
    assert occupancy(86, 62, 7680, 256) == (4, 4 * 256 / 1536)
    assert occupancy(90, 48, 7680, 256) == (5, 5 * 256 / 2048)
    assert occupancy(80, 32, 80 << 10, 1024) == (2, 1.0)
    assert occupancy(80, 16, 0, 32) == (32, 0.5)


def test_every_architecture_is_in_the_file():
    assert set(re.findall(r"\.sm_(\d+)\.cubin", cuobjdump("--list-elf"))) == set(map(str, BUILT))
    embedded = re.findall(r"\.sm_(\d+)\.ptx", cuobjdump("--list-ptx"))
    assert set(embedded) == {str(BUILT[0]), str(BUILT[-1])}


def test_the_page_says_what_the_file_says():
    """docs/cuda_budgets.md: every kernel and floor, as they are now."""
    lines = PAGE.read_text().splitlines()
    for kernel, of in BUDGETS.items():
        wanted = row(kernel_columns(kernel, of)).removesuffix(" |")
        assert any(line.startswith(wanted) for line in lines), f"{wanted}: python tests/emulator/budgets.py --table"
    assert [floor.op for floor in FLOORS if row(floor_columns(floor)) not in lines] == []


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.op)
def test_floors_are_those_of_the_headers(floor):
    """The formula makes the number that the kernel's header states, within its digits."""
    assert floor.stated in (CUDA / floor.file).read_text().split("#include")[0]
    number = floor.computed / 2e9 if floor.file == "search.cu" else floor.bytes / 1e6
    assert number == pytest.approx(float(floor.stated.removesuffix(" MB")), rel=0.035)
