"""For tools that call this file; what there is to say is in pyproject.toml."""

from setuptools import setup

setup()
