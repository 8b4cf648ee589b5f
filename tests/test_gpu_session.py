"""What a test session counts, leaves out and records of the GPU tests; GPU and tests are stand-ins."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_session
import pytest
import torch
from gpu_record import ROOT, read_record, room_key, stale_rooms
from gpu_session import GpuSession, is_large, keep_small, room_results, spread
from shapes import FLASH, TINY
from small_cases import CHOSEN

import bench.harness

FOLDER = "tests/gpu/"
NODES = tuple(
    f"{FOLDER}{name}"
    for name in ("test_scale.py::test_a[1]", "test_scale.py::test_a[7]", "test_scale_edges.py::test_b")
) + (f"{FOLDER}test_add.py::test_c",)


def item(path: Path, marks: str = "gpu", **params: object) -> Any:
    """Stands for a collected test."""
    found = SimpleNamespace(path=path, get_closest_marker={mark: mark for mark in marks.split()}.get)
    return SimpleNamespace(**vars(found), callspec=SimpleNamespace(params=params)) if params else found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the rooms add and scale, on a machine with a GPU."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for node in NODES:
        (tmp_path / node.partition("::")[0]).touch()
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.harness, "gpu_facts", lambda: {"gpu": "NVIDIA H200", "driver": "580.95"})
    made = {"torch": "2.11", "commit": "abc", "dirty": True, "date": "2026-11-24"}
    monkeypatch.setattr(bench.harness, "provenance", lambda: dict(made))
    return tmp_path


def run_session(
    root: Path,
    nodes: tuple[str, ...] = NODES,
    *,
    bad: dict[str, str] | None = None,
    arguments: tuple[str, ...] = (FOLDER,),
    exitstatus: int = 0,
) -> list[str]:
    """Drive the plugin as pytest does; every test passes but those of ``bad``. What is said at the end."""
    plugin = GpuSession(SimpleNamespace(getoption={"--small": False, "--gpu-record": True}.get))
    items = [item(root / node.partition("::")[0]) for node in nodes]
    plugin.pytest_collection_finish(SimpleNamespace(items=items, config=SimpleNamespace(args=arguments)))
    for node in nodes:
        for outcome in ("passed", (bad or {}).get(node, "passed"), "passed"):
            report = SimpleNamespace(nodeid=node, outcome=outcome, keywords={"gpu": 1}, duration=0.5)
            plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish(exitstatus)
    lines: list[str] = []
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    return lines


def test_a_whole_run_is_recorded(root: Path) -> None:
    assert run_session(root) == [
        "executed: 4 tests; compiled only: the kernels of 0 operations; needs a GPU: 0 tests"
    ]
    record = read_record(root)
    rooms = record.pop("rooms")
    facts = {"gpu": "NVIDIA H200", "date": "2026-11-24", "commit": "abc and changes"}
    assert record == facts | {"driver": "580.95", "torch": "2.11"}
    assert rooms["add"] == facts | {
        "key": room_key("add", root),
        "duration_s": 1.5,
        "tests": {"test_c": "1 passed"},
    }
    assert rooms["scale"]["tests"] == {"test_a": "2 passed", "test_b": "1 passed"}
    assert stale_rooms(root) == {}


def test_a_failure_is_recorded_and_a_later_run_of_the_room_replaces_it(root: Path) -> None:
    run_session(root, bad={NODES[0]: "failed", NODES[3]: "skipped"}, exitstatus=1)
    assert stale_rooms(root) == {
        "add": "on NVIDIA H200, 2026-11-24: test_c 1 skipped",
        "scale": "on NVIDIA H200, 2026-11-24: test_a 1 failed, 1 passed",
    }
    run_session(root, NODES[:3], arguments=(f"{FOLDER}test_scale.py", f"{FOLDER}test_scale_edges.py"))
    assert list(stale_rooms(root)) == ["add"]


def test_what_leaves_tests_out_is_not_recorded(root: Path) -> None:
    """Files of a room that were not given, single tests, a session that broke off."""
    said = "not recorded, because tests were left out: scale"
    one_file, one_test = f"{FOLDER}test_scale.py", f"{FOLDER}test_scale_edges.py::test_b"
    assert run_session(root, NODES[:2], arguments=(one_file,))[1:] == [said]
    assert run_session(root, NODES[:3], arguments=(one_file, one_test))[1:] == [said]
    assert read_record(root)["rooms"] == {}
    run_session(root, exitstatus=2)
    assert read_record(root)["rooms"] == {}
    plugin = GpuSession(SimpleNamespace(getoption={"--gpu-record": True}.get))
    plugin.pytest_deselected([item(root / NODES[3].partition("::")[0])])
    assert plugin.partial == {"add"}


def test_recording_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="--gpu-record: expected a CUDA device"):
        GpuSession(SimpleNamespace(getoption={"--gpu-record": True}.get))


def test_counts_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    registry = {name: SimpleNamespace(has_kernel=name != "c") for name in "abc"}
    monkeypatch.setattr(gpu_session, "REGISTRY", registry)
    plugin = GpuSession(SimpleNamespace(getoption={}.get))
    for node, outcome, mark in (("x", "passed", "unit"), ("y", "skipped", "unit"), ("z", "skipped", "gpu")):
        report = SimpleNamespace(nodeid=node, outcome=outcome, keywords={mark: 1}, duration=0.0)
        plugin.pytest_runtest_logreport(report)
    lines: list[str] = []
    plugin.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert lines == ["executed: 1 tests; compiled only: the kernels of 2 operations; needs a GPU: 1 tests"]


def test_results_are_counted_by_function() -> None:
    outcomes = {NODES[0]: "passed", NODES[1]: "failed", NODES[2]: "skipped", NODES[3]: "passed"}
    outcomes[f"{FOLDER}test_scale.py::test_a[tiny-1]"] = "passed"
    assert room_results(outcomes) == {
        "add": {"test_c": "1 passed"},
        "scale": {"test_a": "1 failed, 2 passed", "test_b": "1 skipped"},
    }


def test_small_cases() -> None:
    path = Path(FOLDER, "test_add.py")
    for kept in ({}, {"sizes": TINY}, {"tokens": 7}, {"sizes": TINY, "tokens": 0, "width": 20000}):
        assert not is_large(item(path, **kept))
    for large in ({"sizes": FLASH}, {"tokens": 8}, {"sizes": FLASH, "tokens": 1}, {"a": TINY, "tokens": 137}):
        assert is_large(item(path, **large))
    assert is_large(item(path, "gpu large", sizes=TINY)) and is_large(item(path, "gpu allocator"))


def test_small_cases_have_every_value_but_not_every_combination() -> None:
    """Values given together count as one; what has no parameters stays; each function is for itself."""

    def found(node: str, names: tuple[str, ...] = (), **params: int) -> Any:
        marks = [SimpleNamespace(args=(argument,)) for argument in names]
        spec = SimpleNamespace(params=params)
        return SimpleNamespace(nodeid=node, iter_markers=lambda name: marks, callspec=spec)

    widths = [
        found(f"f::a[{w}-{d}]", ("dtype", "width"), width=w, dtype=d) for w in range(5) for d in range(2)
    ]
    pairs = [found(f"f::b[{n}]", ("rows, columns",), rows=n % 2, columns=n // 2) for n in range(4)]
    plain = found("f::c")
    kept = spread([*widths, *pairs, plain])
    assert kept[5:] == [*pairs, plain]
    params = [item.callspec.params for item in kept[:5]]
    assert sorted(chosen["width"] for chosen in params) == [0, 1, 2, 3, 4]
    assert sorted(chosen["dtype"] for chosen in params) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_chosen_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file in the table what it names, large or not; of other files what the rule keeps."""
    monkeypatch.setitem(CHOSEN, "test_add.py", {"test_a": ("1-x", "2-y"), "test_b": ()})

    def found(name: str, file: str = "test_add.py", **params: object) -> Any:
        one = item(Path(FOLDER, file), **params)
        return SimpleNamespace(**vars(one), name=name, nodeid=name, iter_markers=lambda name: [])

    kept = [found("test_a[2-y]", tokens=4001), found("test_b[3]", sizes=FLASH), found("test_b")]
    other = [found("test_a", "test_sub.py")]
    left = [found("test_a[2-x]"), found("test_c"), found("test_b", "test_sub.py", tokens=8)]
    assert keep_small([*left, *kept, *other]) == [*kept, *other]


