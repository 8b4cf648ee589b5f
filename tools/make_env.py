"""Print the path of a Python interpreter that has everything this project needs.

    python3 tools/make_env.py [PACKAGE ...]     PACKAGE: one of pyproject.toml's extra `test`

The interpreter that runs this script is used as it is if it has the dependencies of pyproject.toml and the
named packages: an image or an active environment with torch is never doubled. Otherwise `.venv` is made with
the versions of constraints.txt; if the current python3 has torch but not the rest, `.venv` uses that torch.
The project itself is not installed: its commands run from the checkout. Only the path goes to standard
output, so that a Makefile can take it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older python3 shall print a sentence, not a traceback)
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"make_env: {sys.executable} is Python {found}; 3.11 or newer is needed: make PYTHON=<one> ...")

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
# Marks .venv as made here: UNFINISHED at first, at last the key and whether the extra is installed too.
STAMP = VENV / "dsv4-stamp"
UNFINISHED = "unfinished"


def project_requirements() -> tuple[list[str], list[str]]:
    """The dependencies and the extra `test` of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["dependencies"], project["optional-dependencies"]["test"]


def split(requirement: str) -> tuple[str, tuple[int, ...]]:
    """The name and the lowest version of `name`, `name>=1.2` or `name==1.2`."""
    name, _, version = re.sub("==|>=", " ", requirement).partition(" ")
    return name, numbers(version)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without suffixes such as `rc1` or `+cpu`."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)


def is_here(requirement: str) -> bool:
    """Whether the running interpreter has the package in a version that will do."""
    name, lowest = split(requirement)
    try:
        return numbers(importlib.metadata.version(name)) >= lowest
    except importlib.metadata.PackageNotFoundError:
        return False


def environment_key(requirements: list[str], borrowed: bool) -> str:
    """Changes whenever an existing .venv no longer is the one that would be made now."""
    facts = (CONSTRAINTS.read_bytes(), requirements, sys.version, sys.base_prefix, borrowed)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def run(command: list[str | Path], failure: str) -> None:
    """Run a command without input, its output on standard error; fail with this sentence if it fails."""
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode:
        fail(failure)


def fail(sentence: str) -> NoReturn:
    sys.exit(f"make_env: {sentence}")


def create_venv(borrowed: bool) -> None:
    """An empty .venv in the place of an older one of ours."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail(f"{sys.executable} has no venv or ensurepip module; Debian and Ubuntu: apt install python3-venv")
    if Path(sys.prefix) == VENV:
        fail(f"{VENV} is out of date and active; deactivate it and call again")
    if VENV.exists():
        shutil.rmtree(VENV)
    VENV.mkdir()
    STAMP.write_text(UNFINISHED, encoding="utf-8")
    site = ["--system-site-packages"] if borrowed else []
    run([sys.executable, "-m", "venv", *site, VENV], f"{sys.executable} could not make {VENV}")


def install(requirements: list[str], borrowed: bool) -> None:
    """Install into .venv; what a borrowed interpreter already has is neither installed nor constrained."""
    pins = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
    if borrowed:
        pins = [pin for pin in pins if not is_here(split(pin)[0])]
        requirements = [requirement for requirement in requirements if not is_here(requirement)]
    pin_file = VENV / "constraints.txt"
    pin_file.write_text("\n".join(pins), encoding="utf-8")
    pip = [VENV_PYTHON, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    run([*pip, "-c", pin_file, *requirements], f"pip could not install into {VENV}; its reason is above")


def provide_venv(base: list[str], extra: list[str], with_extra: bool, lacking: list[str]) -> Path:
    """The interpreter of .venv, made or completed if need be; a failure leaves nothing half-made behind."""
    if VENV.exists() and not STAMP.exists():
        fail(f"{VENV} was not made by this script; activate it if it is complete, or move it away")
    borrowed = sys.prefix == sys.base_prefix and all(split(item)[0] != "torch" for item in lacking)
    key = environment_key(base + extra, borrowed)
    has_base, has_all = f"{key} base", f"{key} all"
    state = STAMP.read_text(encoding="utf-8") if VENV_PYTHON.exists() else ""
    if state == has_all or (state == has_base and not with_extra):
        return VENV_PYTHON
    wanted = base + extra if with_extra else base
    print(f"make_env: {sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
    print(f"make_env: installing into {VENV}, once: {', '.join(wanted)}", file=sys.stderr)
    try:
        if state != has_base:
            create_venv(borrowed)
        install(wanted, borrowed)
        STAMP.write_text(has_all if with_extra else has_base, encoding="utf-8")
    except BaseException:
        if STAMP.exists() and STAMP.read_text(encoding="utf-8") == UNFINISHED:
            shutil.rmtree(VENV)
        raise
    return VENV_PYTHON


def main(names: list[str]) -> None:
    base, extra = project_requirements()
    known = [split(requirement)[0] for requirement in extra]
    for name in names:
        if name not in known:
            fail(f"unknown package {name}; pyproject.toml's extra `test` has {', '.join(known)}")
    needed = base + [requirement for requirement in extra if split(requirement)[0] in names]
    lacking = [requirement for requirement in needed if not is_here(requirement)]
    if not lacking:
        print(sys.executable)
        return
    with CONSTRAINTS.open("r+b") as lock:  # two commands at once must not make .venv twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(provide_venv(base, extra, bool(names), lacking))


if __name__ == "__main__":
    main(sys.argv[1:])
