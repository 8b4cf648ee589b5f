"""When the record of a GPU session holds for the present sources."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_record
import pytest
from gpu_record import RECORD, read_record, room_files, room_key, stale_rooms, write_record

FACTS = {"gpu": "NVIDIA H200", "driver": "580.95", "torch": "2.11", "commit": "abc", "date": "2026-11-24"}
FILES = {
    "csrc/bindings.cpp": "// OP(add) OP(scale)",
    "csrc/launchers.h": "",
    "csrc/common/device.cuh": '#include "launchers.h"\n#include <cuda.h>\n',
    "csrc/common/order.cuh": "",
    "csrc/add/add.cu": '#include "common/device.cuh"\n',
    "csrc/scale/scale.cu": '#include "common/device.cuh"\n#include "scale/parts.cuh"\n',
    "csrc/scale/parts.cuh": "",
    "dsv4/__init__.py": "from dsv4.engine import Engine\n",
    "dsv4/_C.py": "from dsv4 import build\n",
    "dsv4/build.py": 'WORDS = 1\nNVCC_FLAGS = ("-O3",)\n',
    "dsv4/engine.py": "import dsv4.ops.add\n",
    "dsv4/ops/checks.py": "",
    "dsv4/ops/formats.py": "",
    "dsv4/ops/add/__init__.py": "from dsv4 import _C\nfrom dsv4.ops.add import reference\n",
    "dsv4/ops/add/reference.py": "import torch\n",
    "dsv4/ops/scale/__init__.py": "from dsv4.ops import checks\nfrom dsv4.ops.scale import reference\n",
    "dsv4/ops/scale/reference.py": "from dsv4.ops.add.reference import add\n",
    "tests/numeric.py": "",
    "tests/shapes.py": "",
    "tests/gpu/conftest.py": "",
    "tests/gpu/test_add.py": "from numeric import close\nfrom dsv4.ops.add import add\n",
    "tests/gpu/test_scale.py": "import shapes\nfrom dsv4.ops.scale import scale\n",
    "tests/gpu/test_scale_edges.py": "import dsv4.ops.formats\n",
    "tests/gpu/test_model.py": "import dsv4\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small project of the rooms add, scale and model."""
    for name, text in FILES.items():
        change(tmp_path / name, text)
    return tmp_path


def change(path: Path, text: str = "# changed\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def entry(room: str, root: Path, **tests: str) -> dict[str, Any]:
    return {"key": room_key(room, root), "tests": tests or {"test_one": "7 passed"}} | FACTS


def record_all(root: Path) -> None:
    write_record(root, FACTS, {room: entry(room, root) for room in ("add", "scale", "model")})


def test_what_a_room_depends_on(root: Path) -> None:
    """What tests, doors and kernels lead to; not the tables of all operations."""

    def files(room: str) -> set[str]:
        return {path.relative_to(root).as_posix() for path in room_files(room, root)}

    assert files("add") == {
        *("tests/gpu/test_add.py", "tests/numeric.py", "csrc/add/add.cu", "csrc/common/device.cuh"),
        *("dsv4/ops/add/__init__.py", "dsv4/ops/add/reference.py"),
    }
    assert files("scale") == {
        *("tests/gpu/test_scale.py", "tests/gpu/test_scale_edges.py", "tests/shapes.py"),
        *("csrc/scale/scale.cu", "csrc/scale/parts.cuh", "csrc/common/device.cuh"),
        *("dsv4/ops/scale/__init__.py", "dsv4/ops/scale/reference.py", "dsv4/ops/add/reference.py"),
        *("dsv4/ops/checks.py", "dsv4/ops/formats.py"),
    }
    assert files("model") == {"tests/gpu/test_model.py", *(name for name in FILES if "tests/" not in name)}


@pytest.mark.parametrize(
    ("name", "stale"),
    [
        ("csrc/add/add.cu", "add model"),
        ("csrc/scale/parts.cuh", "model scale"),
        ("csrc/common/device.cuh", "add model scale"),
        ("csrc/common/order.cuh", "model"),
        ("csrc/bindings.cpp", "model"),
        ("dsv4/ops/add/reference.py", "add model scale"),
        ("dsv4/engine.py", "model"),
        ("dsv4/build.py", "model"),
        ("tests/shapes.py", "scale"),
        ("tests/gpu/test_scale_edges.py", "scale"),
        ("tests/gpu/conftest.py", ""),
        ("csrc/add/notes.txt", "add model"),
    ],
)
def test_a_change_makes_rooms_stale(name: str, stale: str, root: Path) -> None:
    record_all(root)
    assert stale_rooms(root) == {}
    change(root / name)
    found = stale_rooms(root)
    assert " ".join(found) == stale
    assert set(found.values()) <= {"changed since it ran on NVIDIA H200, 2026-11-24, commit abc"}


def test_compiler_flags_are_in_every_key(root: Path) -> None:
    record_all(root)
    (root / "dsv4/build.py").write_text('NVCC_FLAGS = ("-O2",)\n', encoding="utf-8")
    assert " ".join(stale_rooms(root)) == "add model scale"


def test_a_key_does_not_tell_where_the_tree_lies(root: Path) -> None:
    elsewhere = root / "elsewhere"
    for name, text in FILES.items():
        change(elsewhere / name, text)
    for room in ("add", "scale", "model"):
        assert room_key(room, root) == room_key(room, elsewhere)


def test_rooms_that_failed_skipped_or_never_ran(root: Path) -> None:
    change(root / "csrc/lonely/kernel.cu")
    change(root / "tests/gpu/test_new.py")
    bad = {"test_a": "1 failed, 6 passed", "test_b": "3 passed", "test_c": "2 skipped"}
    write_record(root, FACTS, {"add": entry("add", root), "scale": entry("scale", root, **bad)})
    assert stale_rooms(root) == {
        "lonely": "csrc/lonely has no tests/gpu/test_lonely.py",
        "model": "never ran on a GPU",
        "new": "never ran on a GPU",
        "scale": "on NVIDIA H200, 2026-11-24: test_a 1 failed, 6 passed; test_c 2 skipped",
    }


def test_writing_replaces_only_what_ran(root: Path) -> None:
    record_all(root)
    later = FACTS | {"date": "2026-11-25"}
    (root / "tests/gpu/test_add.py").unlink()
    (root / "csrc/add/add.cu").unlink()
    write_record(root, later, {"scale": entry("scale", root, test_two="1 passed")})
    record = read_record(root)
    assert {name: record[name] for name in FACTS} == later
    assert list(record["rooms"]) == ["model", "scale"]
    assert record["rooms"]["scale"]["tests"] == {"test_two": "1 passed"}
    assert [path.name for path in (root / "tests").glob("gpu_record*")] == [Path(RECORD).name]


def test_the_command_needs_no_torch(root: Path) -> None:
    """Isolated from site-packages; status 0 only if every room is fresh."""
    script = root / "tests" / "gpu_record.py"
    script.write_bytes(Path(gpu_record.__file__).read_bytes())

    def ask() -> tuple[int, list[str]]:
        done = subprocess.run([sys.executable, "-I", "-S", script], capture_output=True, text=True)
        assert not done.stderr
        return done.returncode, done.stdout.splitlines()

    assert ask() == (1, [f"{room}: never ran on a GPU" for room in ("add", "model", "scale")] + [holds(0)])
    record_all(root)
    assert ask() == (0, [holds(3)])


def holds(count: int) -> str:
    return f"GPU tests: the record holds for {count} of 3 rooms"
