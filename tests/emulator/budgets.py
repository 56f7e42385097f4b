"""What the compiled kernels take of a GPU: registers, shared memory, occupancy, the instructions of the busiest loop.

    python tests/emulator/budgets.py --write    budgets.json, from the built extension
    python tests/emulator/budgets.py --table    docs/cuda_budgets.md, from budgets.json and a traced run (budgets_table.py)

Read from the cubins in the extension by cuobjdump and nvdisasm; threads are those of __launch_bounds__, in the PTX beside.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from emulator.mutants import CUDA, reached

FILE = Path(__file__).with_name("budgets.json")
COMMAND = "python tests/emulator/budgets.py --write"
LIMITS = {
    # threads and blocks of a multiprocessor, its shared memory in KB: CUDA's programming guide, compute capabilities
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    120: (1536, 24, 100),
}
REGISTERS, RESERVED = 65536, 1024  # of a multiprocessor; shared bytes that every block gives the system
FLOAT = r"FFMA2?|FADD2?|FMUL2?|FMNMX3?|FSETP|FSEL|DADD|DMUL|DFMA|DSETP|MUFU"
MATRIX = r"HMMA|IMMA|QMMA"
INTEGER = (
    r"U?(?:IMAD|IADD3?|IADD64|ISETP|LEA|LOP3|PLOP3|SHF|IABS|SEL|IMNMX|VIADD|VIADDMNMX|VIMNMX3?|PRMT|POPC|FLO|BREV|MOV)"
    r"|I2F\w*|F2I\w*|R2UR|CS2R|S2R|S2UR"
)


def cuobjdump(*options: str) -> str:
    """What NVIDIA's tool says of the extension."""
    from tokenflow_ext.ops import _native

    folders = [str(p.parent) for folder in map(Path, sys.path) for p in folder.glob("nvidia/cu*/bin/cuobjdump")]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    command = [shutil.which("cuobjdump", path=path) or "cuobjdump", *options, _native._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}).stdout


@functools.cache
def demangled() -> dict[str, str]:
    """Symbols and the names of kernels as one writes them: search_kernel<32, true>."""
    symbols = sorted(set(re.findall(r"Function (\w+):", cuobjdump("--dump-resource-usage"))))
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = (
        re.sub(r"^void |\((?:tokenflow_ext::cuda::)?\w+\)(?=\d)|tokenflow_ext::cuda::", "", line)
        for line in done.stdout.splitlines()
    )
    return {symbol: name[: name.rindex("(")] for symbol, name in zip(symbols, names, strict=True)}


@functools.cache
def _own() -> dict[str, set[str]]:
    """The kernels that stand in a .cu file or in a header of it."""
    kernel = r"__global__ void\s+(?:__launch_bounds__\([^()]*\)\s+)?(\w+)\("
    return {
        file.stem: {name for part in reached(file) for name in re.findall(kernel, part.read_text())}
        for file in CUDA.glob("*.cu")
    }


def _named(symbols: list[str]) -> dict[str, str]:
    """The kernels of one cubin: symbol: "file: name". Two files may have kernels of one name."""
    names = {demangled()[symbol].split("<")[0] for symbol in symbols}
    files = [file for file, own in _own().items() if names <= own]
    (file,) = [f for f in files if len(_own()[f]) == min(len(_own()[g]) for g in files)]
    return {symbol: f"{file}: {demangled()[symbol]}" for symbol in symbols}


def _cubins(text: str):
    """(architecture, what is said of it) per cubin in the tool's output."""
    parts = re.split(r"Fatbin (elf|ptx) code:\n=+\n", text)[1:]
    for kind, part in zip(parts[::2], parts[1::2], strict=True):
        if kind == "elf":
            yield int(re.search(r"arch = sm_(\d+)", part)[1]), part


@functools.cache
def usage() -> dict[str, dict[int, dict[str, int]]]:
    """kernel: architecture: registers, stack, shared and local bytes."""
    made: dict = {}
    for architecture, part in _cubins(cuobjdump("--dump-resource-usage")):
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        names = _named([symbol for symbol, *_ in found]) if found else {}
        for symbol, *numbers in found:
            registers, stack, shared, local = map(int, numbers)
            shared -= RESERVED if architecture >= 90 and shared else 0  # which the tool counts from there on
            of = dict(registers=registers, shared=shared, stack=stack, local=local)
            assert made.setdefault(names[symbol], {}).setdefault(architecture, of) is of
    return made


