"""The CUDA kernels, on a GPU where there is one, and on the simulated device of `make simulator`.

`pytest -m cuda` takes the first and skips itself without a GPU. `--simulated-core FILE` takes the second:
the same kernels, compiled for the CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from instembed import LabelStatistics, _native, reference
from instembed._arguments import INTEGER


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    simulated = request.config.getoption("--simulated-core") is not None
    if request.param == "simulated":
        if not simulated:
            pytest.skip("needs --simulated-core (make simulator)")
        return "cpu"
    if simulated or not instembed.cuda_available():
        pytest.skip("needs a GPU")
    return "cuda"


def labels_of_blocks(*shape: int, ids: int = 6, size: int = 4) -> Tensor:
    coarse = torch.randint(0, ids, [(n + size - 1) // size for n in shape[1:]])
    for axis in range(coarse.dim()):
        coarse = coarse.repeat_interleave(size, axis)
    coarse = coarse[tuple(slice(n) for n in shape[1:])]
    return torch.where(torch.rand(shape) < 0.1, torch.randint(0, ids, shape), coarse)


# ---------------------------------------------------------------------------------------------------------
# Without a GPU


def test_core_with_kernels_works_without_a_gpu() -> None:
    """Static cudart: a core built with CUDA loads where there is no driver, and sees no device there."""
    if not _native.core.cuda:
        pytest.skip("the core was built without CUDA")
    assert _native.core.cuda_device_count() >= 0
    if not torch.cuda.is_available():
        assert not instembed.cuda_available()
    embeddings = torch.randn(1, 2, 8, 8, requires_grad=True)
    instembed.discriminative_loss(embeddings, torch.ones(1, 8, 8, dtype=torch.int64)).backward()
    assert embeddings.grad is not None


def test_core_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class CpuCore:
        cuda = False
        __file__ = "_core.so"

    monkeypatch.setattr(_native, "core", CpuCore())
    assert not instembed.cuda_available()
    with pytest.raises(RuntimeError, match=r"built without CUDA .*INSTEMBED_CUDA=ON"):
        _native._cuda_core()


def test_overflow_checks_want_a_bool() -> None:
    with pytest.raises(TypeError, match="enabled"):
        instembed.set_overflow_checks(1)


@pytest.fixture
def overflow_checks():
    instembed.set_overflow_checks(True)
    yield
    instembed.set_overflow_checks(False)


# ---------------------------------------------------------------------------------------------------------
# Label statistics


def assert_same_statistics(labels: Tensor, device: str, capacity: int = 40, **options: object) -> None:
    ours = instembed.label_statistics(labels.to(device), max_instances=capacity, **options)
    expected = reference.label_statistics(labels, max_instances=capacity, **options)
    for name, a, b in zip(LabelStatistics._fields, ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
def test_label_statistics_types(device: str, dtype: torch.dtype) -> None:
    assert_same_statistics(labels_of_blocks(2, 17, 29).to(dtype), device)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 3000), (2, 7, 1), (2, 1, 70), (2, 63, 65), (2, 3, 5, 7), (3, 0, 4), (0, 4, 5)],
    ids=str,
)
def test_label_statistics_shapes(device: str, shape: tuple[int, ...]) -> None:
    assert_same_statistics(labels_of_blocks(*shape), device)
    assert_same_statistics(labels_of_blocks(*shape, size=30), device, background=None, ignore_index=2)


def test_label_statistics_of_views_and_huge_ids(device: str) -> None:
    labels = torch.tensor([0, 7, 26005, 2**62 + 1, -1, -(2**63), 2**63 - 1])[
        labels_of_blocks(3, 30, 44, ids=7)
    ]
    for view in (labels, labels.transpose(1, 2), labels[:, ::2, 1::3], labels[:, :, :1].expand(-1, -1, 50)):
        assert_same_statistics(view, device)


def test_label_statistics_overflow(device: str) -> None:
    labels = torch.arange(200).reshape(1, 10, 20).expand(2, 10, 20).clone()
    labels[1] = 1
    found = instembed.label_statistics(labels.to(device), max_instances=150)
    assert found.num_instances.tolist() == [151, 1]
    assert not found.areas[0].any() and not found.ids[0].any() and found.areas[1, 0] == 200
    default = instembed.label_statistics(labels.to(device))
    assert default.ids.shape == (2, 64)


def test_label_statistics_overflow_check(device: str, overflow_checks: None) -> None:
    labels = torch.arange(200).reshape(1, 10, 20).to(device)
    with pytest.raises(ValueError, match="max_instances=150"):
        instembed.label_statistics(labels, max_instances=150)
