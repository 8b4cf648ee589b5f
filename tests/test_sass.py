"""What is read out of a disassembly, and that each kind of fault in it is found."""

from pathlib import Path

import pytest

from dsv4 import build, sass
from dsv4.sass import Promise, find_faults, read_opcodes, read_promises

NAME = "_ZN4dsv446_GLOBAL__N__d7ce8979_7_dots_cu_67b8600011dots_kernelIfEEvPKT_PKfi"
OTHER = "_ZN4dsv446_GLOBAL__N__d7ce8979_7_dots_cu_67b8600017quick_dots_kernelIfEEvPKT_PKfi"
LISTING = f"""
Fatbin elf code:
================
arch = sm_90a
identifier = csrc/room/dots.cu

	code for sm_90a
	.target	sm_90a

		Function : {NAME}
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000fe20000000800 */
        /*0130*/              @!P4 LDG.E.128.CONSTANT R24, [R2.64] ;  /* 0x00008400ff18cb82 */
        /*0140*/              @UP0 UIADD3 UR6, UR9, UR5, URZ ;        /* 0x0000000509067290 */
        /*10150*/              @P0 STG.E.128 desc[UR8][R2.64], R4 ;   /* 0x000000040a007986 */
		..........

		Function : {OTHER}
        /*0000*/                   EXIT ;                             /* 0x000000000000794d */
"""
PTXAS = f"""room/dots.cu
ptxas info    : Compiling entry function '{NAME}' for 'sm_90a'
ptxas info    : Function properties for {NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem
"""
OPCODES = {"LDC", "LDG.E.128.CONSTANT", "UIADD3", "STG.E.128"}


def faults(*opcodes: str, promises: tuple[Promise, ...] = (), ptxas: str = PTXAS) -> list[str]:
    """What is wrong with a kernel that has these opcodes besides harmless ones."""
    return list(find_faults({NAME: OPCODES | set(opcodes)}, list(promises), ptxas))


def test_opcodes_are_read_by_kernel() -> None:
    assert read_opcodes(LISTING.splitlines()) == {NAME: OPCODES, OTHER: {"EXIT"}}


