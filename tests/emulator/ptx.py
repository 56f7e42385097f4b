"""nvcc's PTX as C++ for the emulator: what a GPU's driver gets of csrc/cuda, run on the CPU.

Registers become variables, labels labels, barriers and warp operations calls of the emulator, so that all its checks hold.
`.loc` becomes `#line`: what a sanitizer says names the line of the .cu file. An instruction, directive or modifier that is
not known is an error.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from emulator.ptx_instructions import NotTranslated, translate

SIZES = {"pred": 1, "8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = {
    **{f"%tid.{d}": f"current->thread.{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"current->block.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"block_size.{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"grid_size.{d}" for d in "xyz"},
    "%laneid": "lane_of_warp()",
    "WARP_SZ": "32",
}
TOP = re.compile(
    r"""\s*(?:
    \.version\s+\d+\.\d | \.target\s+sm_\d+ | \.address_size\s+64
    | \.file\s+(?P<file>\d+)\s+"(?P<path>[^"]+)"(?:,\s*\d+,\s*\d+)?
    | \.section\s+\.debug_str\s*\{[^}]*\}
    | \.extern\s+\.shared\s+\.align\s+16\s+\.b8\s+(?P<dynamic>[\w$]+)\[\];
    | \.shared\s+\.align\s+(?P<align>\d+)\s+\.b8\s+(?P<shared>[\w$]+)\[(?P<size>\d+)\];
    | (?:\.visible\s+|\.weak\s+)?\.entry\s+(?P<entry>[\w$]+)\s*\((?P<parameters>[^)]*)\)\s*(?P<bounds>(?:\.\w+[ \d,]*\s*)*)(?P<body>\{)
    )\s*""",
    re.VERBOSE,
)
PARAMETER = re.compile(
    r"\s*\.param\s+(?:\.align\s+(\d+)\s+\.b8|\.[busf](\d+)(?:\s+\.ptr\s+\.align\s+\d+)?)\s+([\w$]+)(?:\[(\d+)\])?\s*"
)
BOUNDS = re.compile(r"\s*\.(?:maxntid\s+(\d+)(?:, 1, 1)?|minnctapersm\s+\d+)(?=\s)")
STATEMENT = re.compile(
    r"""\s*(?:
    (?P<loc>\.loc\s[^\n]*) | (?P<label>\$?\w+):(?!:) | (?P<brace>[{}])
    | (?P<text>[^;{}\s](?:[^;{}]|\{[^;{}]*\})*);
    )""",
    re.VERBOSE,
)
LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:, function_name [^,]+, inlined_at (\d+) (\d+) \d+)?\s*")
REGISTERS = re.compile(r"\.reg\s+\.(pred|[bf](?:16|32|64))\s+(.*)", re.DOTALL)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.([busf])(\d+)\s+([\w$]+)(?:\[(\d+)\])?")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.]*)(?:\s+(.*))?", re.DOTALL)
OPERAND = re.compile(r"\s*((?:\{[^}]*\}|\[[^]]*\]|[^,{}\[\]])+)(?:,|$)")


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


class Operand:
    """One operand; formatted with a type it is the expression that reads it: f"{operand:u32}"."""

    def __init__(self, text: str, kernel: "Kernel"):
        self.text, self.kernel = text.strip(), kernel
        self.list = [self]
        if self.text.startswith("{"):
            self.list = [Operand(part, kernel) for part in self.text.strip("{}").split(",")]

    def __format__(self, type: str) -> str:
        text, bits = self.text, SIZES[re.sub(r"^[busf](?=\d)", "", type)] * 8
        if text in SPECIAL:
            return f"{type}({SPECIAL[text]})"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
            if bits != (32 if found[1] else 64):
                raise NotTranslated(f"{text} as {type}")
            bits_ = f"u{bits}(0x{found[1] or found[2]}ull)"
            return f"bits_as<{type}>({bits_})" if type[0] == "f" else bits_
        if re.fullmatch(r"-?(\d+|0x[0-9A-Fa-f]+)U?", text) and type[0] != "f":
            return f"{type}(0x{int(text.rstrip('U'), 0) % 2**bits:x}ull)"
        if text in self.kernel.shared or text == self.kernel.dynamic:
            return f"{type}({self.kernel.offset(text)})"
        if text in self.kernel.parameters:
            return f"{type}(reinterpret_cast<u64>(parameters + {self.kernel.parameters[text]}))"
        if type == "pred" and text.startswith("!"):
            return f"!{self.kernel.register(text[1:], 'pred')[0]}"
        name, own = self.kernel.register(text, type)
        if own == type or type == "pred":
            return name
        if SIZES[own[1:]] * 8 < bits:
            raise NotTranslated(f"{type} of {text}, which is {own}")
        return f"bits_as<{type}>({name})" if "f" in (own[0], type[0]) else f"{type}({name})"

    def pieces(self, count: int) -> list["Operand"]:
        if len(self.list) != count:
            raise NotTranslated(f"{self.text} for {count} registers")
        return self.list

    def _parts(self) -> tuple[str, str]:
        found = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", self.text)
        if not found:
            raise NotTranslated(f"address {self.text}")
        return found[1], found[2] or "0"

    def address(self, space: str, type: str = "", count: int = 1) -> str:
        """A pointer of the host to what an operand in brackets names; to bytes where no type is given."""
        base, offset = self._parts()
        if space == "shared":
            at = f"u32({Operand(base, self.kernel):u32} + {int(offset) % 2**32}u)"
        else:
            at = f"{Operand(base, self.kernel):u64} + u64({int(offset) % 2**64}ull)"
        return f"{space}<{type or 'b8'}, {count}>({at}, S)"

    place = address

    def parameter(self, type: str, index: int) -> str:
        """The value of a kernel's parameter that the operand names."""
        base, offset = self._parts()
        offset = int(offset) + index * SIZES[type[1:]]
        if base in self.kernel.parameters:
            return f"parameter<{type}>(parameters + {self.kernel.parameters[base] + offset})"
        at = f"reinterpret_cast<const char*>({Operand(base, self.kernel):u64})"
        return f"parameter<{type}>({at} + {offset})"


