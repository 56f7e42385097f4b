"""Programs of their own keep freed memory, a process that only imports us does not."""

import os
import subprocess
import sys

import pytest
import tokenflow.cli
from tokenflow.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from tokenflow.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else True
def work():
    x = torch.ones(2**24)
    return (x + 1) * 2
for _ in range(4):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_pages_are_handed_out_once():
    def faults(how):
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=paths
        )
        told, count = done.stdout.split()
        return told == "True", int(count)

    told, count = faults("kept")
    if not told:
        pytest.skip("no glibc here")
    # Twelve maps of 64 MB, each 16,384 pages of 4 KB or 32 of 2 MB; one may still find no hole that fits.
    assert count < 0.2 * faults("returned")[1]


@pytest.mark.parametrize(("as_program", "words", "kept"), [
    (True, ["reconstruct", "absent.png"], 1),
    (True, ["encode", "absent.png"], 1),
    (True, ["demo", "--data", "no/such/folder"], 0),
    (False, ["encode", "absent.png"], 0),
])  # fmt: skip
def test_commands_that_run_a_model_over_pictures_do(monkeypatch, tmp_path, as_program, words, kept):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenflow.cli, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(sys, "argv", ["tokenflow", *words])
    with pytest.raises(SystemExit):
        tokenflow.cli.main(None if as_program else words)
    assert len(calls) == kept


@pytest.mark.parametrize("library", [TypeError, lambda name: object()])
def test_elsewhere_it_says_no(monkeypatch, library):
    def load(name):
        if library is TypeError:
            raise TypeError
        return library(name)

    monkeypatch.setattr("ctypes.CDLL", load)
    assert keep_freed_memory() is False