def test_promises_are_read_from_comments(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    source = tmp_path / "room" / "dots.cu"
    promised = "// sass dots_kernel: LDG.E.128, STG.E", "// sass 90a quick_dots_kernel: EXIT"
    lines = (*promised, "int x;  // sassy")
    source.write_text("\n".join(lines), encoding="utf-8")
    assert read_promises(tmp_path) == [
        Promise("room/dots.cu", "dots_kernel", ("LDG.E.128", "STG.E")),
        Promise("room/dots.cu", "quick_dots_kernel", ("EXIT",), "90a"),
    ]
    for wrong in ("// sass dots_kernel LDG", "//sass dots_kernel: LDG", "// sass k: LDG,", "// sass k: "):
        source.write_text(f"{wrong}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="dots.cu: expected `// sass <kernel>: A, B`, found"):
            read_promises(tmp_path)


def test_promises_of_csrc_name_kernels_of_their_file() -> None:
    for promise in read_promises(build.CSRC):
        assert f"{promise.kernel}(" in (build.CSRC / promise.file).read_text(encoding="utf-8"), promise


def test_promises_are_kept_or_not() -> None:
    def of(kernel: str, *opcodes: str) -> list[str]:
        return faults(promises=(Promise("room/dots.cu", kernel, opcodes),))

    assert of("dots_kernel", "LDG.E.128", "STG") == []
    assert of("dots_kernel", "LDG.E.128", "HGMMA", "LDG.E.64") == [
        f"room/dots.cu: {NAME} has no HGMMA",
        f"room/dots.cu: {NAME} has no LDG.E.64",
    ]
    # The file's name is in the mangled name too, and is not the kernel's.
    for kernel in ("dots_kern", "dots", "dots_cu", "ots_kernel"):
        assert "no kernel has that name" in of(kernel, "LDG")[0]
    both = {NAME: OPCODES, OTHER: {"EXIT"}}
    assert list(find_faults(both, [Promise("dots.cu", "dots_kernel", ("LDG",))], "")) == []


@pytest.mark.parametrize("opcode", ["LDL", "LDL.LU.64", "STL", "STL.128"])
def test_local_memory(opcode: str) -> None:
    assert faults(opcode) == [f"{NAME} uses local memory: {opcode}"]


def test_spills_and_stack_that_ptxas_reports() -> None:
    assert faults() == []
    words = "{} bytes stack frame, {} bytes spill stores, {} bytes spill loads"
    for numbers in ((8, 0, 0), (0, 16, 0), (0, 0, 4)):
        line = words.format(*numbers)
        report = PTXAS.replace(words.format(0, 0, 0), line)
        assert faults(ptxas=report) == [f"{NAME} has {line}"]


# Opcodes as nvcc 13.0 makes them of atomicAdd, red, cp.reduce.async.bulk and the rest.
@pytest.mark.parametrize(
    "opcode",
    [
        "REDG.E.ADD.F32.FTZ.RN.STRONG.GPU",
        "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU",
        "REDG.E.ADD.F64.RN.STRONG.GPU",
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU",
        "ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU",
        "ATOM.E.ADD.BF16x2.RN.STRONG.GPU",
        "ATOM.E.ADD.F16x2.RN.STRONG.GPU",
        "UBLKRED.G.S.ADD.F32.RN",
        "UBLKRED.G.S.ADD.BF16.RN",
        "UTMAREDG.1D.ADD",
        "ATOM.E.CAS.STRONG.GPU",
        "ATOMS.CAST.SPIN",
    ],
)
def test_floating_point_sums_in_memory(opcode: str) -> None:
    assert faults(opcode) == [f"{NAME} may sum floating-point numbers in no fixed order: {opcode}"]


@pytest.mark.parametrize(
    "opcode",
    [
        "REDG.E.ADD.STRONG.GPU",
        "REDG.E.MAX.S32.STRONG.GPU",
        "REDG.E.ADD.64.STRONG.GPU",
        "ATOMG.E.ADD.STRONG.GPU",
        "ATOMG.E.EXCH.STRONG.GPU",
        "ATOMS.POPC.INC.32",
        "ATOMS.MAX.S32",
        "ATOMS.CAST.SPIN.64",
        "UBLKRED.G.S.ADD.S32",
        "UBLKRED.G.S.MAX.BF16.RN",
        "REDUX.SUM.S32",
        "CREDUX.MAX.S32",
        "FADD.FTZ",
    ],
)
def test_sums_of_integers_are_free(opcode: str) -> None:
    assert faults(opcode) == []


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built library of a csrc/ with one promise; its disassembly is LISTING."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "dots.cu").write_text("// sass dots_kernel: LDG, STG\n", encoding="utf-8")
    (tmp_path / build.PTXAS_REPORT).write_text(PTXAS, encoding="utf-8")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(build, "toolkits", lambda: [tmp_path / "toolkit"])
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    (tmp_path / "listing").write_text(LISTING, encoding="utf-8")
    for name, words in (("cuobjdump", f"nvdisasm; cat {tmp_path / 'listing'}"), ("nvdisasm", "true")):
        tool = tmp_path / "toolkit" / "bin" / name
        tool.write_text(f"#!/bin/sh\nset -e\n{words}\n", encoding="utf-8")
        tool.chmod(0o755)
    return tmp_path / build.LIBRARY


def test_check_reports_in_a_line(library: Path) -> None:
    assert sass.check(library, "90a") == (
        "sm_90a: 2 kernels, 2 promises kept, no spills, no floating-point atomics"
    )


def test_check_lists_all_faults(library: Path) -> None:
    listing = library.parent / "listing"
    listing.write_text(LISTING.replace("STG", "STL").replace("UIADD3", "RED.E.ADD.F32"), encoding="utf-8")
    with pytest.raises(ValueError, match="sm_90a: 3 faults") as caught:
        sass.check(library, "90a")
    for words in ("dots.cu: ", " has no STG", "local memory: STL.E.128", "no fixed order: RED.E.ADD.F32"):
        assert words in str(caught.value)
    listing.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="(?s)sm_90a: .* holds no kernel.*sm_100a: .* holds no kernel"):
        sass.check_all({"90a": library, "100a": library})


def test_the_disassembler_fails_or_is_missing(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (library.parent / "listing").unlink()
    with pytest.raises(ValueError, match="cuobjdump ended with status 1 on .*libdsv4.so"):
        sass.check(library, "90a")
    monkeypatch.setattr(build, "toolkits", list)
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="expected cuobjdump .*pip install nvidia-cuda-cuobjdump"):
        sass.check(library, "90a")