@dataclass
class Kernel:
    """One .entry on its way to a function."""

    number: int
    name: str
    files: dict[str, Path]
    shared: dict[str, tuple[int, int]]  # of the file: name: (bytes, alignment)
    dynamic: str
    parameters: dict[str, int] = field(default_factory=dict)  # name: offset
    max_threads: int = 1024
    scopes: list[dict[str, tuple[str, str]]] = field(default_factory=lambda: [{}])  # register: (variable, type)
    used: set[str] = field(default_factory=set)  # shared arrays
    read: set[str] = field(default_factory=set)  # predicates
    unknown: set[str] = field(default_factory=set)  # predicates that are not computed
    code: list[str] = field(default_factory=list)  # with a new line where the place in the source changes
    place: tuple[Path | None, int] = (None, 0)
    told: tuple[Path | None, int] = (None, 0)  # the last #line
    blocks: list[list] = field(default_factory=list)  # [site, instructions] of what runs as a whole
    in_block: bool = False

    def declare(self, parameters: str, bounds: str) -> None:
        at = 0
        for text in parameters.split(",") if parameters.strip() else []:
            found = PARAMETER.fullmatch(text)
            if not found:
                raise NotTranslated(f"parameter {text.strip()}")
            align, bits, name, size = found.groups()
            align = int(align or SIZES[bits])
            at = -(-at // align) * align
            self.parameters[name] = at
            at += int(size or SIZES[bits or "8"])
        for found in BOUNDS.finditer(bounds):
            self.max_threads = int(found[1] or self.max_threads)
        if BOUNDS.sub("", bounds).strip():
            raise NotTranslated(f"bounds {bounds.strip()}")

    def variable(self, name: str, type: str) -> tuple[str, str]:
        """The variable of a register, and its type."""
        for scope in reversed(self.scopes):
            if name in scope:
                if (type == "pred") != (scope[name][1] == "pred"):
                    raise NotTranslated(f"{name} as {type}")
                return scope[name]
        raise NotTranslated(f"operand {name}")

    def register(self, name: str, type: str) -> tuple[str, str]:
        """The same, to be read."""
        self.read.add(name)
        return self.variable(name, type)

    def offset(self, name: str) -> str:
        if name == self.dynamic:
            return "offset_of(dynamic_shared())"
        self.used.add(name)
        return identifier(name)

    def label(self, name: str) -> str:
        return f"at_{identifier(name)}"

    def put(self, to: Operand, type: str, value: str) -> str:
        """The statement that puts a value of a type into a register."""
        name, bar, valid = to.text.partition("|")
        if bar:
            self.unknown.add(valid)
        if name == "_":
            return f"(void)({value});"
        variable, own = self.variable(name, type)
        if own == type:
            return f"{variable} = {value};"
        if SIZES[own[1:]] < SIZES[type[1:]]:
            raise NotTranslated(f"{type} into {name}, which is {own}")
        if "f" in (own[0], type[0]):
            return f"{variable} = bits_as<{own}>({type}({value}));"
        return f"{variable} = {type}({value});"

    def statement(self, text: str, line: int) -> None:
        if re.fullmatch(r'\.pragma "(nounroll|used_bytes_mask \d+)"', text):
            return
        if found := REGISTERS.fullmatch(text):
            self.declare_registers(*found.groups())
            return
        if found := SHARED.fullmatch(text):
            align, _, bits, name, count = found.groups()
            self.shared = {**self.shared, name: (SIZES[bits] * int(count or 1), int(align))}
            return
        found = INSTRUCTION.fullmatch(text)
        if not found:
            raise NotTranslated(text)
        unless, guard, mnemonic, rest = found.groups()
        operands = [Operand(part, self) for part in OPERAND.findall(rest or "")]
        if ",".join(operand.text for operand in operands).count(",") != (rest or "").count(","):
            raise NotTranslated(text)
        made = translate(mnemonic, operands, self)
        file, number = self.place
        if file and self.told != self.place:
            self.told = self.place
            self.code.append(f'\n#line {number} "{file}"\n')
        site = f'"{file.name if file else "?"}:{number} (PTX {line})"'
        made = re.sub(r"\bS\b(?=\))", site, made)
        if not self.in_block:
            self.code.append(f"SEEN(seen_{self.number}[{len(self.blocks)}])")
            self.blocks.append([site, 0])
        self.blocks[-1][1] += 1
        self.in_block = not mnemonic.startswith("bra")
        if guard:
            made = f"if ({unless}{self.register(guard, 'pred')[0]}) {{ {made} }}"
        self.code.append(f"{{ {made} }}" if made.count(";") > 1 else made)

    def declare_registers(self, type: str, names: str) -> None:
        depth = len(self.scopes) - 1
        for name in re.split(r",\s*", names.strip()):
            numbered = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            each = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]
            made = {n: (f"v_{identifier(n)}" + (f"_{depth}" if depth else ""), type) for n in each}
            self.scopes[-1].update(made)
            start = " = {}" if type == "pred" else f" = unset<{type}>()"
            self.code.append(
                f"{type} {', '.join(variable + ('' if depth else start) for variable, _ in made.values())};"
            )

    def locate(self, text: str) -> None:
        """The innermost place in our own files: what NVIDIA's headers do is said of the line that uses them."""
        found = LOCATION.fullmatch(text)
        if not found:
            raise NotTranslated(text)
        for file, number in (found.groups()[:2], found.groups()[2:]):
            path = self.files.get(file)
            if path and path.suffix in (".cu", ".cuh") and number != "0":
                self.place = path, int(number)
                return

    def function(self) -> str:
        if lost := self.unknown & self.read:
            raise NotTranslated(f"predicates of shuffles, which are read: {sorted(lost)}")
        arrays = [
            f"static char tag_{i}; const u32 {identifier(name)} = "
            f"offset_of(static_shared(&tag_{i}, {self.shared[name][0]}, {self.shared[name][1]}));"
            for i, name in enumerate(sorted(self.used))
        ]
        blocks = ", ".join(f"{{{site}, {count}}}" for site, count in self.blocks)
        head = (
            f"static bool seen_{self.number}[{len(self.blocks)}];\n"
            f"static const Block blocks_{self.number}[] = {{{blocks}}};\n"
            f"static void kernel_{self.number}(const void* given) {{\n"
        )
        parameters = "const char* const parameters = static_cast<const char*>(given); (void)parameters;\n"
        return head + parameters + " ".join([*arrays, *self.code, "}"])


