"""The key of a library, where it is looked for, and how it is built, without the CUDA compiler."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from fake_checkout import load_alone, make_checkout, read_calls, write

import dsv4.build


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return make_checkout(tmp_path, monkeypatch)


@pytest.fixture
def build(checkout: Path) -> ModuleType:
    return load_alone(checkout / "dsv4" / "build.py")


def test_key_follows_sources_flags_and_architecture(build: ModuleType, checkout: Path) -> None:
    keys = [build.library_key("90a"), build.library_key("100a")]
    write(checkout / "csrc/common/device.cuh", "// another\n")
    keys.append(build.library_key("90a"))
    (checkout / "csrc/room/two.cu").rename(checkout / "csrc/room/three.cu")
    keys.append(build.library_key("90a"))
    write(checkout / "csrc/new/four.cu", "")
    keys.append(build.library_key("90a"))
    for name in ("NVCC_FLAGS", "CXX_FLAGS", "LINK_FLAGS"):
        setattr(build, name, (*getattr(build, name), "-g"))
        keys.append(build.library_key("90a"))
    assert len(set(keys)) == len(keys)


def test_key_follows_nothing_else(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    """Not where the checkout or the package lies, nor files that are no sources."""
    key = build.library_key("90a")
    write(checkout / "csrc/notes.md", "changed\n")
    shutil.copytree(checkout, tmp_path / "elsewhere")
    shutil.copytree(checkout / "csrc", tmp_path / "package/dsv4/csrc")
    shutil.copy(dsv4.build.__file__, tmp_path / "package/dsv4")
    for place in ("elsewhere", "package"):
        assert load_alone(tmp_path / place / "dsv4/build.py").library_key("90a") == key


def test_unknown_architecture(build: ModuleType) -> None:
    for call in (build.library_key, build.find, build.find_or_build):
        with pytest.raises(ValueError, match="expected one of 90a, 100a, 103a, 120a, found '80'"):
            call("80")


def test_build_makes_library_manifest_and_report(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    library = build.build("90a", checkout / ".build")
    folder = checkout / ".build" / build.library_key("90a")
    assert library == folder / "libdsv4.so"
    assert sorted(path.name for path in folder.iterdir()) == ["libdsv4.so", "manifest.json", "ptxas.txt"]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["arch"], manifest["nvcc"]) == ("90a", "Cuda compilation tools, release 13.0, V13.0.88")
    assert "room/two.cu\nptxas info : " in (folder / "ptxas.txt").read_text(encoding="utf-8")
    *compiled, linked = read_calls(tmp_path)
    targets = [call for call in compiled if "code=sm_90a -DDSV4_ARCH=90 " in call]
    assert (len(compiled), len(targets)) == (3, 2)
    assert linked.startswith("g++ ") and linked.count(".o ") == 3 and "-lcudart_static" in linked
    assert folder.stat().st_mode & 0o777 == 0o777 & ~current_umask()
    assert build.build("90a", checkout / ".build") == library and len(read_calls(tmp_path)) == 4


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_where_a_library_is_looked_for_and_built(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    cache, beside = tmp_path / "home/.cache/dsv4", checkout / ".build"
    key = build.library_key("90a")
    assert build.find("90a") is None
    assert build.find_or_build("90a") == build.find("90a") == cache / key / "libdsv4.so"
    beside.mkdir()
    assert build.find_or_build("90a") == cache / key / "libdsv4.so"
    assert build.find_or_build("100a") == beside / build.library_key("100a") / "libdsv4.so"
    build.build("90a", beside)
    assert build.find("90a") == beside / key / "libdsv4.so"
    write(checkout / "csrc/room/one.cu", "// changed\n")
    assert build.find("90a") is None


def test_an_installed_package_brings_its_sources(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    package = tmp_path / "site-packages/dsv4"
    shutil.copytree(checkout / "csrc", package / "csrc")
    shutil.copy(dsv4.build.__file__, package)
    installed = load_alone(package / "build.py")
    assert (installed.CSRC, installed.BESIDE) == (package / "csrc", package / ".build")
    assert (build.CSRC, build.BESIDE) == (checkout / "csrc", checkout / ".build")


def test_two_processes_build_once(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    """The second waits for the first and takes what that one made."""
    write(tmp_path / "bin/g++", (tmp_path / "bin/g++").read_text(encoding="utf-8") + "sleep 0.3\n")
    command = [sys.executable, checkout / "dsv4/build.py", "--arch", "90a"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [f"sm_90a: {build.find('90a')}\n"] * 2
    assert len(read_calls(tmp_path)) == 4


def test_threads_build_once(build: ModuleType, checkout: Path, tmp_path: Path) -> None:
    threads = [threading.Thread(target=build.build, args=("90a", checkout / ".build")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(read_calls(tmp_path)) == 4


def test_failure_leaves_nothing_half_made(build: ModuleType, checkout: Path) -> None:
    """The compiler's words come through, and after a repair the build goes on as if nothing had been."""
    broken = write(checkout / "csrc/room/broken.cu", "")
    with pytest.raises(ValueError, match=r"exit status 1 from .*nvcc .*\nbroken.cu\(1\): error"):
        build.build("90a", checkout / ".build")
    lock = f"{build.library_key('90a')}.lock"
    assert [path.name for path in (checkout / ".build").iterdir()] == [lock]
    broken.unlink()
    assert build.build("90a", checkout / ".build").is_file()


@pytest.mark.parametrize("version", [None, 12090, 14000])
def test_missing_compiler(
    version: int | None, build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No toolkit at all, or none of CUDA 13."""
    monkeypatch.setattr(build, "toolkits", lambda: [tmp_path / "toolkit"])
    header = tmp_path / "toolkit/include/cuda_runtime_api.h"
    header.unlink()
    if version is not None:
        write(header, f"#define CUDART_VERSION {version}\n")
    with pytest.raises(ValueError, match=r"nvcc 13, found none .*pip install 'dsv4\[build\]'"):
        build.find_or_build("90a")


def test_missing_host_compiler_and_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("shutil.which", r"found no g\+\+ on PATH"), ("find_spec", "torch >= 2.11")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
            owner, _, attribute = name.rpartition(".")
            patch.setattr(getattr(build, owner) if owner else build, attribute, lambda name: None)
            build.find_or_build("90a")


def test_toolkits_in_order(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "bin/nvcc", "").chmod(0o755)
    write(tmp_path / "site/nvidia/cu13/bin/nvcc", "")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    homes = build.toolkits()
    assert homes[:3] == [tmp_path / "toolkit", tmp_path, Path("/usr/local/cuda")]
    assert tmp_path / "site/nvidia/cu13" in homes[3:]
    assert build.find_nvcc() == tmp_path / "toolkit/bin/nvcc"
