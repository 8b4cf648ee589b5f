"""Builds csrc/ into one shared library per GPU architecture, and finds libraries already built.

    python -m dsv4.build [--arch 90a,100a] [--out DIR] [--check-sass]

A library is known by its key: sources, headers, flags and architecture. It is looked for in `.build/<key>`
beside csrc/, then in `~/.cache/dsv4/<key>`, and built where it is in neither. Building needs nvcc 13, g++ and
the torch headers, and no GPU: one library serves every torch >= 2.11. This file imports the standard library
alone, so that setup.py can load it by its path. Not responsible for loading the library (``dsv4._C``).
"""

import argparse
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = ("90a", "100a", "103a", "120a")
PACKAGE = Path(__file__).resolve().parent
# csrc/ lies inside an installed package, and beside the package in a checkout.
HOME = PACKAGE if (PACKAGE / "csrc").is_dir() else PACKAGE.parent
CSRC, BESIDE = HOME / "csrc", HOME / ".build"
USER_CACHE = Path("~/.cache/dsv4")
LIBRARY, MANIFEST, PTXAS_REPORT = "libdsv4.so", "manifest.json", "ptxas.txt"

NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-lineinfo")
# The stable ABI of torch 2.11 and a stream getter that a CPU build of torch does not have.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", STABLE_ABI)
LIBRARIES = ("-ltorch", "-ltorch_cpu", "-lc10", "-lcudart_static", "-lrt", "-ldl", "-lpthread")
LINK_FLAGS = ("-shared", "-Wl,--no-as-needed", *LIBRARIES)


def sources() -> list[Path]:
    """Every file of csrc/ that the library depends on."""
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))


def library_key(arch: str) -> str:
    """What a library for ``arch`` is known by; raises ``ValueError`` for an architecture we do not build."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"--arch: expected one of {', '.join(ARCHITECTURES)}, found {arch!r}")
    digest = hashlib.sha256(repr((arch, NVCC_FLAGS, CXX_FLAGS, LINK_FLAGS)).encode())
    for path in sources():
        digest.update(f"\0{path.relative_to(CSRC).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find(arch: str) -> Path | None:
    """The library for ``arch`` built from the present sources, or None."""
    key = library_key(arch)
    for folder in (BESIDE, USER_CACHE.expanduser()):
        if (folder / key / LIBRARY).is_file():
            return folder / key / LIBRARY
    return None


def find_or_build(arch: str) -> Path:
    """The library for ``arch``, built if it is missing: into .build if it can be written, else the cache."""
    return find(arch) or build(arch, BESIDE if os.access(BESIDE, os.W_OK) else USER_CACHE.expanduser())


def build(arch: str, folder: Path) -> Path:
    """The library for ``arch`` in ``folder/<key>``, compiled if it is not there.

    Another process that is building the same is waited for, and a failure leaves nothing but its lock file.
    Raises ``ValueError``: what to install where nvcc, g++ or torch is missing, or the compiler's words.
    """
    target = folder / library_key(arch)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{target.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            started = time.perf_counter()
            units = [path for path in sources() if path.suffix in (".cu", ".cpp")]
            print(f"dsv4: building {len(units)} files for sm_{arch} into {target}, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{target.name}-") as scratch:
                _build_into(Path(scratch), arch, units).rename(target)
            print(f"dsv4: built in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return target / LIBRARY


def _build_into(scratch: Path, arch: str, units: list[Path]) -> Path:
    """The folder in ``scratch`` with the library, its manifest and what ptxas said of each kernel."""
    nvcc, torch = find_nvcc(), _torch_folder()
    if shutil.which("g++") is None:
        raise ValueError("build: expected a C++ compiler, found no g++ on PATH; Debian: apt install g++")
    toolkit = nvcc.parent.parent
    objects, finished = scratch / "objects", scratch / "finished"
    objects.mkdir()
    finished.mkdir()
    target = (f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-DDSV4_ARCH={arch.rstrip('a')}")
    includes = [torch / "include", torch / "include/torch/csrc/api/include", toolkit / "include", CSRC]

    def compile_unit(unit: Path) -> tuple[Path, str]:
        name = unit.relative_to(CSRC).as_posix()
        out = objects / f"{name.replace('/', '-')}.o"
        if unit.suffix == ".cu":
            command = [nvcc, *NVCC_FLAGS, *target, "-I", CSRC, "-c", unit, "-o", out]
        else:
            command = ["g++", *CXX_FLAGS, *(f"-I{path}" for path in includes), "-c", unit, "-o", out]
        return out, f"{name}\n{_run(command)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_unit, units))
    libraries = [path for name in ("lib64", "lib") if (path := toolkit / name).is_dir()] + [torch / "lib"]
    search = [f"-L{path}" for path in libraries]
    _run(["g++", *(out for out, _ in done), *search, *LINK_FLAGS, "-o", finished / LIBRARY])
    (finished / PTXAS_REPORT).write_text("\n".join(report for _, report in done), encoding="utf-8")
    # The compiler is not part of the key: a library that another nvcc 13 made serves as well.
    version = [line for line in _run([nvcc, "--version"]).splitlines() if "release" in line]
    facts = {"arch": arch, "nvcc": " ".join(version), "flags": NVCC_FLAGS, "built": time.strftime("%Y-%m-%d")}
    (finished / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return finished


def _run(command: list[str | Path]) -> str:
    """The output of a command; ``ValueError`` with its last words if it fails."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, **streams)
    if done.returncode:
        words = " ".join(map(str, command))
        raise ValueError(f"build: exit status {done.returncode} from {words}\n{done.stdout[-4000:]}")
    return done.stdout


