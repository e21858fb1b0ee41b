# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions that a thread of a CUDA kernel executes, from its machine code alone.

The loops of the code are recognised by the source line of their jump back, and run as often as the
caller says. Of the ways through the code between them, the one that touches most of global memory
counts, and of those the shortest: that leaves out slow paths (subnormal numbers, divisions of large
integers), so that the count is a lower bound.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    predicate: str | None
    opcode: str
    operands: str
    where: tuple[
        tuple[str, int], ...
    ]  # file and line, from the innermost inlined function outwards

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]


GLOBAL = {"LDG", "STG", "REDG", "RED", "ATOMG", "ATOM", "LD", "ST"}
KINDS = {
    "float32": {"FFMA", "FADD", "FMUL"},
    "float64": {"DFMA", "DADD", "DMUL", "DSETP"},
    "special": {"MUFU"},
    "load/store": GLOBAL | {"LDS", "STS", "ATOMS", "LDL", "STL", "SHFL"},
}
COPIED = {"LDG", "STG", "LDS", "STS"}
SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);")
SASS_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')


class Code:
    """The control flow of one kernel: blocks, and the loops they form."""

    def __init__(self, text: str) -> None:
        """`text`: the kernel's section as nvdisasm -gi prints it."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        where: list[tuple[str, int]] = []
        fresh = True
        for line in text.splitlines():
            if match := SASS_LINE.search(line):
                where = [*([] if fresh else where), (match[1], int(match[2]))]
                fresh = False
            elif match := re.match(r"([.$\w]+):", line):
                labels[match[1]] = len(instructions)
            elif match := SASS.match(line):
                fresh = True
                instructions.append(Instruction(match[1], match[2], match[3].strip(), tuple(where)))
        ends = {
            n + 1 for n, i in enumerate(instructions) if i.kind in ("BRA", "EXIT", "RET", "CALL")
        }
        starts = sorted({0, *labels.values(), *ends} - {len(instructions)})
        self.blocks = [
            instructions[start:end]
            for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)
        ]
        self._block_at = {start: n for n, start in enumerate(starts)}
        every = [self._next(n, labels) for n in range(len(self.blocks))]
        self._order(every)
        self.loops = self._find_loops()
        self.loop_headers = {loop.header for loop in self.loops}

    def _next(self, number: int, labels: Mapping[str, int]) -> list[int]:
        """The blocks that follow. Calls lead nowhere: only slow paths call."""
        last = self.blocks[number][-1]
        following = [number + 1] if number + 1 < len(self.blocks) else []
        if last.kind == "BRA":
            if last.opcode.startswith("BRA.DIV"):  # to code for warps that have come apart
                return following
            target = re.search(r"`\(([^)]+)\)", last.operands)
            assert target is not None, last
            conditional = last.predicate or re.match(r"!?U?P\w", last.operands)
            return [self._block_at[labels[target[1]]], *(following if conditional else [])]
        if last.kind == "CALL":
            return []
        return following if last.kind not in ("EXIT", "RET") or last.predicate else []

    def _order(self, every: list[list[int]]) -> None:
        """Blocks in an order in which all but jumps back lead forward, and what dominates each."""
        post: list[int] = []
        seen = {0}
        stack = [(0, iter(every[0]))]
        while stack:
            block, rest = stack[-1]
            if (follower := next(rest, None)) is None:
                post.append(block)
                stack.pop()
            elif follower not in seen:
                seen.add(follower)
                stack.append((follower, iter(every[follower])))
        self.order = post[::-1]
        self.next = {n: every[n] for n in self.order}
        self.previous: dict[int, list[int]] = {n: [] for n in self.order}
        for n in self.order:
            for follower in self.next[n]:
                self.previous[follower].append(n)
        self.dominators = {n: set(self.order) for n in self.order} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for n in self.order[1:]:
                found = set.intersection(*(self.dominators[p] for p in self.previous[n])) | {n}
                changed = changed or found != self.dominators[n]
                self.dominators[n] = found

    def _find_loops(self) -> list[Loop]:
        found: dict[int, Loop] = {}
        for n in self.order:
            for header in self.next[n]:
                if header in self.dominators[n]:
                    loop = found.setdefault(header, Loop(header, {header}, []))
                    loop.jumps.append(self.blocks[n][-1].where[0])
                    stack = [n]
                    while stack:
                        if (block := stack.pop()) not in loop.blocks:
                            loop.blocks.add(block)
                            stack += self.previous[block]
        return list(found.values())

    def copied(self, blocks: set[int]) -> Counter[tuple[tuple[str, int], ...]]:
        """Where in the source the accesses to memory come from; unrolling copies them."""
        return Counter(i.where for n in blocks for i in self.blocks[n] if i.kind in COPIED)


@dataclass
class Loop:
    header: int
    blocks: set[int]
    jumps: list[tuple[str, int]]  # file and line of each jump back


@cache
def source_line(file: str, line: int) -> str:
    lines = Path(file).read_text().splitlines()
    return lines[line - 1].strip() if line <= len(lines) else ""  # the compiler's own code: line 0


def unrolled(inside: int, outside: int) -> float:
    """How many times a loop's body was copied into it, if so many accesses are in it and beside it.

    The rest of a trip count is done by code of the same source beside the loop: by one more loop,
    with one copy, or by one copy less than in the loop, in steps. Where that would make less than
    two copies, the compiler has doubled code for another reason.
    """
    if outside == 0:
        return 1
    copies = inside / outside if inside % outside == 0 else inside / (inside - outside)
    return copies if copies >= 2 else 1


def count(
    code: Code, trips: Mapping[str, float], skip: Sequence[str] = (), through: Sequence[str] = ()
) -> Counter[str]:
    """Instructions of one thread by opcode.

    Args:
        code: The kernel.
        trips: How often loops run whenever they are reached, by text of their line in the source.
        skip: Text of lines in the source whose accesses to memory do not happen.
        through: Text of lines that do run, where there is a shorter way around them.

    Raises:
        LookupError: A loop has no trip count.
    """
    runs: dict[int, float] = {}
    left_over: set[int] = set()
    everywhere = code.copied(set(code.order))
    # Those with most copies first: the others of the same lines do what these leave over.
    for loop in sorted(code.loops, key=lambda loop: -code.copied(loop.blocks).total()):
        lines = [source_line(*jump) for jump in loop.jumps]
        found = next((n for text, n in trips.items() if any(text in line for line in lines)), None)
        if found is None:
            raise LookupError(f"how often does this run? {loop.jumps[0][1]}: {lines[0]}")
        runs[loop.header] = 0 if loop.header in left_over else found
        nested = any(o.header != loop.header and o.header in loop.blocks for o in code.loops)
        if loop.header in left_over or nested:
            continue
        inside = code.copied(loop.blocks)
        beside = sum(everywhere[place] - n for place, n in inside.items())
        copies = unrolled(inside.total(), beside)
        runs[loop.header] /= copies
        if copies > 1:
            left_over |= {
                n for n in set(code.order) - loop.blocks if code.copied({n}).keys() & inside.keys()
            }

    def names(instruction: Instruction, texts: Sequence[str]) -> bool:
        lines = [source_line(*place) for place in instruction.where]
        return any(text in line for line in lines for text in texts)

    # Code that does not run is jumped over, or issued under a predicate that is false.
    off = {n: [names(i, skip) for i in code.blocks[n]] for n in code.order}
    wanted = {n: any(names(i, through) for i in code.blocks[n]) for n in code.order}

    def spent_in(block: int) -> Counter[str]:
        return Counter(
            "predicated off" if no and i.predicate else i.opcode
            for i, no in zip(code.blocks[block], off[block], strict=True)
        )

    def cheapest(members: set[int], start: int) -> Counter[str]:
        """Of the ways through some blocks from one to the end, or around the loop, the cheapest."""
        inner = {
            loop.header: loop
            for loop in code.loops
            if loop.header != start
            and loop.blocks < members
            and not any(loop.blocks < o.blocks < members for o in code.loops)
        }
        owner = {n: header for header, loop in inner.items() for n in loop.blocks}
        best: dict[int, tuple[tuple[int, int, int, float, float], Counter[str]]] = {}
        ends = []
        for n in code.order:
            node = owner.get(n, n)
            if n not in members or node != n or (node in left_over and node not in inner):
                continue
            before = [best[p] for q in code.previous[n] if (p := owner.get(q, q)) in best]
            if n == start:
                before = [((0, 0, 0, 0.0, 0.0), Counter())]
            if not before or (node in inner and runs[node] == 0):
                continue
            (loops, skips, passed, accesses, cost), spent = max(before, key=lambda one: one[0])
            if node in inner:
                blocks = inner[node].blocks
                body = cheapest(blocks, node)
                more = Counter({opcode: times * runs[node] for opcode, times in body.items()})
                loops += 1
            else:
                blocks = {n}
                skips -= sum(
                    no and not i.predicate and i.kind in KINDS["load/store"]
                    for i, no in zip(code.blocks[n], off[n], strict=True)
                )
                passed += wanted[n]
                more = spent_in(n)
            accesses += sum(n for opcode, n in more.items() if opcode.partition(".")[0] in GLOBAL)
            best[n] = (loops, skips, passed, accesses, cost - more.total()), spent + more
            if any(
                (start in code.next[b] and start in code.loop_headers)
                or (start == 0 and any(i.kind == "EXIT" for i in code.blocks[b]))
                for b in blocks
            ):
                ends.append(best[n])
        return max(ends, key=lambda one: one[0])[1]

    return cheapest(set(code.order), 0)


def by_kind(counts: Counter[str]) -> dict[str, float]:
    """Instructions of a thread in all, and of the kinds that have units of their own."""
    found = {"instructions": float(counts.total())}
    for kind, opcodes in KINDS.items():
        found[kind] = sum(n for opcode, n in counts.items() if opcode.partition(".")[0] in opcodes)
    return found
