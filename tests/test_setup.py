"""What setup.py puts into a package: csrc/, and with a GPU the library built for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_checkout import load_alone, make_checkout, read_calls, write

ROOT = Path(__file__).resolve().parent.parent
# In place of dsv4/device.py, which setup.py asks.
DEVICE = """
class torch:
    class cuda:
        is_available = staticmethod(lambda: {has_gpu})

def cuda_arch():
    return "90a"
"""

pytest.importorskip("setuptools", reason="packaging needs setuptools, which a venv of Python 3.12 lacks")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_checkout(tmp_path, monkeypatch)
    shutil.copy(ROOT / "setup.py", root)
    write(root / "pyproject.toml", '[project]\nname = "dsv4"\nversion = "1"\n')
    write(root / "dsv4" / "__init__.py", "")
    write(root / "dsv4" / "ops" / "__init__.py", "")
    return root


def set_up(checkout: Path, *command: str, has_gpu: bool = False) -> str:
    """Run a command of setup.py; what it says. The checkout stays as it is."""
    write(checkout / "dsv4" / "device.py", DEVICE.format(has_gpu=has_gpu))
    before = sorted(checkout.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-B", "setup.py", "-q", *command], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(checkout.rglob("*")) == before
    return done.stderr


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sources(checkout: Path) -> set[str]:
    return {f"csrc/{name}" for name in files(checkout / "csrc") if not name.endswith(".md")}


def test_without_a_gpu_the_package_has_the_sources(checkout: Path, tmp_path: Path) -> None:
    said = set_up(checkout, "build", "--build-lib", str(tmp_path / "lib"))
    assert said.count("dsv4: ") == 1 and "built by their first use, not now: found no GPU" in said
    package = tmp_path / "lib" / "dsv4"
    modules = {"__init__.py", "build.py", "device.py", "ops/__init__.py"}
    assert files(package) == modules | sources(checkout)
    assert read_calls(tmp_path) == []
    installed = load_alone(package / "build.py")
    assert installed.library_key("90a") == load_alone(checkout / "dsv4/build.py").library_key("90a")


def test_with_a_gpu_it_has_the_library_too(checkout: Path, tmp_path: Path) -> None:
    set_up(checkout, "build", "--build-lib", str(tmp_path / "lib"), has_gpu=True)
    package = tmp_path / "lib" / "dsv4"
    installed = load_alone(package / "build.py")
    library = package / ".build" / installed.library_key("90a") / "libdsv4.so"
    assert installed.find("90a") == library
    assert {name for name in files(package) if name.startswith(".build/")} == {
        f".build/{library.parent.name}/{name}" for name in ("libdsv4.so", "manifest.json", "ptxas.txt")
    }
    assert len(read_calls(tmp_path)) == 4


def test_a_build_that_fails_is_postponed(checkout: Path, tmp_path: Path) -> None:
    write(checkout / "csrc/room/broken.cu", "")
    said = set_up(checkout, "build", "--build-lib", str(tmp_path / "lib"), has_gpu=True)
    assert "not now: build: exit status 1" in said and "broken.cu(1): error" in said
    assert not any(name.startswith(".build") for name in files(tmp_path / "lib" / "dsv4"))


def test_a_source_distribution_has_the_sources(checkout: Path, tmp_path: Path) -> None:
    set_up(checkout, "sdist", "--formats", "tar", "--dist-dir", str(tmp_path / "dist"))
    shutil.unpack_archive(tmp_path / "dist" / "dsv4-1.tar", tmp_path / "unpacked")
    assert sources(checkout) <= files(tmp_path / "unpacked" / "dsv4-1")
