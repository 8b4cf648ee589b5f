"""A small checkout with stand-ins of nvcc and g++, for tests of the build and of packaging."""

import os
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import dsv4.build

TOOL = """#!/bin/sh
# Stands for nvcc and g++: notes its call, answers as ptxas does, and writes what follows -o.
name=$(basename "$0")
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
echo "$name" "$@" >> "{log}"
while [ $# -gt 1 ]; do
  [ "$1" = -c ] && input=$2
  [ "$1" = -o ] && output=$2
  shift
done
case "$input" in *broken.cu) echo "broken.cu(1): error"; exit 1;; esac
echo "ptxas info : $input"
echo "made of $input" > "$output"
"""


def load_alone(file: Path) -> ModuleType:
    """build.py by its path, as setup.py takes it: its checkout or package is the folder it lies in."""
    spec = spec_from_file_location("build_alone", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """csrc/ and dsv4/build.py, with an empty home and a toolkit whose calls are noted in ``tmp_path``/log."""
    root = tmp_path / "checkout"
    for name in ("bindings.cpp", "launchers.h", "common/device.cuh", "room/one.cu", "room/two.cu"):
        write(root / "csrc" / name, f"// {name}\n")
    write(root / "csrc" / "notes.md", "not a source\n")
    (root / "dsv4").mkdir()
    shutil.copy(dsv4.build.__file__, root / "dsv4")
    for name in ("toolkit/bin/nvcc", "bin/g++"):
        write(tmp_path / name, TOOL.format(log=tmp_path / "log")).chmod(0o755)
    write(tmp_path / "toolkit/include/cuda_runtime_api.h", "#define CUDART_VERSION  13000\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return root


def read_calls(tmp_path: Path) -> list[str]:
    """The calls of nvcc and g++ so far."""
    log = tmp_path / "log"
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []
