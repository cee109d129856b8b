"""Read a cubin: registers, spills, loops, instructions by the unit that runs them, warps that fit a multiprocessor."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_LABEL = re.compile(r"^(\.L_\S+):")
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TARGET = re.compile(r"`\((\.L_\S+?)\)")

_CLASSES = {
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2",
    "half": "HFMA2 HADD2 HMUL2",
    "integer": "IADD3 IADD LEA IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX LOP3 LOP SHF SEL IABS PRMT SGXT BMSK FLO POPC",
    "predicate": "ISETP PLOP3 P2R R2P PSETP VOTE FSETP FSEL FMNMX FMNMX3 FSET FCHK",
    "move": "MOV CS2R S2R S2UR R2UR UMOV",
    "convert": "F2F F2FP I2F F2I I2FP",
    "multiply": "IMAD",
    "special": "MUFU",
    "spill": "LDL STL",
    "constant": "LDC ULDC LDCU",
    "shared": "LDS STS LDSM SHFL",
    "atomic": "ATOM ATOMG RED REDG",
    "control": "BRA EXIT RET CALL BSSY BSYNC NOP WARPSYNC BAR MEMBAR ERRBAR CGAERRBAR CCTL DEPBAR YIELD BPT",
}
# What orders memory between programs, or tells that an access takes no part in it.
_ORDERS = re.compile(r"(BAR|MEMBAR|CCTL|ATOM|ATOMG|RED|REDG|BPT)\b|.*\b(STRONG|CONSTANT)\b")
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}


def classify(opcode: str) -> str:
    """Return an instruction's class; global accesses are ``load32``, ``store128`` and so on, by width in bits."""
    base, *modifiers = opcode.split(".")
    if base in ("LDG", "STG"):
        narrow = {"U8": "8", "S8": "8", "U16": "16", "S16": "16"}
        wide = next((m for m in modifiers if m in ("64", "128", "256")), None)
        return ("load" if base == "LDG" else "store") + (
            wide or next((narrow[m] for m in modifiers if m in narrow), "32")
        )
    if base in _CLASS_OF:
        return _CLASS_OF[base]
    return "uniform" if base.startswith("U") else "other"


Count = collections.Counter  # instructions by class


@dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's stack; 0 without spills.
        total: instructions of the whole kernel.
        loop: those of its longest loop, without the parts that a branch may skip.
        skipped: those parts.
        parts: how many of these there are.
        nested: instructions of the longest loop inside that loop, which are among the others.
        ordering: opcodes that order memory between programs, and accesses outside that order, as they stand.
    """

    registers: int
    stack: int
    total: Count = field(repr=False)
    loop: Count = field(repr=False)
    skipped: Count = field(repr=False)
    parts: int = 0
    nested: Count = field(repr=False, default_factory=Count)
    ordering: tuple[str, ...] = field(default=(), repr=False)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.total["spill"]

    @property
    def outside(self) -> Count:
        """Instructions outside the longest loop."""
        return self.total - self.loop - self.skipped


def tool(name: str) -> str:
    """Return the path of one of the CUDA tools that Triton ships."""
    import triton.backends.nvidia

    return str(pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def parse_usage(text: str) -> dict[str, int]:
    """Read ``cuobjdump -res-usage``: registers, and bytes of stack, shared and local memory."""
    match = _USAGE.search(text)
    if match is None:
        raise ValueError(f"no resource usage in {text!r}")
    registers, stack, shared, local = map(int, match.groups())
    return {"registers": registers, "stack": stack, "shared": shared, "local": local}


def parse_code(usage: str, text: str) -> Code:
    """Read ``cuobjdump -res-usage`` and ``nvdisasm -c`` of one kernel."""
    opcodes: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(opcodes)
        elif instruction := _LINE.match(line):
            opcodes.append((instruction.group(1), instruction.group(2)))

    jumps = []  # (from, to)
    for i, (opcode, operands) in enumerate(opcodes):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        if target:
            jumps.append((i, labels[target.group(1)]))
    end = next((i for i, to in jumps if to == i), len(opcodes))  # the padding behind a kernel jumps to itself

    def count(first: int, last: int) -> Count:
        return Count(classify(opcode) for opcode, _ in opcodes[first:last])

    loops = [(to, i + 1) for i, to in jumps if to < i < end]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    length = last - first
    skipped = [(i + 1, to) for i, to in jumps if first <= i < to <= last and 15 < to - i < length // 2]
    parts = sum((count(*part) for part in skipped), Count())
    inside = [loop for loop in loops if first <= loop[0] and loop[1] <= last and loop != (first, last)]
    nested = count(*max(inside, key=lambda loop: loop[1] - loop[0], default=(0, 0)))
    found = parse_usage(usage)
    return Code(
        found["registers"],
        found["stack"],
        count(0, end),
        count(first, last) - parts,
        parts,
        len(skipped),
        nested,
        tuple(opcode for opcode, _ in opcodes[:end] if _ORDERS.match(opcode)),
    )


def usage(cubin: bytes) -> dict[str, int]:
    """Return a cubin's registers and bytes of memory without disassembling it; what spills has a stack."""
    with _written(cubin) as path:
        return parse_usage(_run("cuobjdump", "-res-usage", path))


def read(cubin: bytes) -> Code:
    """Disassemble a cubin."""
    return _read(hashlib.sha256(cubin).hexdigest(), cubin)


@functools.cache
def _read(key: str, cubin: bytes) -> Code:
    with _written(cubin) as path:
        return parse_code(_run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", path))


@contextlib.contextmanager
def _written(cubin: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        yield str(path)


def _run(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], check=True, capture_output=True, text=True).stdout
