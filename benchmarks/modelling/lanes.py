"""Where a warp's lanes fall: loads and stores as the compiler laid them out, and the clocks that L1 takes for one."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.modelling.gpus import L1_BANKS, L1_LINE_BYTES, L1_TAGS_A_CLOCK

LANES = 32
READS = ("bytes", "banks", "lines")
"""What L1 reads in a clock, from the least to the most cautious assumption: any 128 bytes, as far as tags and registers
go; words of different banks; words of one line, so that an access that begins inside a line takes one clock more."""
_LAYOUT = re.compile(
    r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], .*?, order = \[(.*?)\]\}>"
)
_ACCESS = re.compile(
    r"tt\.(load|store) (%[\w#]+).* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)>, "
    r"(?:#ttg\.slice<\{dim = (\d), parent = )?(#\w+)"
)
_POINTER = re.compile(r"(%[\w#]+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%[\w#]+)")
_LOOP = re.compile(r"scf\.(?:while|for)\b")
_CARRIED = re.compile(r"(%[\w#]+) = (%[\w#]+)")


@dataclass(frozen=True)
class Access:
    """A load or store of a block of values.

    Attributes:
        kind: ``"load"`` or ``"store"``.
        pointer: the kernel's argument that it goes through; empty where that is not known.
        bits: of a value.
        shape: of the block.
        each: adjacent values of a thread, by dimension of the layout.
        lanes: of a warp, by dimension; their product is 32.
        order: dimensions, the fastest of the layout first.
        left_out: a dimension that only the layout has: its lanes take the same values.
        in_loop: inside a loop.
    """

    kind: str
    pointer: str
    bits: int
    shape: tuple[int, ...]
    each: tuple[int, ...]
    lanes: tuple[int, ...]
    order: tuple[int, ...]
    left_out: int | None
    in_loop: bool

    def first_values(self) -> list[tuple[int, ...]]:
        """Return the place in the block of each lane's first value."""
        places = []
        for lane in range(LANES):
            place = [0] * len(self.each)
            for dimension in self.order:
                lane, here = divmod(lane, self.lanes[dimension])
                place[dimension] = here * self.each[dimension]
            if self.left_out is not None:
                del place[self.left_out]
            places.append(tuple(p % size for p, size in zip(place, self.shape, strict=True)))
        return places

    @property
    def fastest(self) -> int | None:
        """The block's dimension along which a thread's values are adjacent; None where that one was left out."""
        first = self.order[0]
        if first == self.left_out:
            return None
        return first - (self.left_out is not None and first > self.left_out)

    @property
    def adjacent(self) -> int:
        """Adjacent values of a thread."""
        return 1 if self.fastest is None else min(self.each[self.order[0]], self.shape[self.fastest])


def accesses(text: str) -> list[Access]:
    """Read the loads and stores of a kernel's ``ttgir``."""
    text = re.sub(r" loc\((?:#\w+|\"\w+\"\(#\w+\))\)", "", text)
    numbers = lambda item: tuple(int(number) for number in item.split(","))  # noqa: E731
    layouts = {name: tuple(map(numbers, rest)) for name, *rest in _LAYOUT.findall(text)}
    came_from: dict[str, str] = {}
    loops: list[int] = []
    found = []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1] and not line.lstrip().startswith(("} do {", "^")):  # one of two parts
            loops.pop()
        if _LOOP.search(line):
            loops.append(indent)
            came_from |= dict(_CARRIED.findall(line.split("(", 1)[-1]))
        if pointer := _POINTER.search(line):
            came_from[pointer.group(1)] = pointer.group(2)
        if match := _ACCESS.search(line):
            kind, value, shape, bits, left_out, layout = match.groups()
            if layout not in layouts:
                continue
            seen = set()
            while value in came_from and value not in seen:
                seen.add(value)
                value = came_from[value]
            found.append(
                Access(
                    kind,
                    value.lstrip("%"),
                    int(bits),
                    tuple(map(int, shape.split("x"))),
                    *layouts[layout],
                    None if left_out is None else int(left_out),
                    bool(loops),
                )
            )
    return found


@functools.cache
def wavefronts(offsets: tuple[int, ...], nbytes: int, first: int = 0, reads: str = "banks") -> int:
    """Return the clocks that L1 takes for one instruction of a warp.

    Registers are filled at 128 bytes a clock, so lanes go in groups of 128 bytes: all 32, or 16 of 8 bytes, or 8 of 16.
    Tags are looked up ``L1_TAGS_A_CLOCK`` lines at a time.

    Args:
        offsets: bytes from the access's first address to each lane's.
        nbytes: of a lane.
        first: that address, of which only the place in a line matters.
        reads: what a clock reads for a group, one of ``READS``.
    """
    if reads not in READS:
        raise ValueError(f"reads must be one of {', '.join(READS)}, not {reads!r}")
    together = min(len(offsets), max(1, L1_LINE_BYTES // nbytes))
    all_lines: set[int] = set()
    clocks = 0
    for start in range(0, len(offsets), together):
        words = {
            (first + offset + byte) // 4
            for offset in offsets[start : start + together]
            for byte in range(0, nbytes, min(4, nbytes))
        }
        lines = {word * 4 // L1_LINE_BYTES for word in words}
        all_lines |= lines
        if reads == "lines":
            clocks += len(lines)
        elif reads == "banks":
            clocks += max(collections.Counter(word % L1_BANKS for word in words).values())
        else:
            clocks += 1
    return max(clocks, -(-len(all_lines) // L1_TAGS_A_CLOCK))


def mean_wavefronts(offsets: Sequence[int], nbytes: int, firsts: Iterable[int], reads: str) -> float:
    """Return :func:`wavefronts` averaged over first addresses."""
    places = collections.Counter(first % L1_LINE_BYTES for first in firsts)
    clocks = sum(n * wavefronts(tuple(offsets), nbytes, place, reads) for place, n in places.items())
    return clocks / places.total()
