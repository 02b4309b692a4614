"""Every op is complete: reference, kernels, fake, opcheck case, bad-input cases, benchmark, docs."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import instembed
from instembed import reference
from tests import cases
from tests.comparing import there

pytestmark = pytest.mark.usefixtures("each_device")

ROOT = Path(__file__).parent.parent
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("instembed::"))


# What lies in the values of tensors a GPU's ops tell without numbers, and some of them as NaN alone.
UNTOLD_ON_A_GPU = {"capacity", "offsets end", "offsets past the end", "too little room", "too many instances"}
NAN_ON_A_GPU = {
    "cosine_margin_loss": {"offsets end"},
    "recurrent_mean_shift": {"offsets end", "offsets fall"},
    "seed_mask_iou": {"seeds beyond", "seeds below"},
    "seediness_loss": {"seeds beyond", "seeds below", "classes 0", "classes beyond"},
}


def public_name(op: str) -> str:
    """The function that an op serves: instembed::f_backward serves instembed.f."""
    return op.removeprefix("instembed::").removesuffix("_backward")


def _first_case(op: str, device: str) -> tuple:
    with unset_fake_temporarily():
        return there(next(iter(cases.OPCHECK[op]))(), device)


def test_ops_were_found() -> None:
    assert "instembed::discriminative_terms" in OPS


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_public_function_and_a_reference(op: str) -> None:
    name = public_name(op)
    assert name in instembed.__all__ and callable(getattr(instembed, name))
    assert name in reference.__all__ and callable(getattr(reference, name))
    assert len(inspect.getdoc(getattr(instembed, name)) or "") > 100


@pytest.mark.parametrize("op", OPS)
def test_op_has_kernels(op: str, each_device: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, each_device.upper())
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:  # fails where no fake is registered
        arguments = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in _first_case(op, each_device)
        ]
        getattr(torch.ops.instembed, op.removeprefix("instembed::"))(*arguments)


@pytest.mark.parametrize("op", OPS)
def test_op_has_cases(op: str) -> None:
    assert cases.OPCHECK.get(op), f"tests/cases: OPCHECK has no arguments for {op}"
    assert cases.BAD_INPUT.get(public_name(op)), f"tests/cases: BAD_INPUT has none for {public_name(op)}"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_benchmark(op: str) -> None:
    entries = importlib.import_module("benchmarks").ENTRIES
    assert any(public_name(op) in entry.ops for entry in entries), f"benchmarks/: no entry times {op}"


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_docs_page(op: str) -> None:
    pages = [
        page for page in (ROOT / "docs").glob("*.md") if f"instembed.{public_name(op)}" in page.read_text()
    ]
    assert pages, f"docs/: no page tells of instembed.{public_name(op)}"


@pytest.mark.parametrize(
    ("op", "index"), [(op, index) for op in OPS for index in range(len(cases.OPCHECK.get(op, [])))]
)
def test_opcheck(op: str, index: int, each_device: str) -> None:
    pytest.importorskip("expecttest", reason="torch's opcheck imports it")
    arguments = there(cases.OPCHECK[op][index](), each_device)
    overload = getattr(torch.ops.instembed, op.removeprefix("instembed::")).default
    library.opcheck(overload, arguments)


@pytest.mark.parametrize(
    ("function", "case"),
    [(name, case) for name, listed in cases.BAD_INPUT.items() for case in listed],
    ids=lambda value: value if isinstance(value, str) else value.id,
)
def test_bad_input(function: str, case: cases.BadInput, each_device: str, overflow_checks: None) -> None:
    arguments, options = there((case.arguments, case.options), each_device)
    on_gpu = each_device != "cpu"
    if on_gpu and case.id in NAN_ON_A_GPU.get(function, ()):
        assert getattr(instembed, function)(*arguments, **options).isnan().all()
        return
    with pytest.raises(case.error, match=case.names) as raised:
        getattr(instembed, function)(*arguments, **options)
    assert type(raised.value) is case.error
    assert case.shows in str(raised.value) or (on_gpu and case.id in UNTOLD_ON_A_GPU)
