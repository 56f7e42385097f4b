"""A run goes on exactly: killed at random moments, interrupted, with a torn or broken checkpoint, with a full disk."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenflow.training import folder as folders
from tokenflow.training.engine import train
from tokenflow.training.pictures import TrainingSet, _leave_stopping
from training_runs import child, curve, fork_server, pictures, small

KILLS = 20
STEPS = 40


@pytest.fixture(scope="module")
def forks():
    with fork_server() as context:
        yield context


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run of six steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train(short(data, out))
    torch.set_num_threads(before)
    return out


def short(data: Path, out: Path, **changes):
    return small("tokenflow-tiny", data, out, **{"schedule": "constant", "save_every": 2, **changes})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(data, out):
    """A run in which every part has a state: discriminator, LeCam, averages, revival, scale dropout."""
    return small(
        "tokenflow-tiny", data, out, steps=STEPS, save_every=3, adversarial=0.5, adversarial_from=10, lecam=0.1,
        patchgan_norm="batch", augment=True, crop="random",
    )  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_run(out: Path, other: Path) -> None:
    assert curve(out) == curve(other), "the loss curves differ"
    mine, theirs = weights(out), weights(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    states = [folders.Folder(path).newest() for path in (out, other)]
    assert str(states[0]) == str(states[1]), "some state differs"


def wait(until, process, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while not until():
        assert process.is_alive() and time.monotonic() < end, f"the run ended by itself: {process.exitcode}"
        time.sleep(0.0005)


def test_killed_twenty_times_the_curve_is_the_same(data, tmp_path, forks):
    """Every second kill falls into the writing of a checkpoint or of the model, the others anywhere."""
    train(everything(data, tmp_path / "whole"))
    out, draw = tmp_path / "killed", random.Random(0)
    landed = torn = 0
    log = out / "log.jsonl"
    while landed < KILLS:
        process = forks.Process(target=child, args=(everything(data, out),))
        process.start()
        began = started(process)
        lines = len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").exists() else 0
        # It has begun to train: the log was cut to the checkpoint and grows, or is written for the first time.
        wait(lambda: log.exists() and log.stat().st_mtime > began and log.read_text().count("\n") > 0, process)
        if landed % 2:
            wanted = newest_step(out) + 3 * draw.randrange(2)
            wait(lambda: newest_step(out) >= wanted and any(out.glob("*/*.part")), process)
            time.sleep(draw.uniform(0, 0.02))
        else:
            time.sleep(draw.uniform(0, 0.4))
        assert process.is_alive(), f"the run ended before kill {landed}, after {lines} lines"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        landed += 1
        torn += any(out.glob("*/*.part"))
        done = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
        assert max(done, default=0) - newest_step(out) <= 3, "more was lost than the steps since the last checkpoint"
    assert torn >= 3, "no kill fell into the writing of a file"
    train(everything(data, out))
    assert_same_run(out, tmp_path / "whole")
    assert not any(out.glob("*/*.part"))


def newest_step(out: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in (out / "checkpoints").glob("step-*.pt")), default=0)


def started(process) -> float:
    """When the process began, as files count time."""
    return os.stat(f"/proc/{process.pid}").st_mtime


def stopping_at(step: int, number: int, monkeypatch):
    """Send this process a signal when a run's log comes to a step."""
    append = folders.Folder.append

    def stop(self, line):
        append(self, line)
        if line["step"] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(folders.Folder, "append", stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(data, whole, tmp_path, monkeypatch, number, capsys):
    """At a step where no checkpoint is due; the same command, with other workers and more steps, goes on."""
    with monkeypatch.context() as patch:
        stopping_at(3, number, patch)
        with pytest.raises(KeyboardInterrupt):
            train(short(data, tmp_path / "cut", steps=5))
    assert [line["step"] for line in curve(tmp_path / "cut")] == [1, 2, 3]
    train(short(data, tmp_path / "cut", workers=1))
    assert "going on from step 3" in capsys.readouterr().err
    assert_same_run(tmp_path / "cut", whole)


def test_a_finished_run_stays_as_it_is(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=2)
    model = train(config)
    before = (model / "model.safetensors").read_bytes()
    assert train(config) == model and (model / "model.safetensors").read_bytes() == before
    assert len(curve(tmp_path / "run")) == 2


def test_killed_behind_its_last_checkpoint_the_model_is_still_written(data, tmp_path):
    config = small("tokenflow-tiny", data, tmp_path / "run", steps=2)
    train(config)
    whole = weights(config.out)
    for file in (config.out / "model").iterdir():
        file.unlink()
    train(config)
    assert all(torch.equal(value, whole[name]) for name, value in weights(config.out).items())


def test_checkpoints_that_cannot_be_read_are_passed_over(data, whole, tmp_path, capsys):
    """The newest is cut in half by the file system: the one before it is taken, and the curve stays the same."""
    out = tmp_path / "torn"
    train(short(data, out, steps=4))
    newest = out / "checkpoints" / "step-00000004.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    (out / "checkpoints" / "step-00000006.pt.part").write_bytes(b"torn")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    train(short(data, out))
    told = capsys.readouterr().err
    assert "step-00000004.pt cannot be read" in told and "going on from step 2" in told
    assert_same_run(out, whole)
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="wanted a checkpoint that can be read"):
        train(short(data, out))


