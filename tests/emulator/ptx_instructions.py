"""What each PTX instruction is in C++, for ptx.py. What is not here, to the last modifier, is an error.

Arithmetic on floats is taken where the PTX says how it is rounded, so that nothing may fuse it afterwards, and without
.ftz. One instruction is not exact, of which the GPU returns other last bits: ex2.approx, in expf.
Source: PTX ISA 9.0, the sections named like the instructions.
"""

import functools
import re
from collections.abc import Callable

ARITHMETIC = {"add": "+", "sub": "-"}
BITS = {"and": "&", "or": "|", "xor": "^"}
ORDERED = {
    **{"eq": "{1:T} == {2:T}", "lt": "{1:T} < {2:T}", "le": "{1:T} <= {2:T}"},
    **{"gt": "{1:T} > {2:T}", "ge": "{1:T} >= {2:T}"},
}
INTEGERS = {**ORDERED, "ne": "{1:T} != {2:T}"}
FLOATS = {
    **ORDERED,
    **{"ne": "{1:T} < {2:T} || {1:T} > {2:T}", "equ": "!({1:T} < {2:T} || {1:T} > {2:T})", "neu": "{1:T} != {2:T}"},
    **{"ltu": "!({1:T} >= {2:T})", "leu": "!({1:T} > {2:T})", "gtu": "!({1:T} <= {2:T})", "geu": "!({1:T} < {2:T})"},
    **{"num": "{1:T} == {1:T} && {2:T} == {2:T}", "nan": "{1:T} != {1:T} || {2:T} != {2:T}"},
}