@functools.cache
def threads() -> dict[str, int]:
    """kernel: the threads that its __launch_bounds__ allow, from the PTX of the oldest architecture."""
    bounds = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", cuobjdump("--dump-ptx"))
    by_symbol = {demangled()[symbol]: int(count) for symbol, count in bounds}
    return {kernel: by_symbol.get(kernel.split(": ")[1], 1024) for kernel in usage()}


def _kind(operation: str) -> str:
    head = operation.split(".")[0]
    for kind, pattern in (("float", FLOAT), ("matrix", MATRIX), ("integer", INTEGER)):
        if re.fullmatch(pattern, head):
            return kind
    return head if head in ("LDS", "LDG", "STS", "STG", "LDL", "STL", "LDGSTS", "LDSM") else "other"


def _mix(operations: list[str]) -> dict[str, int]:
    mix = Counter(map(_kind, operations))
    mix["wide LDS"] = sum(operation.startswith("LDS") and ".128" in operation for operation in operations)
    return {kind: count for kind, count in sorted(mix.items()) if count and kind != "other"}


def _busiest(code: list[tuple[int, str, str]]) -> list[str]:
    """The innermost loop with the most float operations; of none, the longest."""
    loops = [(int(to, 16), at) for at, op, to in code if op.startswith("BRA") and to and int(to, 16) < at]
    inner = [loop for loop in loops if not any(o != loop and o[0] >= loop[0] and o[1] <= loop[1] for o in loops)]
    bodies = [[op for at, op, _ in code if first <= at <= last] for first, last in inner]
    return max(
        bodies, key=lambda ops: (_mix(ops).get("float", 0) + 8 * _mix(ops).get("matrix", 0), len(ops)), default=[]
    )


@functools.cache
def instructions(architecture: int) -> dict[str, dict]:
    """kernel: its local loads and stores, and what the busiest loop is made of. Takes seconds an architecture."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)[ ;]([^;\n]*)")
    made = {}
    for _, part in _cubins(cuobjdump("--dump-sass", "--gpu-architecture", f"sm_{architecture}")):
        functions = re.split(r"Function : (\w+)\n", part)[1:]
        names = _named(functions[::2]) if functions else {}
        for symbol, text in zip(functions[::2], functions[1::2], strict=True):
            code = []
            for at, op, rest in line.findall(text):
                to = re.search(r"\b0x([0-9a-f]+)\s*$", rest.strip())
                code.append((int(at, 16), op, to[1] if to else ""))
            spilled = sum(_kind(op) in ("LDL", "STL") for _, op, _ in code)
            made[names[symbol]] = {"local": spilled, "instructions": len(code), "loop": _mix(_busiest(code))}
    return made


def occupancy(architecture: int, registers: int, shared: int, block: int) -> tuple[int, float]:
    """Blocks of a multiprocessor, and the share of its warps that they fill. Registers are given to a warp by 256."""
    most_threads, most_blocks, kilobytes = LIMITS[architecture]
    warps = -(-block // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        most_blocks,
        most_threads // (32 * warps),
        REGISTERS // 4 // of_a_warp * 4 // warps,
        kilobytes * 1024 // (-(-(shared + RESERVED) // 128) * 128),
    )
    return blocks, blocks * 32 * warps / most_threads


def measured(architectures) -> dict:
    """What budgets.json holds, of the extension as it is built."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = dict(zip(architectures, pool.map(instructions, architectures), strict=True))
    return {
        kernel: {
            "threads": threads()[kernel],
            **{
                str(a): {"registers": of[a]["registers"], "shared": of[a]["shared"], "loop": read[a][kernel]["loop"]}
                for a in architectures
            },
        }
        for kernel, of in sorted(usage().items())
    }


def main() -> None:
    if "--write" in sys.argv:
        budgets = measured(sorted({a for of in usage().values() for a in of}))
        lines = (f"{json.dumps(kernel)}: {json.dumps(of)}" for kernel, of in budgets.items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    elif "--table" in sys.argv:
        from emulator.budgets_table import write

        write()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
