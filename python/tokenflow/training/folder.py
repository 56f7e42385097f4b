"""The folder of a run: its config, its lock, its log, and checkpoints of which a torn one is never read.

config.json  log.jsonl  checkpoints/step-00001000.pt  model/  pictures/step-00001000.png  tensorboard/
"""

from __future__ import annotations

import json
import os
import re
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from tokenflow.files import write_whole
from tokenflow.training.config import Config, as_json, differing, from_json
from tokenflow.training.run import write_atomically

CONFIG, LOG, TEACHER = "config.json", "log.jsonl", "teacher.safetensors"
BEFORE_CONFIG = {"lock", "checkpoints", TEACHER}


class Folder:
    """A run's folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self._lock: Any = None

    def claim(self, config: Config, pictures: dict[str, Any]) -> None:
        """Make the folder, or find it made by the same run; until this process ends, no other one may claim it.

        Args:
            config: of the run.
            pictures: names the data set.

        Raises:
            ValueError: it holds something else, a run with other settings or pictures, or one that is running.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"train: out: wanted a folder, got the file {self.path}")
        known = (self.path / CONFIG).exists()
        if not known and self.path.exists() and any(p for p in self.path.iterdir() if p.name not in BEFORE_CONFIG):
            raise ValueError(
                f"train: out: wanted a new folder, or one of a run, got {self.path} with other things in it"
            )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if known:
            self._compare(config, pictures)
        else:  # of a run that never began, perhaps of other pictures
            (self.path / TEACHER).unlink(missing_ok=True)

    def begin(self, config: Config, pictures: dict[str, Any]) -> None:
        """Write config.json: from here on the folder is that run's."""
        content = {"run": json.loads(as_json(config)), "pictures": pictures}
        write_whole(self.path / CONFIG, json.dumps(content, indent=2) + "\n")

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        self._lock = (self.path / "lock").open("w")
        # The processes that read pictures outlive a killed run by seconds, in which the same command must be able to go on.
        # What is registered stays for ever, and must not keep the lock of a run that failed.
        held = weakref.ref(self._lock)
        os.register_at_fork(after_in_child=lambda: None if held() is None else held().close())
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"train: out: wanted a folder that nobody writes to, got {self.path}, where a run goes on"
            ) from None

    def release(self) -> None:
        """Let others claim the folder."""
        if self._lock is not None:
            self._lock.close()

    def _compare(self, config: Config, pictures: dict[str, Any]) -> None:
        before = read_config(self.path)
        told = differing(config, before)
        found = json.loads((self.path / CONFIG).read_text())["pictures"]
        told += [
            f"{name} {value} instead of {found.get(name)}"
            for name, value in pictures.items()
            if value != found.get(name)
        ]
        if told:
            raise ValueError(
                f"train: out: {self.path} belongs to a run with other settings ({', '.join(told)}): choose another --out, or "
                f"go on with its own by `tokenflow train --resume {self.path}`"
            )

    def save(self, state: dict[str, Any], keep: int) -> None:
        """Write the checkpoint of state["step"] and remove all but the newest `keep`.

        Raises:
            OSError: the disk is full; the former checkpoints are still there.
        """
        path = self.checkpoints / f"step-{state['step']:08}.pt"
        try:
            write_atomically(state, path)
        except (OSError, RuntimeError) as error:
            path.with_name(path.name + ".part").unlink(missing_ok=True)
            reason = (str(error).splitlines() or [""])[0]
            raise OSError(f"train: the checkpoint of step {state['step']} could not be written ({reason})") from error
        for old in self._saved()[:-keep]:
            old.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None where there is none; one that cannot is said and left.

        Raises:
            ValueError: there are some, and none can be read.
        """
        saved = self._saved()
        for path in reversed(saved):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"tokenflow: {path} cannot be read ({reason})", file=sys.stderr)
        if saved:
            raise ValueError(f"train: out: wanted a checkpoint that can be read, got none in {self.checkpoints}")
        return None

    def tidy(self, step: int) -> None:
        """Remove torn files, and what the log says of steps behind the checkpoint that the run goes on from."""
        for torn in self.checkpoints.glob("*.part"):
            torn.unlink()
        path = self.path / LOG
        if path.exists():
            kept = []
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (KeyError, TypeError, ValueError):  # cut off when the process died
                    continue
            write_whole(path, "".join(line + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.path / LOG).open("a") as handle:
            handle.write(json.dumps(line) + "\n")

    def _saved(self) -> list[Path]:
        return sorted(p for p in self.checkpoints.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", p.name))


def read_config(path: Path) -> Config:
    """The config of a run's folder.

    Raises:
        FileNotFoundError: no run's folder.
        ValueError: a config of another version.
    """
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"train: resume: wanted the folder of a run, with {CONFIG}, got {path}")
    try:
        values = json.loads(file.read_text())["run"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"train: resume: wanted the folder of a run, got {path} with another {CONFIG}") from error
    return from_json(Config, values)