VALUES: list[tuple[str, str, str]] = [
    # (mnemonic, type of the result, expression); {n:type} is an operand read as that type, S the place in the source
    (r"mov\.([busf]\d+|pred)", r"\1", r"{1:\1}"),
    *((rf"{n}\.[su](16|32|64)", r"u\1", rf"{{1:u\1}} {sign} {{2:u\1}}") for n, sign in ARITHMETIC.items()),
    *((rf"{n}\.rn\.(f32|f64)", r"\1", rf"{{1:\1}} {sign} {{2:\1}}") for n, sign in ARITHMETIC.items()),
    *((rf"{n}\.b(16|32|64)", r"u\1", rf"{{1:u\1}} {sign} {{2:u\1}}") for n, sign in BITS.items()),
    *((rf"{n}\.pred", "pred", f"{{1:pred}} {sign} {{2:pred}}") for n, sign in BITS.items()),
    (r"not\.b(16|32|64)", r"u\1", r"~{1:u\1}"),
    (r"not\.pred", "pred", "!{1:pred}"),
    (r"neg\.s(16|32|64)", r"u\1", r"0u - {1:u\1}"),
    (r"neg\.(f32|f64)", r"\1", r"-{1:\1}"),
    (r"abs\.(f32|f64)", r"\1", r"std::fabs({1:\1})"),
    (r"mul\.rn\.(f32|f64)", r"\1", r"{1:\1} * {2:\1}"),
    (r"mul\.lo\.[su]16", "u16", "u32({1:u16}) * {2:u16}"),
    (r"mul\.lo\.[su](32|64)", r"u\1", r"{1:u\1} * {2:u\1}"),
    (r"mad\.lo\.[su](32|64)", r"u\1", r"{1:u\1} * {2:u\1} + {3:u\1}"),
    (r"mul\.wide\.([su])16", r"\g<1>32", r"{1:\g<1>16} * {2:\g<1>16}"),
    (r"mul\.wide\.([su])32", r"\g<1>64", r"\g<1>64({1:\g<1>32}) * {2:\g<1>32}"),
    (r"mad\.wide\.([su])32", "u64", r"u64(\g<1>64({1:\g<1>32}) * {2:\g<1>32}) + {3:u64}"),
    (r"mul\.hi\.([su])16", r"\g<1>16", r"\g<1>32({1:\g<1>16}) * {2:\g<1>16} >> 16"),
    (r"mul\.hi\.([su])32", r"\g<1>32", r"\g<1>64({1:\g<1>32}) * {2:\g<1>32} >> 32"),
    (r"mul\.hi\.u64", "u64", "static_cast<unsigned __int128>({1:u64}) * {2:u64} >> 64"),
    (r"mul\.hi\.s64", "s64", "static_cast<__int128>({1:s64}) * {2:s64} >> 64"),
    (r"div\.([su](?:16|32|64))", r"\1", r"quotient<\1>({1:\1}, {2:\1}, S)"),
    (r"rem\.([su](?:16|32|64))", r"\1", r"remainder<\1>({1:\1}, {2:\1}, S)"),
    (r"div\.rn\.(f32|f64)", r"\1", r"{1:\1} / {2:\1}"),
    (r"rcp\.rn\.(f32|f64)", r"\1", r"1 / {1:\1}"),
    (r"sqrt\.rn\.(f32|f64)", r"\1", r"std::sqrt({1:\1})"),
    (r"fma\.rn\.(f32|f64)", r"\1", r"std::fma({1:\1}, {2:\1}, {3:\1})"),
    (r"fma\.rm\.f32", "f32", "fma_down({1:f32}, {2:f32}, {3:f32})"),
    (r"cvt\.sat\.f32\.f32", "f32", "saturated({1:f32})"),
    (r"ex2\.approx\.ftz\.f32", "f32", "power_of_two({1:f32})"),
    (r"min\.([busf]\d+)", r"\1", r"smaller<\1>({1:\1}, {2:\1})"),
    (r"max\.([busf]\d+)", r"\1", r"larger<\1>({1:\1}, {2:\1})"),
    (r"shl\.b(16|32|64)", r"u\1", r"shifted_left<u\1>({1:u\1}, {2:u32})"),
    (r"shr\.[bu](16|32|64)", r"u\1", r"shifted_right<u\1>({1:u\1}, {2:u32})"),
    (r"shr\.s(16|32|64)", r"s\1", r"shifted_right<s\1>({1:s\1}, {2:u32})"),
    (r"bfi\.b(32|64)", r"u\1", r"with_field<u\1>({1:u\1}, {2:u\1}, {3:u32}, {4:u32})"),
    (r"prmt\.b32", "u32", "permuted({1:u32}, {2:u32}, {3:u32})"),
    (r"brev\.b32", "u32", "reversed({1:u32})"),
    (r"popc\.b(32|64)", "u32", r"__builtin_popcountll({1:u\1})"),
    (r"bfind\.shiftamt\.u32", "u32", "{1:u32} ? __builtin_clz({1:u32}) : ~0u"),
    (r"clz\.b32", "u32", "{1:u32} ? __builtin_clz({1:u32}) : 32"),
    (r"selp\.([busf]\d+)", r"\1", r"{3:pred} ? {1:\1} : {2:\1}"),
    *((rf"setp\.{n}\.([bsu]\d+)", "pred", to.replace("T", r"\1")) for n, to in INTEGERS.items()),
    *((rf"setp\.{n}\.(f32|f64)", "pred", to.replace("T", r"\1")) for n, to in FLOATS.items()),
    (r"cvt\.([su]\d+)\.([su]\d+)", r"\1", r"{1:\2}"),
    (r"cvt\.f64\.f32", "f64", "{1:f32}"),
    (r"cvt\.rn\.f32\.f64", "f32", "{1:f64}"),
    (r"cvt\.rn\.(f32|f64)\.([su]\d+)", r"\1", r"static_cast<\1>({1:\2})"),
    (r"cvt\.f32\.f16", "f32", "bits_as<f16>({1:u16})"),
    (r"cvt\.rn\.f16\.f32", "u16", "bits_as<u16>(static_cast<f16>({1:f32}))"),
    (r"cvta\.(?:to\.)?(?:global|param)\.u64", "u64", "{1:u64}"),
    (r"cvta\.shared\.u64", "u64", "{1:u64} + reinterpret_cast<u64>(shared_memory)"),
    (r"cvta\.to\.shared\.u64", "u64", "{1:u64} - reinterpret_cast<u64>(shared_memory)"),
    (r"shfl\.sync\.idx\.b32", "u32", "shuffled(kShuffle, {4:u32}, {1:u32}, {2:u32}, {3:u32}, S)"),
    (r"shfl\.sync\.up\.b32", "u32", "shuffled(kUp, {4:u32}, {1:u32}, {2:u32}, {3:u32}, S)"),
    (r"shfl\.sync\.down\.b32", "u32", "shuffled(kDown, {4:u32}, {1:u32}, {2:u32}, {3:u32}, S)"),
    (r"shfl\.sync\.bfly\.b32", "u32", "shuffled(kXor, {4:u32}, {1:u32}, {2:u32}, {3:u32}, S)"),
    (r"vote\.sync\.ballot\.b32", "u32", "across_warp(kBallot, {2:u32}, {1:pred}, S)"),
    (r"vote\.sync\.any\.pred", "pred", "across_warp(kAny, {2:u32}, {1:pred}, S) != 0"),
    (r"vote\.sync\.all\.pred", "pred", "across_warp(kAll, {2:u32}, {1:pred}, S) != 0"),
    (r"match\.any\.sync\.b32", "u32", "across_warp(kMatch, {2:u32}, {1:u32}, S)"),
    (r"redux\.sync\.add\.[su]32", "u32", "across_warp(kAddAll, {2:u32}, {1:u32}, S)"),
    (r"redux\.sync\.min\.u32", "u32", "across_warp(kMinAll, {2:u32}, {1:u32}, S)"),
    (r"redux\.sync\.max\.u32", "u32", "across_warp(kMaxAll, {2:u32}, {1:u32}, S)"),
    (r"bar\.red\.popc\.u32", "u32", "vote_of_block(kCount, {1:u32}, {2:pred}, S)"),
    (r"bar\.red\.and\.pred", "pred", "vote_of_block(kAnd, {1:u32}, {2:pred}, S)"),
    (r"bar\.red\.or\.pred", "pred", "vote_of_block(kOr, {1:u32}, {2:pred}, S)"),
]
STATEMENTS: list[tuple[str, str]] = [
    # (mnemonic, statement), for what has no result in a register
    (r"ret", "return"),
    (r"exit", "return"),
    (r"trap", 'fail("%s: trap", S)'),
    (r"bar\.sync", "barrier({0:u32}, S)"),
    (r"bar\.warp\.sync", "across_warp(kSync, {0:u32}, 0, S)"),
    (r"membar\.(?:cta|gl|sys)|fence\.(?:sc|acq_rel)\.(?:cta|gpu|sys)", "fence()"),
    (r"cp\.async\.commit_group", "commit_copies()"),
    (r"cp\.async\.wait_group", "cp_async_wait<{0:u32}>()"),
]
CHANGES = {
    **{"add": "old + {0:T}", "min": "smaller<T>(old, {0:T})", "max": "larger<T>(old, {0:T})", "exch": "{0:T}"},
    **{"and": "old & {0:T}", "or": "old | {0:T}", "cas": "old == {0:T} ? {1:T} : old"},
}
"""What an atomic operation leaves, of the operands behind the address."""

