"""The CUDA emulator is checked itself: kernels with one mistake each must be noticed, correct ones must not.

Which mode notices what: the emulator's own rules in every mode and schedule; wrong numbers where a schedule and poison show
them; memory to the byte under AddressSanitizer and UndefinedBehaviorSanitizer; races under ThreadSanitizer, also those that
no order of threads shows.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator.programs import MODES, ROOT, SCHEDULES, build, places, run

CHECKS = ROOT / "tests/emulator/checks"
SOURCES = {CHECKS / name: (f"-I{CHECKS}",) for name in ("wrong.cu", "right.cu", "main.cpp")}

FAILS = {
    "barrier_in_two_branches": r"is at the __syncthreads of \S*wrong.cu:(\d+) .*others wait at that of \S*wrong.cu:(?!\1 )",
    "barrier_that_some_skip": r"deadlock, no thread can run\n.*(threads \d+-\d+ wait at __syncthreads|in a warp operation)",
    "shuffle_that_some_skip": r"__shfl_xor_sync of \S+:\d+ .*waits for lane \d+, which has exited|exits while its warp waits",
    "shuffle_after_an_exit": r"thread 5 exits while its warp waits for it at \S*wrong.cu:\d+|waits for lane 5, which has exited",
    "shuffle_in_two_branches": r"warp \d diverged: lane \d+ is at __shfl_xor_sync of \S+:(\d+) .*others wait .*:(?!\1 )\d+",
    "mask_without_own_lane": r"__shfl_xor_sync of \S*wrong.cu:\d+ .*: mask 0xffff lacks its own lane",
    "masks_that_disagree": r"with mask 0x\w+, others wait at .* with mask 0x|waits for lane \d+, which has exited",
    "tensor_cores_that_some_skip": r"mma.sync of \S+wrong.cu:\d+ waits for lane 9, which has exited|exits while its warp waits",
    "mask_of_absent_lanes": r"mask 0xffffffff names lanes that do not exist, the warp has 8",
    "dynamic_without_any": "DYNAMIC_SHARED in a launch without dynamic shared memory",
    "copy_never_waited_for": r"thread \d+ exits with cp.async copies that it never waited for",
    "copy_never_committed": r"thread \d+ exits with cp.async copies that it never waited for",
    "copy_to_an_array_of_floats": "cp_async16: an address is no multiple of 16|16 bytes at 0x\\w+: misaligned",
    "copy_to_global_memory": "cp_async4: the destination is not shared memory|outside of shared memory",
    "block_of_2048": "cudaErrorInvalidConfiguration",
    "block_depth_of_65": "cudaErrorInvalidConfiguration",
    "grid_height_of_65536": "cudaErrorInvalidConfiguration",
    "shared_of_164_kilobytes": "cudaErrorInvalidValue",
    "shared_of_52_kilobytes": "static shared memory: wanted at most 49152 bytes, got 53248",
}
"""Launches that end with an error in every mode and schedule."""

SHOWS = {
    **dict.fromkeys(("barrier_missing_after_write", "barrier_missing_before_overwrite", "warp_barrier_missing"), 4),
    **dict.fromkeys(("shuffle_from_outside_the_mask", "shared_never_written", "shared_kept_from_the_last_block"), 4),
    **dict.fromkeys(("copy_without_a_barrier", "copy_over_what_others_read"), 4),
    **dict.fromkeys(("copy_waited_for_after_the_barrier", "copy_wait_too_weak", "copy_read_before_the_wait"), 3),
    "warp_barrier_for_a_block": 3,
}
"""Wrong numbers without a sanitizer, in at least so many of the four schedules."""

MEMORY = {
    "shared_past_the_end": "AddressSanitizer: use-after-poison",
    "dynamic_past_the_end": "AddressSanitizer: use-after-poison",
    "global_past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "vector_of_an_array_of_floats": "runtime error: .*misaligned address",
    "vector_off_by_one": "runtime error: .*misaligned address",
    "shift_too_far": "runtime error: shift exponent",
    "integer_overflow": "runtime error: signed integer overflow",
}

RACES = [
    *("barrier_missing_after_write", "barrier_missing_before_overwrite", "warp_barrier_missing"),
    *("warp_barrier_for_a_block", "shuffle_for_a_warp_barrier", "copy_waited_for_after_the_barrier"),
    *("copy_wait_too_weak", "copy_without_a_barrier", "copy_over_what_others_read", "counter_in_global_memory"),
    *("counter_in_shared_memory", "counter_of_blocks", "plain_beside_atomic", "last_block_without_fence"),
]
"""Found by ThreadSanitizer, one schedule each."""

RUNS = [(m, s) for m in MODES for s in SCHEDULES if m == "plain" or s in ("forward", "threads")]


@pytest.fixture(scope="module")
def checks():
    """The program per mode."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(MODES, pool.map(lambda mode: build("checks", mode, SOURCES), MODES), strict=True))


