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


def _cuda_core() -> Any:
    """The core, for tensors on a GPU."""
    if not core.cuda:
        raise RuntimeError(
            f"instembed's native core was built without CUDA ({core.__file__}), so it takes no tensors on a "
            "GPU. Build it where nvcc is on the path: `pip install .` in the source tree finds it by itself, "
            "and --config-settings=cmake.define.INSTEMBED_CUDA=ON makes its absence an error"
        )
    return core


cuda_core = _cuda_core  # tests put another in its place


def cuda_available() -> bool:
    """Whether ops take tensors on a GPU: the core was built with CUDA, and it and torch see a device."""
    if isinstance(core, _MissingCore) or not core.cuda:
        return False
    return torch.cuda.is_available() and core.cuda_device_count() > 0


def stream_of(tensor: torch.Tensor) -> int:
    """The handle of torch's current stream on the tensor's device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


_overflow_checks = False


def set_overflow_checks(enabled: bool) -> None:
    """Makes ops on CUDA tensors raise when a result did not fit its capacity. Off by default.

    On the CPU such a result always raises. On a GPU finding out makes the host wait for the device, once a
    call, and rules out CUDA graphs. Without the check an overflow shows in the result: a loss is NaN, and so
    are pooled features, pixels are -2, and ``num_instances`` is greater than the capacity, of an image whose
    other rows are then zero (and -1 where the offsets of a grouping are none).
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {type(enabled).__name__}")
    global _overflow_checks
    _overflow_checks = enabled


def overflow_checks() -> bool:
    return _overflow_checks


def check_overflow(num_instances: torch.Tensor, capacity: int) -> None:
    """Raises where a (B,) count exceeds the capacity, or is negative for wrong offsets, if the user asked."""
    if not _overflow_checks or num_instances.numel() == 0:
        return
    if int(num_instances.min()) < 0:
        raise ValueError("offsets must rise from 0 to the number of points")
    if int(num_instances.max()) > capacity:
        raise ValueError(
            f"max_instances={capacity} is too small: an image has more instances. Pass a larger max_instances"
        )
