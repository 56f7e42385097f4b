"""The PTX that nvcc makes of the CUDA kernels, run in emulation: the bits of the source, on the recorded calls of every op.

Between the source and the GPU lie nvcc's front end, its optimiser, inline assembly, fused or unfused arithmetic and declared
alignment: all of them are in the PTX, which emulator/ptx.py translates to C++ and an instruction that it does not know stops.
`make test-cuda-full` takes every architecture.
"""

import os
import re

import pytest
import test_emulator as checks
import torch
from emulator.kernels import KERNELS, expected, noticed, noticed_by_parts, ptx_program, replay, some
from emulator.nvcc import nvcc, ptx_of, translation
from emulator.programs import SCHEDULES, build
from emulator.ptx import translated
from emulator.ptx_instructions import NotTranslated
from replay import differences

pytestmark = pytest.mark.skipif(not nvcc(), reason="nvcc was not found")

FULL = os.environ.get("TOKENFLOW_CUDA_FULL") == "1"
ARCHITECTURES = (80, 86, 89, 90, 100, 120) if FULL else (80, 120)
"""Two compilers make them: one what comes before compute_100, another the later ones."""


EXPONENTIALS = ("entropy_loss", "entropy_loss_backward", "soft_quantize", "soft_quantize_backward")
"""Ops that take expf. CUDA makes it of ex2.approx, the host of its library: the last bits are others, as on a GPU."""


def beyond(call, made, share: float) -> list[str]:
    """The tensors of a call that are further off than this share of their greatest number."""
    error, counts, buffers = made
    assert (error, counts) == (call.error, call.counts)
    far = []
    for name, (type, buffer) in call.tensors.items():
        if type == 4:
            assert buffers[buffer] == call.after[buffer], f"{call.op}: {name}"
            continue
        dtype = {0: torch.float32, 2: torch.float16, 3: torch.bfloat16}[type]
        step = torch.finfo(dtype).eps if dtype != torch.float32 else share
        wanted, got = (
            torch.frombuffer(bytearray(b), dtype=dtype).double() for b in (call.after[buffer], buffers[buffer])
        )
        greatest = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else 1
        if not torch.allclose(got, wanted, rtol=0, atol=float(step * greatest), equal_nan=True):
            far.append(f"{call.op}: {name} {(got - wanted).abs().nan_to_num().max() / greatest:.1e} off")
    return far


def differing(calls, made) -> list[str]:
    """What is wrong about the results: any bit, and of the exponentials' more than the last bits."""
    exact = [i for i, call in enumerate(calls) if call.op not in EXPONENTIALS]
    far = [said for i, call in enumerate(calls) if i not in exact for said in beyond(call, made[i], 2e-6)]
    return differences([calls[i] for i in exact], [made[i] for i in exact]) + far


@pytest.mark.parametrize("schedule", SCHEDULES if FULL else ("forward", "threads"))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bits_of_the_source(architecture, schedule):
    """No number differs, but for the last bits of exponentials; every launch comes from PTX, every kernel in the PTX runs, and most of its instructions."""
    calls = expected() + (expected("wide") if schedule == "forward" else [])
    ran, made = replay(ptx_program("plain", architecture), calls, schedule=schedule, architecture=architecture)
    assert ran.code == 0, ran.text
    assert differing(calls, made) == []
    launches = re.findall(r"^\S.*: \d+ threads, .* shared bytes(.*)$", ran.text, re.MULTILINE)
    assert len(launches) > 1000 and set(launches) == {", from PTX"}
    covered = re.findall(r"^PTX: (\d+) of (\d+) instructions of (.*) ran;", ran.text, re.MULTILINE)
    entries = [name for file in KERNELS for name in re.findall(r"\.entry (\w+)", ptx_of(file, architecture))]
    assert len(covered) == len(entries) > 50 and [name for some, _, name in covered if some == "0"] == []
    some, all_ = (sum(int(each[i]) for each in covered) for i in (0, 1))
    print(f"compute_{architecture}: {some} of {all_} instructions ran")
    if schedule == "forward":
        assert some / all_ > 0.6  # the others are copies of a loop's body, for more rounds or another type


def test_races():
    """ThreadSanitizer on the PTX: here of some ops, in the full run of all."""
    only = () if FULL else ("code_statistics.cu", "ema_update.cu", "lookup.cu", "normalize_rows.cu", "sums.cu")
    names = [name.removesuffix(".cu") for name in only]
    program, calls = ptx_program("races", 80, only), expected()
    calls = calls if FULL else some([call for call in calls if call.op in names], 3)
    assert len({call.op for call in calls}) >= 4
    assert noticed_by_parts(program, calls, compare=differing, schedule="warps") == ""


