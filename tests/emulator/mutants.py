"""Kernels with one synchronisation less: each barrier, wait and fence removed, each atomic made a plain read and write.

A test that lets one of them pass would let the same mistake pass in a kernel. They are made by rewriting a file of
csrc/cuda, which is why kernels write these calls in one spelling and without macros around them.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from emulator.programs import FOLDER, ROOT

CUDA = ROOT / "csrc/cuda"
REMOVED = re.compile(r"(__syncthreads\(\)|__syncwarp\([^;()]*\)|cp_async_wait<[^<>;]*>\(\)|__threadfence\(\));")
ATOMIC = re.compile(r"\batomic(Add|Min|Max|And|Or|Exch|CAS)\(")
PLAIN = """
template <class T, class V> inline T plain_Add(T* at, V v) { const T old = *at; *at = old + v; return old; }
template <class T, class V> inline T plain_Min(T* at, V v) { const T old = *at; *at = v < old ? v : old; return old; }
template <class T, class V> inline T plain_Max(T* at, V v) { const T old = *at; *at = old < v ? v : old; return old; }
template <class T, class V> inline T plain_And(T* at, V v) { const T old = *at; *at = old & v; return old; }
template <class T, class V> inline T plain_Or(T* at, V v) { const T old = *at; *at = old | v; return old; }
template <class T, class V> inline T plain_Exch(T* at, V v) { const T old = *at; *at = v; return old; }
template <class T, class V> inline T plain_CAS(T* at, V if_, V v) { const T old = *at; *at = old == if_ ? v : old; return old; }
"""


@dataclass(frozen=True)
class Mutant:
    """One change of one file of csrc/cuda."""

    file: Path
    line: int
    what: str
    start: int
    end: int
    instead: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line} {self.what}"

    @cached_property
    def csrc(self) -> Path:
        """A folder with the changed file alone, to be searched before csrc."""
        folder = Path(FOLDER.name) / f"{self.file.name}-{self.start}" / "cuda"
        folder.mkdir(parents=True)
        text = self.file.read_text()
        (folder / self.file.name).write_text(text[: self.start] + self.instead + text[self.end :])
        (folder / "plain.h").write_text(PLAIN)
        return folder.parent

    def change(self, sources: dict[Path, tuple[str, ...]], source: Path) -> dict[Path, tuple[str, ...]]:
        """Sources of a program and their flags, one of them compiled with the change."""
        flags = f"-I{self.csrc}", "-include", str(self.csrc / "cuda/plain.h")
        changed = self.csrc / "cuda" / source.name if source == self.file else source
        return {changed if s == source else s: (*flags, *own) if s == source else own for s, own in sources.items()}


def reached(source: Path) -> set[Path]:
    """A file of csrc/cuda and those that it includes."""
    found, open_ = set(), [source]
    while open_:
        file = open_.pop()
        if file not in found:
            found.add(file)
            included = re.findall(r'^#include "cuda/([^"]+)"', file.read_text(), re.MULTILINE)
            open_ += [CUDA / name for name in included if (CUDA / name).exists()]
    return found


def mutants(file: Path) -> list[Mutant]:
    """Every mutant of a file, in its order."""
    text = file.read_text()
    code = re.sub(r"//[^\n]*", lambda comment: " " * len(comment[0]), text)
    made = []
    for pattern, what, instead in ((REMOVED, "without {}", ";"), (ATOMIC, "plain {}", r"plain_{}(")):
        for found in pattern.finditer(code):
            line = code.count("\n", 0, found.start()) + 1
            name = found[1] if pattern is REMOVED else f"atomic{found[1]}"
            made.append(Mutant(file, line, what.format(name), found.start(), found.end(), instead.format(found[1])))
    return sorted(made, key=lambda mutant: mutant.start)
