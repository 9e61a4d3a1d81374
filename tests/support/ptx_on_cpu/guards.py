"""Does machine code guard its accesses to memory wherever the PTX does? ptxas may move code, also
out from under a condition.

An access is *unconditional* if it is made in each round of the innermost loop around it (or,
outside of loops, by each thread that gets to the end). Accesses are matched by their kind and by
their line with the line it was put into, which ptxas keeps (`-lineinfo`): where a place in the
source has only conditional accesses in the PTX, none of its accesses may be unconditional in the
machine code. A condition that only decides whether a whole loop runs is not looked at within that
loop.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

from tools import sass

from .parser import parse

Place = tuple[str, int, int]  # "ld.global", line, line it was put into or 0


@dataclass
class Node:
    accesses: list[tuple[Place, bool, str]] = field(
        default_factory=list
    )  # with whether a predicate guards it, and its text
    following: list[int] = field(default_factory=list)
    ends: bool = False  # whether threads may end there


def _reachable(nodes: list[Node], start: int, within: set[int], without: int) -> set[int]:
    seen, stack = set(), [start] if start != without else []
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack += [n for n in nodes[one].following if n in within and n != without]
    return seen


def _loops(nodes: list[Node]) -> dict[int, set[int]]:
    """The nodes of each natural loop, by its header."""
    everywhere = set(range(len(nodes)))
    reachable = _reachable(nodes, 0, everywhere, -1)
    before = defaultdict(list)
    for one in reachable:
        for n in nodes[one].following:
            before[n].append(one)
    dominated = {one: reachable - _reachable(nodes, 0, everywhere, one) for one in reachable}
    loops: dict[int, set[int]] = {}
    for header in reachable:
        latches = [one for one in before[header] if one in dominated[header]]
        if latches:
            body, stack = {header}, list(latches)
            while stack:
                one = stack.pop()
                if one not in body:
                    body.add(one)
                    stack += before[one]
            loops[header] = body
    return loops


def unconditional(nodes: list[Node]) -> tuple[dict[Place, str], set[Place]]:
    """The places with an unconditional access (and one's text), and all places."""
    loops, everywhere = _loops(nodes), set(range(len(nodes)))
    found, every = {}, set()
    for number in _reachable(nodes, 0, everywhere, -1):
        node = nodes[number]
        every |= {place for place, _, _ in node.accesses}
        if not any(not guarded for _, guarded, _ in node.accesses):
            continue
        around = min((h for h, body in loops.items() if number in body), key=lambda h: len(loops[h]), default=None)
        start, within = (0, everywhere) if around is None else (around, loops[around])
        ends = {n for n in within if (nodes[n].ends if around is None else around in nodes[n].following)}
        others = _reachable(nodes, start, within, number)
        if not others & (ends - {number}):
            found |= {place: text for place, guarded, text in node.accesses if not guarded}
    return found, every


def of_ptx(text: str, kernel: str) -> list[Node]:
    program, nodes = parse(text, kernel), []
    for index, block in enumerate(program.blocks):
        node = Node()
        for one in block.instructions:
            kind = one.parts[0]
            space = next((part for part in one.parts if part in ("global", "shared")), "")
            if (
                kind in ("ld", "st", "cp")
                and space
                and one.source
                and one.parts[1:3] not in (("async", "commit_group"), ("async", "wait_group"))
            ):
                node.accesses.append(
                    (("cp" if kind == "cp" else f"{kind}.{space}", *one.source[1:]), bool(one.guard), one.text)
                )
        last = block.instructions[-1]
        if last.parts[0] == "bra":
            node.following.append(program.labels[last.operands[0]])
        node.ends = last.parts[0] in ("ret", "exit")
        if (last.parts[0] not in ("bra", "ret", "exit") or last.guard) and index + 1 < len(program.blocks):
            node.following.append(index + 1)
        nodes.append(node)
    return nodes


_KINDS = {"LDG": "ld.global", "STG": "st.global", "LDS": "ld.shared", "STS": "st.shared", "LDGSTS": "cp"}
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(\w+),")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;")
_PLACE = re.compile(r'//## File "[^"]*", line (\d+)(?: inlined at "[^"]*", line (\d+))?')


def of_cubin(cubin: bytes, kernel: str) -> list[Node]:
    nodes, labels, jumps = [Node()], {}, []
    place, fresh, inside = (0, 0), True, False
    for line in sass.listing(cubin).splitlines():
        if section := _SECTION.match(line):
            inside = section[1] == kernel
        elif not inside:
            continue
        elif found := _PLACE.search(line):
            if fresh:
                place, fresh = (
                    (int(found[1]), int(found[2] or 0)),
                    False,
                )  # lines after it say what it was put into in turn
        elif label := _LABEL.match(line):
            nodes[-1].following.append(len(nodes))
            labels[label[1]] = len(nodes)
            nodes.append(Node())
        elif found := _LINE.match(line):
            fresh = True
            guard, opcode, operands = found.groups()
            kind = opcode.split(".")[0]
            if kind in _KINDS:
                nodes[-1].accesses.append(((_KINDS[kind], *place), bool(guard), " ".join(line.split())))
            if kind in ("BRA", "EXIT", "RET", "BRX"):
                target = re.search(r"`\((\.L_\w+)\)", operands or "")
                nodes[-1].ends = kind == "EXIT"
                if target:
                    jumps.append((len(nodes) - 1, target[1]))
                conditional = guard or "." in opcode or (kind == "BRA" and not (operands or "").startswith("`"))
                if conditional and kind != "RET":
                    nodes[-1].following.append(len(nodes))
                nodes.append(Node())
    for number, label in jumps:
        nodes[number].following.append(labels[label])
    if nodes[-1].following == [] and not nodes[-1].accesses:
        nodes.pop()
    for node in nodes:
        node.following = [n for n in node.following if n < len(nodes)]
    return nodes


def unguarded(text: str, cubin: bytes, kernel: str) -> list[str]:
    """Instructions of ``cubin`` that access memory unconditionally at a place where the PTX does so
    under a condition only.
    """
    wanted, every = unconditional(of_ptx(text, kernel))
    found, _ = unconditional(of_cubin(cubin, kernel))
    return [
        f"line {place[1]}, put into {place[2]}: {text}"
        for place, text in sorted(found.items())
        if place in every and place not in wanted
    ]
