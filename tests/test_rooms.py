"""The layout of the project: rooms and their doors, import direction, dispatch, sizes."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dsv4.ops
from dsv4.ops import dispatch
from dsv4.ops.dispatch import REGISTRY, expand_rooms, op, use_reference

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [info.name for info in pkgutil.iter_modules(dsv4.ops.__path__) if info.ispkg]
for room in ROOMS:
    importlib.import_module(f"dsv4.ops.{room}")

PACKAGE = sorted((ROOT / "dsv4").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DRIVER = ROOT / "single_shot_inference.py"
PYTHON = [
    DRIVER,
    *PACKAGE,
    *TESTS,
    *sorted((ROOT / "tools").rglob("*.py")),
    *sorted((ROOT / "bench").rglob("*.py")),
]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, at whatever depth of its code."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_module(full) else node.module


def strangers(files: list[Path], allowed: str) -> list[str]:
    """Imports of this project, torch or other libraries that match no allowed pattern; stdlib is free."""
    found = []
    for path in files:
        for name in imports(path):
            if name.split(".")[0] not in sys.stdlib_module_names and not re.fullmatch(allowed, name):
                found.append(f"{path.relative_to(ROOT)}: {name}")
    return found


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}: {node.name}", node


def length(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_room_registers_operations() -> None:
    assert ROOMS and set(ROOMS) == {entry.room for entry in REGISTRY.values()} == set(dispatch.rooms())


@pytest.mark.parametrize("name", REGISTRY)
def test_an_operation_has_a_twin_and_a_docstring(name: str) -> None:
    """Same name and signature in door and reference; shapes in brackets wherever tensors come in."""
    entry = REGISTRY[name]
    room = importlib.import_module(f"dsv4.ops.{entry.room}")
    door = getattr(room, entry.name)
    assert entry.reference is getattr(importlib.import_module(f"{room.__name__}.reference"), entry.name)
    signature = inspect.signature(door)
    assert signature == inspect.signature(entry.reference)
    annotations = [signature.return_annotation, *(p.annotation for p in signature.parameters.values())]
    assert inspect.Signature.empty not in annotations
    text = inspect.getdoc(door) or ""
    assert re.search(r"Source:\s", text)
    assert Tensor not in annotations or re.search(r"\[[^]]*\]", text)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_operation_has_a_test_file(name: str) -> None:
    entry = REGISTRY[name]
    text = (ROOT / "tests" / "ops" / f"test_{entry.room}.py").read_text(encoding="utf-8")
    door = rf"\bdsv4\.ops\.{entry.room}\b|from dsv4\.ops import .*\b{entry.room}\b"
    assert re.search(rf"\b{entry.name}\b", text) or re.search(door, text)


def test_import_direction() -> None:
    """driver -> config, loading, model, engine -> layers -> ops; a reference knows other references only."""
    references = [path for path in PACKAGE if path.name == "reference.py"]
    assert len(references) == len(ROOMS)
    assert strangers(references, r"torch(\.[\w.]+)?|dsv4\.ops\.formats|dsv4\.ops\.\w+\.reference") == []
    ops = [path for path in PACKAGE if path.is_relative_to(ROOT / "dsv4" / "ops")]
    assert strangers(ops, r"(?!dsv4\b)[\w.]+|dsv4\.(ops(\.[\w.]+)?|_C|build|device)") == []
    layers = sorted((ROOT / "dsv4" / "layers").glob("*.py"))
    below = rf"torch(\.[\w.]+)?|dsv4\.(cache|config|numerics|ops\.formats|ops\.({'|'.join(ROOMS)}))"
    assert strangers(layers, rf"{below}|dsv4\.layers\.\w+") == []
    assert strangers([ROOT / "dsv4" / "model.py"], rf"{below}|dsv4\.layers\.\w+") == []
    assert (
        strangers([ROOT / "dsv4" / "cache.py"], r"torch|dsv4\.(config|numerics|ops\.formats|ops\.rows)") == []
    )
    core = [path for path in PACKAGE if path.is_relative_to(ROOT / "dsv4" / "loading")]
    assert [line for line in strangers(core, r"(?!dsv4\.(engine|plan)\b)[\w.]+")] == []


def test_forbidden_imports_are_found() -> None:
    """The check above sees every form of import."""
    file = ROOT / "tests" / "test_rooms.py"
    assert "dsv4.ops.dispatch" in imports(file) and "pathlib" in imports(file) and "dsv4.ops" in imports(file)
    assert strangers([file], r"dsv4\.ops\.dispatch|pytest|torch") == ["tests/test_rooms.py: dsv4.ops"]


def test_no_environment_variable_is_read() -> None:
    """But $CUDA_HOME by the build: it tells where a machine keeps its compiler, and changes no result."""
    for path in PACKAGE:
        text = path.read_text(encoding="utf-8")
        if path == ROOT / "dsv4" / "build.py":
            text = text.replace('os.environ.get("CUDA_HOME")', "None", 1)
        for node in ast.walk(ast.parse(text)):
            name = (
                node.attr
                if isinstance(node, ast.Attribute)
                else getattr(node, "id", getattr(node, "name", None))
            )
            assert name not in ("environ", "environb", "getenv", "getenvb"), f"{path} reads the environment"


def test_sizes() -> None:
    """In lines: file 400, test file 250, tests/oracle.py 300, driver 200; function 60, forward 40."""
    limits = {DRIVER: 200, ROOT / "tests" / "oracle.py": 300}
    too_long = []
    for path in PYTHON:
        limit = limits.get(path, 250 if path.name.startswith("test_") else 400)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        too_long += [f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"] * (lines > limit)
        for name, node in functions(path):
            forward = node.name == "forward" and path.is_relative_to(ROOT / "dsv4")
            limit = 40 if forward else 60
            too_long += [f"{name}: {length(node)} lines, at most {limit}"] * (length(node) > limit)
    assert not too_long, "\n".join(too_long)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """An operation of a room of its own that says which of its two sides ran."""
    monkeypatch.setattr(dispatch, "REGISTRY", dict(REGISTRY))

    def reference(x: Tensor) -> str:
        return "reference"

    def which(x: Tensor) -> str:
        return "kernel"

    which.__module__ = "dsv4.ops.probe"
    return op(reference, kernel=True)(which)


class OnCuda(Tensor):
    """A CPU tensor that calls itself one of CUDA."""

    is_cuda = True


def test_dispatch_by_device_and_room(probe: Callable[..., str]) -> None:
    """A CPU tensor gets the reference, a CUDA tensor the kernel unless its room was named."""
    cpu, cuda = torch.zeros(1), torch.zeros(1).as_subclass(OnCuda)
    entry = dispatch.REGISTRY["probe.which"]
    assert (entry.room, entry.name, entry.has_kernel) == ("probe", "which", True)
    assert (probe(cpu), probe(cuda), probe(x=cuda)) == ("reference", "kernel", "kernel")
    assert (entry.served_by("cpu"), entry.served_by("cuda")) == ("reference", "kernel")
    for rooms in (("probe",), ("all",), ("mhc", "probe")):
        with use_reference(*rooms):
            assert probe(cuda) == entry.served_by("cuda") == "reference"
    with use_reference("mhc"):
        assert probe(cuda) == entry.served_by("cuda") == "kernel"


class Parts(NamedTuple):
    """As a weight: tensors, one that may be absent, and what is no tensor."""

    kind: str
    data: Tensor | None
    scale: Tensor


def test_dispatch_looks_into_weights(probe: Callable[..., str]) -> None:
    """One level into tuples; a kernel refuses what wants a gradient there as well."""
    cpu, cuda = torch.zeros(1), torch.zeros(1).as_subclass(OnCuda)
    assert probe(Parts("a", None, cpu)) == probe((cpu, 1)) == "reference"
    assert probe(Parts("a", cuda, cpu)) == probe(x=Parts("a", None, cuda)) == "kernel"
    wants = torch.zeros(1, requires_grad=True).as_subclass(OnCuda)
    for arg in (wants, Parts("a", None, wants)):
        with pytest.raises(AssertionError, match="kernels have no gradients"):
            probe(arg)
        with torch.no_grad():
            assert probe(arg) == "kernel"
        with use_reference("probe"):
            assert probe(arg) == "reference"


def test_use_reference_nests_and_restores(probe: Callable[..., str]) -> None:
    """Inner blocks add to outer ones; each leaves what was there before, also by an exception."""
    cuda = torch.zeros(1).as_subclass(OnCuda)
    with use_reference("mhc"):
        with use_reference("probe"), use_reference():
            assert probe(cuda) == "reference"
        assert probe(cuda) == "kernel"
    with use_reference("probe"):
        with pytest.raises(RuntimeError), use_reference("mhc"):
            assert probe(cuda) == "reference"
            raise RuntimeError
        assert probe(cuda) == "reference"
    assert probe(cuda) == "kernel"


def test_room_names() -> None:
    assert expand_rooms(["all"]) == set(ROOMS)
    assert expand_rooms(["moe", "mhc", "moe"]) == {"moe", "mhc"}
    assert expand_rooms([]) == frozenset()
    for call in (expand_rooms, lambda names: use_reference(*names).__enter__()):
        with pytest.raises(ValueError, match=r"no room 'attn'; the rooms are attention, .*, all"):
            call(["mhc", "attn"])
