"""`make gpu-check`, rehearsed: every line of it runs on the emulated kernels, and what is wrong shows in its table."""

import re
import subprocess
import sys
from pathlib import Path

import emulator
import pytest
import torch
from emulator.kernels import OPS
from gpu_check import calls, machine, sanitizer, tensor_cores
from gpu_check.place import Gpu, Rehearsal, State
from gpu_check.plan import BEFORE_ALL, NoGpu, plan
from harness import normal

PROGRAM = Path(__file__).with_name("gpu_check")


def gpu_check(*options: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    """(exit status, {check: (result, detail)} of its table, all that it said)."""
    done = subprocess.run([sys.executable, PROGRAM, *options], capture_output=True, text=True, timeout=900)
    _, _, told = done.stdout.partition("\ncheck ")
    rows = re.findall(r"^(\S.*?) +\d+\.\d  (passed|failed|crashed|hung|skipped|not run) +(.*)$", told, re.MULTILINE)
    return done.returncode, {name: (result, detail) for name, result, detail in rows}, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def built():
    """The emulated kernels, so that no check waits for their compiler."""
    return emulator.core()


def test_every_check_runs_in_the_rehearsal():
    code, rows, text = gpu_check("--emulated", "--jobs", "2")
    assert code == 0, text
    assert list(rows) == [check.name for check in plan(emulated=True)]
    skipped = {name: detail for name, (result, detail) in rows.items() if result != "passed"}
    assert not skipped or (set(skipped) == {"tensor cores"} and "missing" in skipped["tensor cores"]), text


def test_what_fails_crashes_or_hangs_is_listed_with_all_others():
    timing = "timing lookup, TokenFlow's pixel table"
    broken = {"op lookup": "fail", "op lookup_backward": "crash", timing: "hang"}
    options = [word for check, how in broken.items() for word in ("--break", f"{check}={how}")]
    code, rows, text = gpu_check("--emulated", "--jobs", "2", "--only", "lookup", "--timeout", "20", *options)
    ended = {"fail": "failed", "crash": "crashed", "hang": "hung"}
    wanted = {check: ended[how] for check, how in broken.items()}
    assert code == 1 and {name: result for name, (result, _) in rows.items() if result != "passed"} == wanted, text
    assert set(rows) == {c.name for i, c in enumerate(plan(emulated=True)) if i < BEFORE_ALL or "lookup" in c.name}
    assert "SIGABRT" in rows["op lookup_backward"][1] and "after 20 s" in rows[timing][1]


def test_a_failure_of_the_first_check_ends_the_others():
    code, rows, _ = gpu_check("--emulated", "--break", "driver and device=fail")
    assert code == 1 and [result for result, _ in rows.values()] == ["failed", *["not run"] * (len(rows) - 1)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_a_sentence_and_an_exit_status():
    code, rows, text = gpu_check()
    assert code == 2 and not rows and re.search(r"no GPU: .*\.|built without (nvcc|CUDA)", text.splitlines()[-1]), text
    assert "Traceback" not in text


def test_the_list_of_checks_needs_no_torch():
    """It stands, and is printed, where torch does not import."""
    script = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); from gpu_check.plan import plan; plan(False); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


OLD = "tokenflow_ext: CUDA: wanted a driver of CUDA 13, 580 or newer, got an older one"


@pytest.mark.parametrize(
    ("state", "error", "sentence"),
    [
        (State([], "", "13.0", True), NoGpu, "built without nvcc"),
        (State(["sm_80"], "tokenflow_ext: CUDA: wanted a driver of NVIDIA, got none", "13.0", False), NoGpu, "no GPU"),
        (State(["sm_80"], "wanted the ordinal of a device, got another number", "13.0", False), NoGpu, "no GPU"),
        (State(["sm_80"], OLD, "13.0", False), AssertionError, "580 or newer"),
        (State(["sm_80"], "wanted a device of compute capability 8.0 or newer", "13.0", True), AssertionError, "8.0"),
        (State(["sm_80"], "", None, False), NoGpu, "built without CUDA"),
        (State(["sm_80"], "", "13.0", False), AssertionError, "torch wants a newer driver"),
    ],
)
def test_what_is_missing_is_told(state, error, sentence, monkeypatch):
    monkeypatch.setattr(Rehearsal, "state", lambda self: state)
    with pytest.raises(error, match=sentence):
        machine.driver(Rehearsal())


def test_without_its_tool_the_driver_is_unknown(monkeypatch):
    monkeypatch.setattr(Rehearsal, "driver_command", ["no-such-program"])
    assert "driver unknown" in machine.driver(Rehearsal())


@pytest.fixture(scope="module")
def recorded():
    """A call of lookup and one of its backward."""
    from replay import record

    from tokenflow_ext import ops

    ids, table = torch.randint(9, (30, 2)), normal(2, 9, 8, seed=1).requires_grad_()
    with record() as kept:
        ops.lookup(ids, table).square().sum().backward()
    return {call.op: call for call in kept}


class Wrong(Rehearsal):
    """Runs the right kernel and then does one thing wrong."""

    def __init__(self, wrong):
        super().__init__()
        self._wrong = wrong

    @property
    def core(self):
        right = super().core

        class Core:
            def __getattr__(core, name):
                function = getattr(right, name)

                def call(*arguments):
                    function(*arguments)
                    self._wrong(*arguments)

                return call if name.startswith("lookup") else function

        return Core()


def beyond(tensor: torch.Tensor) -> torch.Tensor:
    """The byte behind a tensor."""
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), end, (1,))