def names(kind: str) -> list[str]:
    return re.findall(r"^\s*CHECK\((\w+),", (CHECKS / f"{kind}.cu").read_text(), re.MULTILINE)


def lines_of(name: str) -> range:
    """The lines of a kernel in wrong.cu."""
    lines = (CHECKS / "wrong.cu").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if f"CHECK_KERNEL({name})" in line)
    return range(first + 1, next(i for i in range(first, len(lines)) if lines[i] == "}") + 2)


def ends(text: str) -> dict[str, str]:
    """What a program said of each kernel."""
    parts = re.split(r"^(\w+): (?=as wanted|wrong, |failed, )", text, flags=re.MULTILINE)
    assert parts[0] == "", text
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_wrong_kernel_has_a_mode_that_must_notice_it():
    assert set(names("wrong")) == {*FAILS, *SHOWS, *MEMORY, *RACES}


@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_correct_kernels_are_silent(checks, mode, schedule):
    ran = run(checks[mode], *names("right"), schedule=schedule)
    assert ends(ran.text) == dict.fromkeys(names("right"), "as wanted\n") and ran.code == 0, ran.text


@pytest.mark.parametrize("mode", MODES)
def test_launches_come_from_any_thread(checks, mode):
    ran = run(checks[mode], "threads", schedule="warps")
    assert ran.code == 0 and ran.text.count(": as wanted\n") == 4 * len(names("right")), ran.text


@pytest.mark.parametrize(("mode", "schedule"), RUNS)
def test_broken_rules_end_the_launch(checks, mode, schedule):
    ran = run(checks[mode], *FAILS, schedule=schedule)
    said = ends(ran.text)
    assert ran.code == 1 and said.keys() == FAILS.keys(), ran.text
    for name, wanted in FAILS.items():
        assert said[name].startswith((f"failed, {name}, block (0, 0, 0): ", "failed, cudaError")), said[name]
        assert re.search(wanted, said[name]), said[name]


def test_mistakes_show_in_the_numbers(checks):
    shown = [ends(run(checks["plain"], *SHOWS, schedule=schedule, seed=3).text) for schedule in SCHEDULES]
    for name, schedules in SHOWS.items():
        said = [each[name] for each in shown]
        assert sum(text.startswith("wrong, out[") for text in said) >= schedules, f"{name}: {said}"


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_checked_to_the_byte(checks, name):
    for schedule in ("forward", "threads"):
        ran = run(checks["memory"], name, schedule=schedule)
        assert ran.code == 66 and re.search(MEMORY[name], ran.text), ran.text
        line = re.search(r"wrong\.cu:(\d+)", ran.text)
        assert line and int(line[1]) in lines_of(name), ran.text


@pytest.mark.parametrize("name", RACES)
def test_races_are_found_whatever_the_order(checks, name):
    schedule = SCHEDULES[RACES.index(name) % 4]
    ran = run(checks["races"], name, schedule=schedule)
    assert ran.code == 66 and "ThreadSanitizer: data race" in ran.text, f"{schedule}: {ran.text}"
    found = places(checks["races"], ran.text)
    assert any(file == "wrong.cu" and line in lines_of(name) for file, line in found), f"{found}\n{ran.text}"


def test_a_seed_is_replayed(checks):
    def said(seed):
        return run(checks["plain"], "barrier_missing_after_write", schedule="threads", seed=seed).text

    first = [said(seed) for seed in range(1, 9)]
    assert first == [said(seed) for seed in range(1, 9)]
    assert len(set(first)) > 4


def test_limits_are_those_of_the_architecture(checks):
    takes = [run(checks["plain"], "most_dynamic_memory", architecture=a).code == 0 for a in (80, 86, 89, 90, 100, 120)]
    assert takes == [True, False, False, True, True, False]


def test_launches_are_logged(checks):
    logged = run(checks["plain"], "log").text.split("launches\n")[1].splitlines()
    assert len(logged) == len(names("right"))
    assert logged[:2] == ["sum_by_shuffles 1x1x1 256x1x1 0 32", "scan_by_shuffles 1x1x1 256x1x1 0 0"]
    assert {"three_dimensions 2x2x2 2x4x4 0 0", "vectors_in_dynamic_memory 1x1x1 256x1x1 1024 0"} < {*logged}


def test_the_fallback_for_other_processors():
    program = build("ucontext", "plain", SOURCES, emulator=("-DCUDA_EMULATOR_UCONTEXT",))
    assert run(program, *names("right"), schedule="threads").code == 0
    assert "deadlock" in run(program, "barrier_that_some_skip", schedule="threads").text