def test_readers_leave_stopping_to_the_run(data, tmp_path):
    """torchrun and schedulers send SIGTERM to every process: the run has to live until it has saved."""
    config = short(data, tmp_path / "run", steps=40, workers=1)
    batches = TrainingSet(config, (16, 16)).batches(0)
    next(batches)
    (reader,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(reader.pid, number)
    assert sum(1 for _ in batches) == 39  # more than were read ahead


def hanging(ready):
    _leave_stopping(0)
    ready.set()
    while True:
        time.sleep(1)


def test_a_reader_that_hangs_can_be_ended():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    reader = context.Process(target=hanging, args=(ready,), daemon=True)
    reader.start()
    assert ready.wait(20)
    reader.terminate()
    reader.join(0.3)
    assert reader.is_alive()
    reader.terminate()
    reader.join(20)
    assert reader.exitcode == -signal.SIGTERM


def test_readers_that_outlive_a_killed_run_do_not_keep_its_folder(data, tmp_path):
    config = short(data, tmp_path / "run")
    killed = folders.Folder(config.out)
    killed.claim(config, {})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # as a worker of DataLoader
        os.write(writer, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"1"
        with pytest.raises(ValueError, match="where a run goes on"):
            folders.Folder(config.out).claim(config, {})
        killed.release()  # as the system does with a process that is gone
        folders.Folder(config.out).claim(config, {})
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes files above 1 kB fail while the checkpoint of a step is written, as a full disk does."""
    save, limits = folders.Folder.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def at(step: int) -> None:
        def limited(self, state, keep):
            if state["step"] == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
            try:
                save(self, state, keep)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(folders.Folder, "save", limited)

    yield at
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_keeps_the_former_checkpoint(data, whole, tmp_path, full_disk, capsys):
    full_disk(4)
    out = tmp_path / "full"
    train(short(data, out))
    told = capsys.readouterr().err
    assert "the checkpoint of step 4 could not be written" in told and "training goes on" in told
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002.pt", "step-00000006.pt"]
    assert_same_run(out, whole)


def test_a_full_disk_at_the_end_is_an_error(data, tmp_path, full_disk):
    full_disk(6)
    out = tmp_path / "full"
    with pytest.raises(OSError, match="the checkpoint of step 6 could not be written"):
        train(short(data, out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002.pt", "step-00000004.pt"]
    full_disk(0)
    train(short(data, out))
    assert [line["step"] for line in curve(out)] == [1, 2, 3, 4, 5, 6]