def _scan(pattern: re.Pattern, text: str, at: int, end: int):
    """What the pattern matches from here on, without gaps."""
    end = at + len(text[at:end].rstrip())
    while at < end:
        found = pattern.match(text, at, end)
        if not found:
            raise NotTranslated(text[at : at + 200].strip())
        yield found
        at = found.end()


def _body_end(text: str, at: int) -> int:
    """Behind the brace that closes the one before `at`."""
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise NotTranslated("a body without end")


def _kernel(kernel: Kernel, text: str, at: int, end: int) -> Kernel:
    line, counted = text.count("\n", 0, at) + 1, at
    for found in _scan(STATEMENT, text, at, end):
        start = found.end() - len(found[0].lstrip())
        line, counted = line + text.count("\n", counted, start), start
        try:
            if found["loc"]:
                kernel.locate(found["loc"])
            elif found["label"]:
                kernel.code.append(f"{kernel.label(found['label'])}:;")
                kernel.in_block = False
            elif found["brace"]:
                kernel.code.append(found["brace"])
                kernel.scopes.append({}) if found["brace"] == "{" else kernel.scopes.pop()
            else:
                kernel.statement(found["text"].strip(), line)
        except NotTranslated as error:
            raise NotTranslated(f"PTX line {line}, `{found[0].strip()}`: {error}") from None
    return kernel


