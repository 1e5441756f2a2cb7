"""What a compiled kernel needs of a GPU, and its instructions and loops, read from its assembly.

A loop is a set of instructions each of which leads to every other, wherever they lie in the text:
ptxas puts rare branches of a loop far behind the rest of it. An inner loop has no loop inside it,
or has products or exponentials of its own. Of the latter kind is the walk of the columns where
features are walked in chunks inside it, and a walk in which small loops wait for each product. What
is in no loop, because it was unrolled for instance, is executed once by a program.
"""

import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import triton

# Opcodes: of NVIDIA in capitals, of AMD in small letters.
LOCAL = re.compile(r"(LDL|STL)\b|scratch_(load|store)_")
PRODUCT_OR_EXPONENTIAL = re.compile(r"\w+MMA\b|MUFU\.EX2\b|v_mfma_|v_exp_")


class Resources(NamedTuple):
    """Registers of a thread, its bytes of local memory, and how often inner loops access those."""

    registers: int
    spilled: int
    in_loops: int


class Instruction(NamedTuple):
    """A line of assembly; successors are the indices of what may be executed next."""

    opcode: str
    operands: str
    successors: tuple[int, ...]


class Loop(NamedTuple):
    """Indices of a loop's instructions, and of those that are in no loop inside it."""

    body: frozenset[int]
    own: frozenset[int]
    inner: bool


@lru_cache
def resources_of(compiled):
    """What a compiled kernel needs of a thread."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        text = _cuobjdump(compiled, "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
        registers, stack, local = map(int, found)
        spilled = stack + local
    in_loops = local_in_loops(instructions_of(compiled)) if spilled else 0
    return Resources(registers, spilled, in_loops)


def local_in_loops(instructions):
    """How many instructions of inner loops go to local memory, where registers are spilled to."""
    inner = (loop.body for loop in loops_of(instructions) if loop.inner)
    opcodes = (instructions[i].opcode for i in frozenset().union(*inner))
    return sum(bool(LOCAL.match(opcode)) for opcode in opcodes)


def instructions_of(compiled):
    """The instructions of a compiled kernel in the order of its text."""
    if "amdgcn" in compiled.asm:
        return parse_amdgcn(compiled.asm["amdgcn"])
    return parse_sass(_cuobjdump(compiled, "--dump-sass"))


def _cuobjdump(compiled, option):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_sass(text):
    """Instructions of a kernel as cuobjdump prints them.

    A CALL may come back, and where ptxas uses it as a jump does not. What it calls, such as the
    slow path of a division, is in no loop of its caller.
    """
    pattern = r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z]\S*?)(?:\s+([^;]*?))?\s*;"
    lines = re.findall(pattern, text, re.MULTILINE)
    index = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    instructions = []
    for i, (_, guard, opcode, operands) in enumerate(lines):
        kind = opcode.split(".")[0]
        successors = []
        if kind in ("BRA", "CALL"):
            successors.append(index[int(operands.split()[-1], 16)])
        elif kind in ("BRX", "JMP", "JMX"):
            raise ValueError(f"where {opcode} {operands} leads is not in the text")
        # A branch with more operands than its target, or under a guard, may not be taken.
        leaves = kind in ("EXIT", "RET") or (kind == "BRA" and "," not in operands)
        if (guard or not leaves) and i + 1 < len(lines):
            successors.append(i + 1)
        instructions.append(Instruction(opcode, operands, tuple(successors)))
    return instructions


def parse_amdgcn(text):
    """Instructions of a kernel in LLVM's assembly."""
    labels, lines = {}, []
    for line in text.splitlines():
        if label := re.match(r"(\S+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([a-z]\w+)([^;]*)", line):
            lines.append((found[1], found[2].strip()))
    instructions = []
    for i, (opcode, operands) in enumerate(lines):
        successors = []
        if opcode.startswith(("s_branch", "s_cbranch")):
            successors.append(labels[operands])
        elif opcode.startswith(("s_setpc", "s_swappc")):
            raise ValueError(f"where {opcode} {operands} leads is not in the text")
        if opcode not in ("s_branch", "s_endpgm") and i + 1 < len(lines):
            successors.append(i + 1)
        instructions.append(Instruction(opcode, operands, tuple(successors)))
    return instructions


def loops_of(instructions):
    """The loops of a kernel, each before those inside it."""
    # Blocks of instructions of which only the last leads elsewhere, by their first one.
    jumps = [i for i, x in enumerate(instructions) if x.successors != (i + 1,)]
    starts = {0}.union(*({i + 1, *instructions[i].successors} for i in jumps))
    starts = sorted(starts.intersection(range(len(instructions))))
    ends = [*starts[1:], len(instructions)]
    blocks = {start: range(start, end) for start, end in zip(starts, ends, strict=True)}
    leads_to = {start: set(instructions[block[-1]].successors) for start, block in blocks.items()}
    executed = {0} | _reached(leads_to, 0, set(blocks))
    leads_to = {start: leads_to[start] for start in executed}

    loops = []
    for members, inside in _nested(leads_to, executed):
        body, own = (
            frozenset(i for start in some for i in blocks[start])
            for some in (members, members - inside)
        )
        works = any(PRODUCT_OR_EXPONENTIAL.match(instructions[i].opcode) for i in own)
        loops.append(Loop(body, own, works or not inside))
    return loops


def _nested(leads_to, blocks):
    """Yield each loop of some blocks, and which of its blocks are in loops inside it."""
    reached = {block: _reached(leads_to, block, blocks) for block in blocks}
    left = {block for block in blocks if block in reached[block]}
    while left:
        first = min(left)
        loop = {block for block in reached[first] if first in reached[block]}
        left -= loop
        # Without the block that it is entered by, only loops inside it still go round.
        entered = set().union(*(leads_to[block] for block in leads_to.keys() - loop))
        inside = list(_nested(leads_to, loop - {min(loop & entered, default=first)}))
        yield loop, set().union(*(members for members, _ in inside))
        yield from inside


def _reached(leads_to, start, blocks):
    """Which blocks one of them leads to through no others."""
    reached, todo = set(), [start]
    while todo:
        new = (leads_to[todo.pop()] & blocks) - reached
        reached |= new
        todo += new
    return reached