def toolkits() -> list[Path]:
    """Where a CUDA toolkit may lie: $CUDA_HOME, around PATH's nvcc, /usr/local/cuda, pip's packages."""
    named, on_path, wheels = os.environ.get("CUDA_HOME"), shutil.which("nvcc"), find_spec("nvidia")
    homes = [Path(named)] if named else []
    homes += [Path(on_path).resolve().parent.parent] if on_path else []
    homes.append(Path("/usr/local/cuda"))
    places = wheels.submodule_search_locations if wheels else None
    return homes + [Path(place) / "cu13" for place in places or []]


@functools.cache
def find_nvcc() -> Path:
    """nvcc of the first toolkit of CUDA 13; ``ValueError`` with what to install if there is none."""
    for home in toolkits():
        # A wrapper script on PATH has no toolkit around it, and torch's wheels have headers without nvcc.
        header = home / "include" / "cuda_runtime_api.h"
        if (home / "bin" / "nvcc").is_file() and header.is_file():
            version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(encoding="utf-8"))
            if version and int(version[1]) // 1000 == 13:
                return home / "bin" / "nvcc"
    raise ValueError(
        "build: expected the CUDA compiler nvcc 13, found none in $CUDA_HOME, PATH, /usr/local/cuda or pip's "
        "packages; pip install 'dsv4[build]' (in a checkout: pip install '.[build]'), install CUDA 13, "
        "or use --device cpu"
    )


def _torch_folder() -> Path:
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise ValueError(f"build: expected torch >= 2.11, for its headers, in {sys.prefix}, found none")
    return Path(found.origin).parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90a", help=f"comma-separated: {', '.join(ARCHITECTURES)}; or all")
    parser.add_argument("--out", default=BESIDE, type=Path, metavar="DIR")
    parser.add_argument("--check-sass", action="store_true", help="check what the kernels compiled to")
    args = parser.parse_args(argv)
    archs = ARCHITECTURES if args.arch == "all" else args.arch.split(",")
    libraries = {arch: build(arch, args.out) for arch in archs}
    for arch, library in libraries.items():
        print(f"sm_{arch}: {library}")
    if args.check_sass:
        from dsv4.sass import check_all  # a tool of developers; the build itself does without

        print(check_all(libraries))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