@pytest.mark.skipif(not FULL, reason="takes long: make test-cuda-full")
@pytest.mark.parametrize("architecture", (80, 120))
def test_memory(architecture):
    program = ptx_program("memory", architecture)
    assert noticed_by_parts(program, expected(), compare=differing, schedule="threads") == ""


# The emulator's checks hold for kernels from PTX: those that test the emulator, made by nvcc.


def checked(mode: str, architecture: int):
    include = (f"-I{checks.CHECKS}",)
    sources = [translation(checks.CHECKS / name, architecture, include) for name in ("wrong.cu", "right.cu")]
    return build(f"checks-ptx-{architecture}", mode, {**checks.SOURCES, **dict.fromkeys(sources, ())})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_correct_kernels_are_silent_and_broken_rules_end_the_launch(architecture):
    program = checked("plain", architecture)
    for schedule in SCHEDULES:
        checks.test_correct_kernels_are_silent({"plain": program}, "plain", schedule)
        checks.test_broken_rules_end_the_launch({"plain": program}, "plain", schedule)
    checks.test_mistakes_show_in_the_numbers({"plain": program})


@pytest.mark.parametrize("name", ("shared_past_the_end", "dynamic_past_the_end", "global_past_the_end"))
def test_memory_is_checked_to_the_byte(name):
    checks.test_memory_is_checked_to_the_byte({"memory": checked("memory", 80)}, name)


def test_races_are_found_with_their_line():
    program = checked("races", 120)
    for name in checks.RACES:
        checks.test_races_are_found_whatever_the_order({"races": program}, name)


# What is wrong in the PTX is noticed.


def once(old: str, new: str, at: int = 0):
    """Replaces one occurrence of a pattern."""

    def edit(text: str) -> str:
        found = list(re.finditer(old, text))[at]
        return text[: found.start()] + found.expand(new) + text[found.end() :]

    return edit


BROKEN = {
    # what: source, edit, mode, what is said of it
    "a barrier less": ("sums.cu", once(r"bar\.sync \t?0;", ""), "plain", "differ|ended with -11"),
    "a barrier less, raced": ("sums.cu", once(r"bar\.sync \t?0;", ""), "races", r"data race.* sums\.cu:"),
    "a sum for a difference": ("sums.cu", once(r"add\.rn\.f64", "sub.rn.f64", 20), "plain", "numbers of .* differ"),
    "another operand": ("normalize_rows.cu", once(r"(fma\.rn\.f32 \t%\w+, %\w+, )%\w+", r"\1%f1"), "plain", "differ"),
    "a misaligned address": ("lookup.cu", once(r"(ld\.global\.v4\.u32 .*\[%rd\d+)\]", r"\1+8]"), "plain", "misaligned"),
    "a smaller array": (
        "sums.cu",
        once(r"(\.align 4 \.b8 \w+count)\[1024\]", r"\1[512]"),
        "memory",
        "use-after-poison",
    ),
    "fewer threads": ("sums.cu", once(r"\.maxntid 256", ".maxntid 128"), "plain", "__launch_bounds__ of count_kernel"),
    "a kernel less": (
        "sums.cu",
        once(r"(\.entry \w+?)count_kernel", r"\1tally_kernel"),
        "plain",
        "count_kernel is not among",
    ),
}
UNKNOWN = {
    "an instruction": once(r"add\.s32", "dp4a.s32.s32"),
    "a modifier": once(r"add\.rn\.f64", "add.rn.ftz.f64"),
    "arithmetic that may be fused": once(r"add\.rn\.f64", "add.f64"),
    "a named barrier's threads": once(r"bar\.sync \t?0;", "bar.sync 0, 64;"),
    "a directive": once(r"\.loc", ".local .b8 depot[8];\n.loc"),
    "an operand": once(r"%tid\.x", "%clock"),
    "an address": once(r"\[(%rd\d+)\]", r"[\1+%rd1]"),
    "what stands beside kernels": once(r"\.entry", ".global .f32 table[4];\n.entry"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_ptx_is_noticed(what):
    """Also by its line in the .cu file, where a sanitizer finds it."""
    file, edit, mode, wanted = BROKEN[what]
    op = {"sums.cu": "code_statistics"}.get(file, file.removesuffix(".cu"))
    calls, only = [call for call in expected() + expected("wide") if call.op == op], (file, f"{op}.cu")
    assert noticed(ptx_program(mode, 80, only), calls, schedule="warps") == ""
    said = noticed(ptx_program(mode, 80, only, edit), calls, schedule="warps")
    assert re.search(wanted, said), said


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_not_known_is_an_error(what):
    text = ptx_of(next(file for file in KERNELS if file.name == "sums.cu"), 80)
    translated(text, "file.cu")
    with pytest.raises(NotTranslated):
        translated(UNKNOWN[what](text), "file.cu")