def translated(text: str, source: str) -> str:
    """The C++ of a PTX file that nvcc made of a source of this name."""
    text = re.sub(r"//[^\n]*", "", text)
    files = {number: Path(path) for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    shared, dynamic, kernels, at = {}, "", [], 0
    while text[at:].strip():
        found = TOP.match(text, at)
        if not found:
            raise NotTranslated(text[at : at + 200].strip())
        at = found.end()
        if found["dynamic"]:
            dynamic = found["dynamic"]
        elif found["shared"]:
            shared[found["shared"]] = int(found["size"]), int(found["align"])
        elif found["entry"]:
            kernel = Kernel(len(kernels), found["entry"], files, dict(shared), dynamic)
            kernel.declare(found["parameters"], found["bounds"])
            end = _body_end(text, found.end("body"))
            kernels.append(_kernel(kernel, text, found.end("body"), end))
            at = end + 1
    table = ", ".join(
        f'{{"{source}", "{k.name}", kernel_{k.number}, {k.max_threads}u, '
        f"blocks_{k.number}, seen_{k.number}, {len(k.blocks)}}}"
        for k in kernels
    )
    functions = "\n".join(kernel.function() for kernel in kernels)
    return (
        f'#include "ptx.h"\nnamespace cuda_emulator {{\n{functions}\n#line 1 "translations"\n'
        f"static const Translation translations[] = {{{table}}};\nstatic const Translations added(translations);\n}}\n"
    )