LOAD = re.compile(r"ld(?:\.(global|shared|param))?(?:\.nc)?(?:\.v([24]))?\.([busf]\d+)")
STORE = re.compile(r"st(?:\.(global|shared))?(?:\.v([24]))?\.([busf]\d+)")
ATOMIC = re.compile(rf"(atom|red)\.(global|shared)\.({'|'.join(CHANGES)})\.([busf]\d+)")
COPY = re.compile(r"cp\.async\.c([ag])\.shared\.global")
PIECES = {"4": "unsigned", "8": "uint2", "16": "uint4"}


class NotTranslated(Exception):
    """What this translator does not know, which is never guessed."""


def _load(found, operands, kernel) -> str:
    space, count, type = found[1] or "generic", int(found[2] or 1), found[3]
    to, address = operands[0].pieces(count), operands[1]
    if space == "param":
        reads = [address.parameter(type, i) for i in range(count)]
        return " ".join(kernel.put(each, type, read) for each, read in zip(to, reads, strict=True))
    at = address.place(space, type, count)
    if count == 1:
        return kernel.put(to[0], type, f"*{at}")
    return f"const {type}* const q = {at}; " + " ".join(kernel.put(t, type, f"q[{i}]") for i, t in enumerate(to))


def _store(found, operands, kernel) -> str:
    space, count, type = found[1] or "generic", int(found[2] or 1), found[3]
    at, values = operands[0].place(space, type, count), operands[1].pieces(count)
    if count == 1:
        return f"*{at} = {values[0]:{type}};"
    return f"{type}* const q = {at}; " + " ".join(f"q[{i}] = {value:{type}};" for i, value in enumerate(values))


