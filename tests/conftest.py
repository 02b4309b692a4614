from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import library
from torch.overrides import TorchFunctionMode

import instembed
from instembed import _native, _ops
from instembed._native import _MissingCore, core


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulated-core",
        metavar="FILE",
        help="run the CUDA implementations of the ops on CPU tensors, with the core of `make simulator`",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--simulated-core")
    if path is None:
        return
    spec = importlib.util.spec_from_file_location("simulated_core", path)
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    _native.cuda_core = lambda: simulated
    overrides = library.Library("instembed", "IMPL")
    for name, function in _ops.cuda_kernels.items():
        overrides.impl(name, function, "CPU", allow_override=True)
    config.simulated_library = overrides  # as long as it lives


def pytest_report_header() -> str:
    state = "missing" if isinstance(core, _MissingCore) else core.__file__
    return f"instembed {instembed.__version__}, core {state}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class _MadeThere(TorchFunctionMode):
    """Tensors for which no device is named are made by the CPU and moved to one: random ones are the same
    everywhere."""

    NAMES = "arange empty eye full linspace ones rand randint randn randperm tensor zeros"
    MAKERS = frozenset(getattr(torch, name) for name in NAMES.split())

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = function in self.MAKERS and (kwargs or {}).get("device") is None
        return result.detach().to(self.device).requires_grad_(result.requires_grad) if made else result


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def each_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test that uses it runs on the CPU, and on a GPU where there is one."""
    if request.param == "cpu":
        yield "cpu"
        return
    if request.node.get_closest_marker("cpu_only") is not None:
        pytest.skip("is about the CPU")
    if request.config.getoption("--simulated-core") is not None or not instembed.cuda_available():
        pytest.skip("needs a GPU")
    with _MadeThere("cuda"):
        yield "cuda"


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the CUDA kernels run: on the simulated device, whose tensors are the CPU's, and on a GPU."""
    simulated = request.config.getoption("--simulated-core") is not None
    if request.param == "simulated":
        if not simulated:
            pytest.skip("needs --simulated-core (make simulator)")
        return "cpu"
    if simulated or not instembed.cuda_available():
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture
def overflow_checks():
    instembed.set_overflow_checks(True)
    yield
    instembed.set_overflow_checks(False)
