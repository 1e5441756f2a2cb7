"""Loops of compiled kernels, and what in them goes to local memory."""

from concurrent.futures import Executor

import pytest

assembly = pytest.importorskip("fastssl.kernels.assembly")
spilling = pytest.importorskip("spilling")

TARGETS = list(spilling.FEW_REGISTERS)


def sass(*lines: str) -> str:
    """As cuobjdump prints it: an address every 16 bytes, the instruction, its encoding."""
    encoding = "/* 0x0 */"
    rows = (f"  /*{16 * i:04x}*/  {x} ;  {encoding}\n  {encoding}" for i, x in enumerate(lines))
    return "\n".join(["\tcode for sm_90a", "\t\tFunction : kernel", *rows])


def loops(instructions: list) -> list[tuple[str, bool]]:
    """The addresses of each loop's instructions, and whether it is an inner one."""
    found = assembly.loops_of(instructions)
    return [(" ".join(f"{i:x}0" for i in sorted(loop.body)), loop.inner) for loop in found]


@pytest.mark.parametrize("target", TARGETS)
def test_spills_in_a_loop_are_found(target: str, compiler: Executor) -> None:
    _, _, in_inner_loops = compiler.submit(spilling.accesses, "in_a_loop", target).result()
    assert in_inner_loops > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("kernel", "in_loops"), [("around_a_loop", False), ("in_an_outer_loop", True)]
)
def test_spills_outside_of_inner_loops_do_not_count(
    kernel: str, in_loops: bool, target: str, compiler: Executor
) -> None:
    everywhere, looped, inner = compiler.submit(spilling.accesses, kernel, target).result()
    assert everywhere > 0
    assert (looped > 0) == in_loops
    assert inner == 0


def test_a_loop_has_its_rare_branch_which_lies_behind_it() -> None:
    instructions = assembly.parse_sass(
        sass(
            "MOV R1, c[0x0][0x28]",
            "LDG.E R2, [R4.64]",
            "@!P0 BRA 0x60",
            "FADD R3, R3, R2",
            "@P1 BRA 0x10",
            "EXIT",
            "STL [R1+0x4], R3",
            "BRA 0x30",
            "BRA 0x80",  # no instruction leads here
        )
    )
    assert loops(instructions) == [("10 20 30 40 60 70", True)]
    assert assembly.local_in_loops(instructions) == 1


def test_a_call_that_does_not_come_back_leaves_the_loop() -> None:
    instructions = assembly.parse_sass(
        sass(
            "MOV R3, RZ",
            "FADD R3, R3, R2",
            "@P0 CALL.REL.NOINC 0x40",
            "BRA 0x10",
            "LDL.LU R4, [R1]",
            "@P1 BRA P2, 0x0",
            "@!P1 EXIT",
            "STL [R1], R4",
            "EXIT",
        )
    )
    assert loops(instructions) == [("00 10 20 30 40 50", False), ("10 20 30", True)]
    assert assembly.local_in_loops(instructions) == 0


def test_a_loop_that_leads_nowhere_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="where BRX R2 -0x10 leads is not in the text"):
        assembly.parse_sass(sass("BRX R2 -0x10", "EXIT"))


@pytest.mark.parametrize("work", ["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]", "MUFU.EX2 R2, R2"])
def test_a_loop_with_products_or_exponentials_is_inner_whatever_it_waits_for(work: str) -> None:
    def waiting(*lines: str) -> list:
        rest = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA 0x10", "STL [R1], R3")
        return assembly.parse_sass(sass(*lines, *rest, "@P1 BRA 0x0", "EXIT"))

    assert loops(waiting(work)) == [("00 10 20 30 40", True), ("10 20", True)]
    assert assembly.local_in_loops(waiting(work)) == 1
    assert loops(waiting("HFMA2.MMA R2, -RZ, RZ, 0, 0"))[0] == ("00 10 20 30 40", False)


def test_loops_of_amd_are_found_by_their_labels() -> None:
    instructions = assembly.parse_amdgcn(
        """
kernel:                                 ; @kernel
.Lfunc_begin0:
\t.file\t1 "/kernels" "kernel.py"
; %bb.0:
\tscratch_store_dword off, v1, off        ; 4-byte Folded Spill
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\ts_cbranch_vccnz .LBB0_3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
\tscratch_load_dword v1, off, off offset:4 ; 4-byte Folded Reload
\ts_branch .LBB0_1
.LBB0_3:
\ts_endpgm
"""
    )
    assert loops(instructions) == [("10 20 30 40", True)]
    assert assembly.local_in_loops(instructions) == 1


def test_a_kernel_without_a_loop_has_nothing_in_one() -> None:
    instructions = assembly.parse_sass(sass("LDL R2, [R1]", "@P0 EXIT", "STL [R1], R2", "EXIT"))
    assert loops(instructions) == []
    assert assembly.local_in_loops(instructions) == 0
