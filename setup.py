"""All metadata is in pyproject.toml. Nothing is compiled: the package installs without any compiler."""

from setuptools import setup

setup()