@pytest.mark.parametrize(
    ("op", "wrong", "told"),
    [
        ("lookup", lambda ids, table, rows, *_: None, None),
        ("lookup", lambda ids, table, rows, *_: beyond(rows).add_(1), "written outside a tensor"),
        ("lookup", lambda ids, table, rows, *_: rows[7, 1, 3:4].view(torch.int32).add_(1), "1 numbers of rows differ"),
        ("lookup", lambda ids, table, rows, *_: ids[0].add_(1), "2 numbers of indices differ"),
        ("lookup", lambda ids, table, rows, device, stream, counts: counts.add_(1), r"counted \(1, 1\)"),
        ("lookup_backward", lambda ids, upstream, grad, *_: grad[0, 0, 0].add_(3e-3), "grad_codebook: error 0.003"),
    ],
)
def test_a_wrong_kernel_fails(recorded, op, wrong, told):
    place = Wrong(wrong)
    for shifted in (False, True):
        placed = calls.Placed(recorded[op], place, shifted)
        if told is None:
            calls.run(placed, "")
            continue
        with pytest.raises(AssertionError, match=told):
            calls.run(placed, "")


def test_a_stream_that_is_not_waited_for_fails(recorded):
    class Hasty(Rehearsal):
        def submit(self, stream, call):
            call()

    with pytest.raises(AssertionError, match="lookup: ran on another stream"):
        calls.on_a_stream(calls.Placed(recorded["lookup"], Hasty()))


def test_a_capture_that_runs_and_a_replay_that_does_not_fail(recorded):
    class Runs(Rehearsal):
        def captured(self, call):
            call()
            return call

    class Sleeps(Rehearsal):
        def captured(self, call):
            return lambda: None

    with pytest.raises(AssertionError, match="it ran while it was captured"):
        calls.in_a_graph(calls.Placed(recorded["lookup"], Runs()))
    with pytest.raises(AssertionError, match="replay 1 of a graph.* numbers of rows differ"):
        calls.in_a_graph(calls.Placed(recorded["lookup"], Sleeps()))


def test_what_a_sanitizer_finds_fails(monkeypatch):
    said = "print('========= ERROR SUMMARY: 3 errors'); raise SystemExit(7)"
    monkeypatch.setattr(sanitizer, "tool", lambda place: [sys.executable, "-c", said])
    with pytest.raises(AssertionError, match="memcheck ended with 7: ERROR SUMMARY: 3 errors"):
        sanitizer.under(Rehearsal(), "memcheck")


@pytest.mark.parametrize("op", [op for op in OPS if op != "mma_probe"])
def test_every_op_is_right_amid_guards(op, everything):
    """The check that a GPU has to pass, of the ops that the rehearsal leaves out too."""
    assert re.match(r"\d+ calls", calls.op(Rehearsal(), op))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPU_CHECK_FOLDER", str(tmp_path_factory.mktemp("gpu_check")))
        calls.record_all(Rehearsal())
        yield


def test_sums_off_by_the_whole_bound_fail(built, monkeypatch):
    """Tensor cores that add worse than any GPU known use more than a quarter of the bound."""
    if not hasattr(built, "mma_probe"):
        pytest.skip("this tree has no mma_probe")
    monkeypatch.setattr(tensor_cores, "run_tests", lambda *_: "")
    emulator.configure(built, tensor_cores="worst_up")
    with pytest.raises(AssertionError, match="of the bound"):
        tensor_cores.layout_and_sums(Rehearsal())
    emulator.configure(built)
    assert "largest error" in tensor_cores.layout_and_sums(Rehearsal())


def test_every_line_of_the_gpu_runs_in_the_rehearsal():
    """But what says where the kernels are: the stand-in takes the place of torch.cuda, not of the lines that call it."""
    own = {name for name, value in vars(Rehearsal).items() if callable(value) or isinstance(value, property)}
    assert own == {"__init__", "core", "built"} and isinstance(Rehearsal(), Gpu)