def _atomic(found, operands, kernel) -> str:
    kind, space, name, type = found.groups()
    to = operands.pop(0) if kind == "atom" else None
    type = type.replace("b", "u")
    next_ = CHANGES[name].replace("T", type).format(*operands[1:])
    made = f"modify({operands[0].place(space, type, 1)}, [&]({type} old) {{ (void)old; return {type}({next_}); }})"
    return kernel.put(to, type, made) if to else f"{made};"


def _copy(found, operands, kernel) -> str:
    to, from_, size = operands
    if size.text not in PIECES or (found[1] == "g" and size.text != "16"):
        raise NotTranslated(f"cp.async of {size.text} bytes")
    start = f"start_copy<{PIECES[size.text]}>"
    bytes = int(size.text)
    return f"{start}({to.address('shared', 'b8', bytes)}, {from_.address('global', 'b8', bytes)});"


def _move_pieces(found, operands, kernel) -> str:
    """mov between a register and several narrower ones."""
    to, from_ = operands
    bits = int(found[1])
    count = max(len(to.list), len(from_.list))
    each = bits // count
    if len(to.list) > 1:
        parts = [kernel.put(part, f"u{each}", f"q >> {i * each}") for i, part in enumerate(to.list)]
        return f"const u{bits} q = {from_:{f'u{bits}'}}; {' '.join(parts)}"
    parts = [f"u{bits}({part:{f'u{each}'}}) << {i * each}" for i, part in enumerate(from_.list)]
    return kernel.put(to, f"u{bits}", " | ".join(parts))


def _multiply(found, operands, kernel) -> str:
    """mma: the emulator's own, for all lanes of the warp; in parentheses, since a macro has its name, too."""
    to, a, b, c = (operand.pieces(count) for operand, count in zip(operands, (4, 4, 2, 4), strict=True))
    lists = (", ".join(f"{each:{type}}" for each in part) for part, type in ((c, "f32"), (a, "u32"), (b, "u32")))
    given = "f32 d[] = {{{}}}; const u32 a[] = {{{}}}, b[] = {{{}}};".format(*lists)
    return f"{given} cuda_emulator::mma_m16n8k16(d, a, b, S); " + " ".join(
        kernel.put(t, "f32", f"d[{i}]") for i, t in enumerate(to)
    )


def _branch(found, operands, kernel) -> str:
    return f"goto {kernel.label(operands[0].text)};"


OTHERS: list[tuple[re.Pattern, Callable]] = [
    (LOAD, _load),
    (STORE, _store),
    (ATOMIC, _atomic),
    (COPY, _copy),
    (re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"), _multiply),
    (re.compile(r"bra(?:\.uni)?"), _branch),
]
MOVE_PIECES = re.compile(r"mov\.b(32|64)")
RULES = [(re.compile(p), type, expression) for p, type, expression in VALUES]
RULES += [(re.compile(p), None, statement) for p, statement in STATEMENTS]


@functools.cache
def _rule(mnemonic: str):
    """What is known of a mnemonic: (match, the function or the expression, the type of its result)."""
    for pattern, function in OTHERS:
        if found := pattern.fullmatch(mnemonic):
            return found, function, None
    for pattern, type, expression in RULES:
        if found := pattern.fullmatch(mnemonic):
            return found, found.expand(expression), type and found.expand(type)
    raise NotTranslated(mnemonic)


def translate(mnemonic: str, operands: list, kernel) -> str:
    """The C++ statement of one instruction of a kernel."""
    if any(len(operand.list) > 1 for operand in operands) and (found := MOVE_PIECES.fullmatch(mnemonic)):
        return _move_pieces(found, operands, kernel)
    found, rule, type = _rule(mnemonic)
    if callable(rule):
        return rule(found, operands, kernel)
    used = {int(n) for n in re.findall(r"\{(\d)", rule)} | ({0} if type else set())
    if used != set(range(len(operands))):
        raise NotTranslated(f"{mnemonic} with {len(operands)} operands")
    made = rule.format(*operands)
    return kernel.put(operands[0], type, made) if type else f"{made};"
