"""What a test session does about GPUs: three counts at its end, `--small`, and the record of `--gpu-record`.

`--small` keeps the tests of tests/gpu that compute-sanitizer can run in minutes: of some rooms those that
small_cases.py names, of the others sizes of the tiny model, at most 7 tokens, nothing marked `large` or
`allocator`; and of each test function every value of every parameter, but not every combination.
`--gpu-record` writes tests/gpu_record.json (see gpu_record.py).
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from gpu_record import ROOT, find_tests, room_key, room_of, write_record
from shapes import TINY, Sizes
from small_cases import is_chosen

import dsv4.ops
from dsv4.ops.dispatch import REGISTRY

SMALL_TOKENS = 7
WORST_LAST = ("passed", "skipped", "failed")


def is_large(item: pytest.Item) -> bool:
    """Whether `--small` leaves a test out."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    tokens = params.get("tokens")
    return (
        any(item.get_closest_marker(mark) for mark in ("large", "allocator"))
        or any(isinstance(value, Sizes) and value != TINY for value in params.values())
        or (isinstance(tokens, int) and tokens > SMALL_TOKENS)
    )


def values_of(item: pytest.Item) -> list[tuple[str, str]]:
    """A test's parameters, by names and values; what one ``parametrize`` gives together stays together."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.append((",".join(names), repr([item.callspec.params[name.strip()] for name in names])))
    return found


def spread(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Of each test function as few as have every value of every parameter, each as often as the others."""
    functions: dict[str, list[tuple[pytest.Item, list[tuple[str, str]]]]] = {}
    for item in items:
        functions.setdefault(item.nodeid.partition("[")[0], []).append((item, values_of(item)))
    kept = []
    for left in functions.values():
        used: Counter[tuple[str, str]] = Counter()

        def worth(values: list[tuple[str, str]], used: Counter[tuple[str, str]] = used) -> tuple[int, int]:
            uses = [used[value] for value in values]
            return uses.count(0), -sum(uses)

        while left:
            best = max(left, key=lambda pair: worth(pair[1]))
            if best[1] and not worth(best[1])[0]:
                break
            left.remove(best)
            kept.append(best[0])
            used.update(best[1])
    return kept


def keep_small(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """What `--small` keeps of the GPU tests."""
    kept, others = [], []
    for item in items:
        chosen = is_chosen(item.path.name, item.name)
        if chosen:
            kept.append(item)
        elif chosen is None and not is_large(item):
            others.append(item)
    return kept + spread(others)


def room_results(outcomes: dict[str, str]) -> dict[str, dict[str, str]]:
    """Test (by its node id) -> outcome, as room -> test function -> "2 failed, 5 passed"."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for node, outcome in outcomes.items():
        file, _, name = node.partition("::")
        functions = counts.setdefault(room_of(file), {})
        functions.setdefault(name.partition("[")[0], Counter())[outcome] += 1
    return {
        room: {
            name: ", ".join(f"{count} {outcome}" for outcome, count in sorted(counter.items()))
            for name, counter in functions.items()
        }
        for room, functions in counts.items()
    }


class GpuSession:
    """The plugin; tests/conftest.py registers it and its options."""

    def __init__(self, config: pytest.Config) -> None:
        self.small: bool = config.getoption("--small")
        self.record: bool = config.getoption("--gpu-record")
        self.outcomes: dict[str, str] = {}  # of every test, by its node id
        self.gpu_tests: set[str] = set()  # those that need a GPU
        self.seconds: Counter[str] = Counter()  # by room
        self.keys: dict[str, str] = {}  # of the rooms that this session tests
        self.partial: set[str] = set()  # those of which it leaves tests out
        if self.record and not torch.cuda.is_available():
            raise pytest.UsageError("--gpu-record: expected a CUDA device to test, found none")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.small:
            on_gpu = [item for item in items if item.get_closest_marker("gpu")]
            left_out = set(on_gpu).difference(keep_small(on_gpu))
            config.hook.pytest_deselected(items=[item for item in items if item in left_out])
            items[:] = [item for item in items if item not in left_out]

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.partial.update(room_of(item.path.name) for item in items if item.get_closest_marker("gpu"))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The sources as they are before the tests run."""
        if not self.record:
            return
        files = {item.path for item in session.items if item.get_closest_marker("gpu")}
        self.keys = {room: room_key(room, ROOT) for room in {room_of(path.name) for path in files}}
        some_tests = any("::" in argument for argument in session.config.args)
        for room in self.keys:
            if some_tests or not files.issuperset(find_tests(ROOT)[room]):
                self.partial.add(room)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down, the worst outcome is the test's."""
        before = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(before, report.outcome, key=WORST_LAST.index)
        if "gpu" in report.keywords:
            self.gpu_tests.add(report.nodeid)
            self.seconds[room_of(report.nodeid.partition("::")[0])] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the rooms that ran from beginning to end, failures included."""
        if not self.record or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        from bench.harness import gpu_facts, provenance  # only here: tests need no benchmark

        facts = gpu_facts() | provenance()
        if facts.pop("dirty"):
            facts["commit"] += " and changes"
        run = {name: facts[name] for name in ("gpu", "date", "commit")}
        rooms = {
            room: {"key": self.keys[room], **run, "duration_s": round(self.seconds[room], 1), "tests": tests}
            for room, tests in room_results({node: self.outcomes[node] for node in self.gpu_tests}).items()
            if room not in self.partial
        }
        write_record(ROOT, facts, rooms)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        skipped = {node for node, outcome in self.outcomes.items() if outcome == "skipped"}
        here = torch.cuda.is_available()
        for info in pkgutil.iter_modules(dsv4.ops.__path__, "dsv4.ops."):
            importlib.import_module(info.name)
        kernels = 0 if here else sum(entry.has_kernel for entry in REGISTRY.values())
        waiting = 0 if here else len(skipped & self.gpu_tests)
        terminalreporter.write_line(
            f"executed: {len(self.outcomes) - len(skipped)} tests; compiled only: the kernels of {kernels} "
            f"operations; needs a GPU: {waiting} tests"
        )
        if self.record and self.partial:
            rooms = ", ".join(sorted(self.partial))
            terminalreporter.write_line(f"not recorded, because tests were left out: {rooms}")
