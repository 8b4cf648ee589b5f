"""What ran on which GPU, and whether that still holds for the present sources: `python -m tests.gpu_record`.

A GPU session (`make gpu-test`) writes tests/gpu_record.json, room by room, each with a key: the hash of every
file that its results depend on. This command names rooms that changed since, failed, skipped or never ran,
and then ends with status 1. It takes the standard library alone, so that a machine without torch can ask.
"""

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = "tests/gpu_record.json"
# tests/gpu/test_model.py runs whole models, so its results depend on everything.
WHOLE = "model"
# Not followed: they name every operation or lead to what does, and so change with every room.
HUBS = ("csrc/launchers.h", "csrc/bindings.cpp", "dsv4/_C.py", "dsv4/__init__.py")


def room_of(test_file: str) -> str:
    """tests/gpu/test_<room>.py, or test_<room>_<part>.py where a room's tests fill several files."""
    return Path(test_file).stem.removeprefix("test_").partition("_")[0]


def find_tests(root: Path) -> dict[str, list[Path]]:
    """Room -> its test files; none for a room of csrc/ that nobody tests."""
    rooms: dict[str, list[Path]] = {path.parent.name: [] for path in root.glob("csrc/*/*.cu")}
    for path in sorted(root.glob("tests/gpu/test_*.py")):
        rooms.setdefault(room_of(path.name), []).append(path)
    return dict(sorted(rooms.items()))


def room_files(room: str, root: Path) -> list[Path]:
    """The tests and kernels of a room, and whatever of this project they import and include."""
    queue = [*find_tests(root).get(room, []), *root.glob(f"csrc/{room}/*")]
    if room == WHOLE:
        queue += [*root.glob("dsv4/**/*.py"), *root.glob("csrc/**/*.*")]
    found: set[Path] = set()
    while queue:
        path = queue.pop()
        if path not in found and path.is_file():
            found.add(path)
            queue += (root / name for name in used_by(path, root) if name not in HUBS)
    return sorted(found)


def used_by(path: Path, root: Path) -> Iterator[str]:
    """Names, relative to the root, of files that ``path`` imports or includes; some may not be there."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from (f"csrc/{name}" for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE))
        return
    if path.match("dsv4/ops/*/__init__.py"):  # the doors of a room launch its kernels
        room = path.parent.name
        yield from (f"csrc/{room}/{kernel.name}" for kernel in root.glob(f"csrc/{room}/*"))
    modules = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for module in modules:
        name = module.replace(".", "/")
        # The tests' helpers are plain modules. What bench/ measures is no result of a room.
        yield from (f"{name}.py", f"{name}/__init__.py") if name.startswith("dsv4") else (f"tests/{name}.py",)


def room_key(room: str, root: Path) -> str:
    """Changes with every file that the room's results depend on, and with the compiler's flags."""
    digest = hashlib.sha256()
    for path in room_files(room, root):
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    builder = root / "dsv4" / "build.py"
    text = builder.read_text(encoding="utf-8") if builder.is_file() else ""
    digest.update(repr(re.findall(r"^NVCC_FLAGS = .*$", text, re.MULTILINE)).encode())
    return digest.hexdigest()[:16]


def read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rooms": {}}


def write_record(root: Path, facts: dict[str, Any], rooms: dict[str, dict[str, Any]]) -> None:
    """Replace the entries of ``rooms`` and keep those of other rooms that still exist; all or nothing."""
    kept = {name: entry for name, entry in read_record(root)["rooms"].items() if name in find_tests(root)}
    scratch = root / f"{RECORD}.part"
    record = facts | {"rooms": dict(sorted((kept | rooms).items()))}
    scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, root / RECORD)


def stale_rooms(root: Path) -> dict[str, str]:
    """Room -> why its record says nothing of the present sources; rooms that are fresh are left out."""
    record, stale = read_record(root)["rooms"], {}
    for room, files in find_tests(root).items():
        entry = record.get(room)
        if not files:
            stale[room] = f"csrc/{room} has no tests/gpu/test_{room}.py"
        elif entry is None:
            stale[room] = "never ran on a GPU"
        elif entry["key"] != room_key(room, root):
            stale[room] = f"changed since it ran on {entry['gpu']}, {entry['date']}, commit {entry['commit']}"
        elif bad := [f"{name} {words}" for name, words in entry["tests"].items() if has_bad(words)]:
            stale[room] = f"on {entry['gpu']}, {entry['date']}: {'; '.join(bad)}"
    return stale


def has_bad(outcomes: str) -> bool:
    """Of "7 passed" or "2 failed, 5 passed": whether there is anything but passed."""
    return re.fullmatch(r"\d+ passed", outcomes) is None


def main() -> int:
    stale, rooms = stale_rooms(ROOT), find_tests(ROOT)
    for room, reason in stale.items():
        print(f"{room}: {reason}")
    print(f"GPU tests: the record holds for {len(rooms) - len(stale)} of {len(rooms)} rooms")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
