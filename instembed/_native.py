"""Finds the native core, or explains what to do about its absence."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

# torch first: its wheel carries the OpenMP runtime that the core then shares.
import torch


def _installed_core() -> ModuleType | None:
    """The core of the installed distribution, for a source tree that shadows it on the path."""
    try:
        files = importlib.metadata.files("instembed") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    names = {"_core" + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    for file in files:
        if file.parent.name == "instembed" and file.name in names:
            path = str(file.locate())
            spec = importlib.util.spec_from_file_location("instembed._core", path)
            if spec is None or spec.loader is None:
                return None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules["instembed._core"] = module
            return module
    return None


class _MissingCore:
    """Stands in for the core so that the package imports unbuilt; the reference functions work without it."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> object:
        raise ImportError(
            f"instembed's native core is not available ({self._reason}). Build it with `pip install .` in "
            "the source tree (it needs a C++17 compiler); instembed.reference works without it."
        )


def _load() -> ModuleType | _MissingCore:
    try:
        return importlib.import_module("instembed._core")
    except ModuleNotFoundError as error:
        core = _installed_core()
        return core if core is not None else _MissingCore(str(error))
    except ImportError as error:  # built for another Python or machine
        return _MissingCore(str(error))


core: Any = _load()


def threads() -> int:
    """The number of threads for a kernel: what torch was told."""
    return torch.get_num_threads()
