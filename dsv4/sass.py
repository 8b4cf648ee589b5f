"""What the kernels of a built library compiled to: `python -m dsv4.build --check-sass`.

A line `// sass <kernel>: A, B` of a .cu file promises that every instance of <kernel> has an instruction that
begins with A and one that begins with B: those that its design stands on. `// sass 90a <kernel>: A, B`
promises it of that architecture's library alone. No kernel may use local memory (spilled registers, arrays on
a stack), and none may sum floating-point numbers in memory, where the order and with it the bits would change
from run to run.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dsv4 import build

COMMENT = re.compile(r"^\s*//\s*sass\b.*$", re.MULTILINE)
PROMISE = re.compile(r"// sass (?:(\d+a) )?(\w+): ([A-Z][\w.]*(?:, [A-Z][\w.]*)*)")
FUNCTION = re.compile(r"\s*Function : (\S+)")
# The opcode of an instruction, after its address and predicate.
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")
# An addition of floats; a compare-and-swap of 32 bits, the loop that sums halves or sums in shared memory; an
# addition by TMA, whose opcode does not tell the type. REDUX works between a warp's lanes, not in memory.
FLOATING_SUM = re.compile(
    r"(?!C?REDUX)(\w*RED\w*|ATOM\w*)\..*\b(ADD\.B?F\d|CAST?\b(?!.*\.64))|UTMAREDG.*\.ADD"
)
PTXAS_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
PTXAS_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class Promise(NamedTuple):
    """What one line of a .cu file promises of one kernel."""

    file: str
    kernel: str
    opcodes: tuple[str, ...]
    arch: str | None = None  # the only one that it is of, or None for all


def read_promises(csrc: Path) -> list[Promise]:
    """Every `// sass` line of the .cu files below ``csrc``; ``ValueError`` for one that says nothing."""
    found = []
    for path in sorted(csrc.rglob("*.cu")):
        file = path.relative_to(csrc).as_posix()
        for line in COMMENT.findall(path.read_text(encoding="utf-8")):
            promise = PROMISE.fullmatch(line.rstrip())
            if promise is None:
                raise ValueError(f"{file}: expected `// sass <kernel>: A, B`, found {line.strip()!r}")
            found.append(Promise(file, promise[2], tuple(promise[3].split(", ")), promise[1]))
    return found


def read_opcodes(listing: Iterable[str]) -> dict[str, set[str]]:
    """Mangled name of a kernel -> the opcodes of its code, from the lines that cuobjdump -sass prints."""
    kernels: dict[str, set[str]] = {}
    opcodes: set[str] = set()
    for line in listing:
        if function := FUNCTION.match(line):
            opcodes = kernels.setdefault(function[1], set())
        elif instruction := INSTRUCTION.match(line):
            opcodes.add(instruction[1])
    return kernels


def find_faults(kernels: dict[str, set[str]], promises: list[Promise], ptxas: str) -> Iterator[str]:
    """A sentence for everything that is not as it must be."""
    for promise in promises:
        mangled = f"{len(promise.kernel)}{promise.kernel}"
        instances = [name for name in kernels if mangled in name or name == promise.kernel]
        if not instances:
            yield f"{promise.file}: promises something of {promise.kernel}, but no kernel has that name"
        for name in instances:
            for opcode in promise.opcodes:
                if not any(found.startswith(opcode) for found in kernels[name]):
                    yield f"{promise.file}: {name} has no {opcode}"
    for name, opcodes in kernels.items():
        if local := sorted(filter(LOCAL_MEMORY.match, opcodes)):
            yield f"{name} uses local memory: {', '.join(local)}"
        if sums := sorted(filter(FLOATING_SUM.match, opcodes)):
            yield f"{name} may sum floating-point numbers in no fixed order: {', '.join(sums)}"
    name = "?"
    for line in ptxas.splitlines():
        if kernel := PTXAS_KERNEL.search(line):
            name = kernel[1]
        elif (stack := PTXAS_STACK.search(line)) and any(map(int, stack.groups())):
            yield f"{name} has {stack[0]}"


def check_all(libraries: dict[str, Path]) -> str:
    """A line for each architecture's library; ``ValueError`` with the faults of all."""
    lines, faults = [], []
    for arch, library in libraries.items():
        try:
            lines.append(check(library, arch))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return "\n".join(lines)


def check(library: Path, arch: str) -> str:
    """One line that says what was found right; ``ValueError`` with a line for each fault."""
    promises = [promise for promise in read_promises(build.CSRC) if promise.arch in (None, arch)]
    ptxas = (library.parent / build.PTXAS_REPORT).read_text(encoding="utf-8")
    kernels = read_opcodes(disassemble(library))
    faults = list(find_faults(kernels, promises, ptxas))
    if not kernels:
        faults.append(f"{library} holds no kernel")
    if faults:
        text = "\n".join((f"sm_{arch}: {len(faults)} faults in the compiled kernels", *faults))
        if shutil.which("c++filt"):
            text = subprocess.run(["c++filt"], input=text, text=True, stdout=subprocess.PIPE).stdout
        raise ValueError(text)
    kept = sum(len(promise.opcodes) for promise in promises)
    return f"sm_{arch}: {len(kernels)} kernels, {kept} promises kept, no spills, no floating-point atomics"


def disassemble(library: Path) -> Iterator[str]:
    """The lines of cuobjdump -sass. ``ValueError`` if the disassembler is not installed or fails."""
    cuobjdump, nvdisasm = _tool("cuobjdump"), _tool("nvdisasm")
    found_by_cuobjdump = {"PATH": f"{nvdisasm.parent}:/usr/bin:/bin"}
    with subprocess.Popen(
        [cuobjdump, "-sass", library],
        env=found_by_cuobjdump,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise ValueError(f"--check-sass: {cuobjdump} ended with status {process.returncode} on {library}")


def _tool(name: str) -> Path:
    for home in build.toolkits():
        if (home / "bin" / name).is_file():
            return home / "bin" / name
    if found := shutil.which(name):
        return Path(found)
    raise ValueError(
        f"--check-sass: expected {name} in $CUDA_HOME, PATH, /usr/local/cuda or pip's packages, found none; "
        "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )
