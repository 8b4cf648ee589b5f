"""Packaging entry point; everything declarative is in pyproject.toml.

It lists the packages. The CUDA sources of csrc/ will be built by dsv4.build, which this file will call.
"""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["dsv4", "dsv4.*"]))