def test_every_chosen_case_exists() -> None:
    """By a session that collects and runs nothing."""
    files = [str(ROOT / FOLDER / file) for file in CHOSEN]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "--small", *files]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # with a GPU it would ask for a library
    said = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    nodes = {line.rpartition("/")[2].replace("TestSampleToken::", "") for line in said.stdout.split("\n")}
    for file, functions in CHOSEN.items():
        for function, cases in functions.items():
            name = f"{file}::{function}"
            missing = {f"{name}[{case}]" for case in cases} - nodes
            assert not missing and any(node.partition("[")[0] == name for node in nodes), (name, missing)


def test_a_small_session() -> None:
    """What is left out is reported to pytest; tests without a GPU are not left out."""

    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    def found(number: int, marks: str) -> Any:
        marker = {mark: mark for mark in marks.split()}.get
        return Item(
            nodeid=f"test_add.py::test_{number}",
            path=Path("test_add.py"),
            name=f"test_{number}",
            get_closest_marker=marker,
            iter_markers=lambda name: [],
        )

    reported: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: reported.extend(items))
    plugin = GpuSession(SimpleNamespace(getoption={"--small": True}.get))
    items = [found(0, "gpu large"), found(1, "gpu"), found(2, "large")]
    left = list(items)
    plugin.pytest_collection_modifyitems(SimpleNamespace(hook=hook), left)
    assert (left, reported) == (items[1:], items[:1])
