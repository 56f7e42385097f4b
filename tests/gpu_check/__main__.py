"""`make gpu-check`: is this machine's GPU fit for the kernels, and they for it? One process a check, one table at the end.

A check that fails, crashes or hangs says so in its row and takes nothing else with it. Exit status: 0 where all passed
or had to be skipped, 1 where one did not, 2 where there is no GPU to check. `--emulated` rehearses every line on the
emulated kernels.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
# The source tree would shadow the installed package, unless the core was built in place, and tests/cuda NVIDIA's cuda.
sys.path[:1] = [str(TESTS.parent)] if any((TESTS.parent / "tokenflow_ext").glob("_C*.so")) else []
sys.path.append(str(TESTS))

from gpu_check.plan import BEFORE_ALL, Check, NoGpu, Skip, plan  # noqa: E402

GOOD = ("passed", "skipped")


@dataclass
class Row:
    """How a check ended."""

    name: str
    seconds: float = 0
    result: str = "not run"
    detail: str = ""


def arguments():
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.split("\n")[0])
    parser.add_argument("--emulated", action="store_true", help="rehearse on the emulated kernels, without a GPU")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the checks whose names contain it, and the first three"
    )
    parser.add_argument("--jobs", type=int, default=1, help="checks at a time, after the first three")
    parser.add_argument("--timeout", type=float, help="seconds for every check, in place of its own")
    parser.add_argument(
        "--break", dest="broken", action="append", default=[], metavar="CHECK=fail|crash|hang",
        help="for tests of this program: makes a check end so",
    )  # fmt: skip
    parser.add_argument("--check", help=argparse.SUPPRESS)  # what a child runs
    parser.add_argument("--call", help=argparse.SUPPRESS)  # module:function, what a child's child runs
    return parser.parse_args()


def place(emulated: bool):
    from gpu_check.place import Gpu, Rehearsal

    return Rehearsal() if emulated else Gpu()


def child(given) -> None:
    """Runs one check and writes how it ended."""
    check = next(check for check in plan(given.emulated) if check.name == given.check)
    for broken in given.broken:
        how = broken.removeprefix(f"{check.name}=")
        if how == "crash":
            os.abort()
        if how == "hang":
            time.sleep(1e6)
        if how == "fail":
            check = Check(check.name, "checks_that_fail", "")
    try:
        result, detail = "passed", check.call()(place(given.emulated), *check.arguments)
    except (Skip, NoGpu) as reason:
        result, detail = "skipped" if isinstance(reason, Skip) else "no gpu", str(reason)
    except BaseException as error:  # pytest's failures are no Exception
        traceback.print_exc()
        said = (str(error).splitlines() or [""])[0]
        result, detail = "failed", said if isinstance(error, AssertionError) else f"{type(error).__name__}: {said}"
    Path(os.environ["GPU_CHECK_FOLDER"], f"{check.name}.json").write_text(json.dumps([result, detail]))


def run(check: Check, given, folder: Path) -> Row:
    """The check in a process of its own, killed with its children when its time is up."""
    row, log = Row(check.name), folder / f"{check.name}.log"
    limit = given.timeout or check.seconds
    command = [sys.executable, __file__, *sys.argv[1:], "--check", check.name]
    environment = {**os.environ, "GPU_CHECK_FOLDER": str(folder), "PYTHONFAULTHANDLER": "1"}
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
    row.seconds = time.monotonic() - start
    ended = folder / f"{check.name}.json"
    if code is None:
        row.result, row.detail = "hung", f"killed after {limit:g} s; {last_line(log)}"
    elif ended.exists():
        row.result, row.detail = json.loads(ended.read_text())
    else:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        row.result, row.detail = "crashed", f"{how}; {last_line(log)}"
    return row


def kill(process: subprocess.Popen) -> None:
    """With its children; a process that waits inside the driver may not go, and is then left alone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} could not be killed", flush=True)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"last said: {lines[-1].strip()}" if lines else "said nothing"


def table(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    lines = [f"{'check':{width}}  seconds  result   detail"]
    lines += [f"{row.name:{width}}  {row.seconds:7.1f}  {row.result:7}  {row.detail}" for row in rows]
    return "\n".join(lines)


def run_all(checks: list[Check], rows: dict[str, Row], given, folder: Path) -> None:
    """The first ones alone, then `jobs` at a time; rows are filled as they end."""
    print(f"{len(checks)} checks, what they say goes to {folder}", flush=True)

    def one(check: Check) -> None:
        print(f"  {check.name} ...", flush=True)
        row = rows[check.name] = run(check, given, folder)
        done = sum(r.result != "not run" for r in rows.values())
        print(f"[{done}/{len(checks)}] {row.name}: {row.result}, {row.seconds:.1f} s, {row.detail}", flush=True)

    for check in checks[:BEFORE_ALL]:
        one(check)
        if check is checks[0] and rows[check.name].result != "passed":
            return
    pool = ThreadPoolExecutor(given.jobs)
    try:
        for _ in pool.map(one, checks[BEFORE_ALL:]):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> int:
    given = arguments()
    if given.call:
        from importlib import import_module

        module, function = given.call.split(":")
        print(getattr(import_module(f"gpu_check.{module}"), function)(place(given.emulated)))
        return 0
    if given.check:
        child(given)
        return 0
    checks = plan(given.emulated)
    checks = [check for i, check in enumerate(checks) if i < BEFORE_ALL or given.only in check.name]
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    rows, start = {check.name: Row(check.name) for check in checks}, time.monotonic()
    try:
        run_all(checks, rows, given, folder)
    except KeyboardInterrupt:
        print("interrupted")
    first = rows[checks[0].name]
    if first.result == "no gpu":
        shutil.rmtree(folder)
        print(first.detail)
        return 2
    print("\n" + table(list(rows.values())))
    bad = [row.name for row in rows.values() if row.result not in GOOD]
    if bad:
        print(f"\n{len(bad)} of {len(rows)} checks did not pass: {', '.join(bad)}. What they said: {folder}")
        return 1
    shutil.rmtree(folder)
    print(f"\n{len(rows)} checks in {time.monotonic() - start:.0f} s, none failed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
