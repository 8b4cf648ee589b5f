"""Packaging entry point; everything declarative is in pyproject.toml.

csrc/ is installed inside the package. With a GPU, nvcc 13 and torch at hand, so is the library for that GPU
(only `pip install --no-build-isolation .` sees torch); elsewhere the first use on a GPU builds it.
"""

import atexit
import functools
import shutil
import sys
import tempfile
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py


def load(file: str | Path) -> ModuleType:
    """A module of the package by its path, without the package around it."""
    spec = spec_from_file_location(Path(file).stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def architecture() -> str | None:
    """What to build for, or None and a line that says why nothing is built."""
    try:
        if find_spec("torch") is None:
            raise ValueError("found no torch; pip install --no-build-isolation . sees the installed one")
        device = load("dsv4/device.py")
        if not device.torch.cuda.is_available():
            raise ValueError("found no GPU")
        load("dsv4/build.py").find_nvcc()
        return device.cuda_arch()
    except ValueError as reason:
        postpone(reason)
        return None


def postpone(reason: ValueError) -> None:
    print(f"dsv4: the kernels will be built by their first use, not now: {reason}", file=sys.stderr)


class BuildWithKernels(build_py):
    """Copies the package and csrc/, and builds the library in the copy, where dsv4/build.py looks for it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout is used as it lies
            return
        package = Path(self.build_lib, "dsv4")
        for source in self.kernel_sources():
            self.mkpath(str((package / source).parent))
            self.copy_file(str(source), str(package / source))
        if architecture():
            build = load(package / "build.py")
            try:
                build.build(architecture(), build.BESIDE)
            except ValueError as reason:
                postpone(reason)
            for lock in build.BESIDE.glob("*.lock"):
                lock.unlink()

    def get_source_files(self) -> list[str]:
        """What a source distribution takes along."""
        return [*super().get_source_files(), *map(str, self.kernel_sources())]

    @staticmethod
    def kernel_sources() -> list[Path]:
        build = load("dsv4/build.py")
        return [path.relative_to(build.HOME) for path in build.sources()]


class DistributionWithKernels(Distribution):
    """A wheel with a library in it is for this kind of machine only."""

    def has_ext_modules(self) -> bool:
        return architecture() is not None


# Outside the tree: an old build/ would bring back sources that csrc/ no longer has.
scratch = tempfile.mkdtemp()
atexit.register(shutil.rmtree, scratch)

setup(
    packages=find_packages(include=["dsv4", "dsv4.*"]),
    cmdclass={"build_py": BuildWithKernels},
    distclass=DistributionWithKernels,
    options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}},
)
