from __future__ import annotations

import pytest
import torch

import instembed
from instembed._native import _MissingCore, core


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
