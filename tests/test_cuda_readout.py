"""The CUDA kernels of the read-out ops: see test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from instembed import reference
from tests.comparing import TOLERANCE, assert_close
from tests.layouts import LAYOUTS, labels_of_blocks

# ---------------------------------------------------------------------------------------------------------
# Instance pooling


def assert_same_pooling(
    features: Tensor, labels: Tensor, device: str, reduce: str, **options: object
) -> None:
    """Values, ids, counts and the gradient of a random sum of the values."""
    leaf = features.detach().to(device).requires_grad_()
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    ours = instembed.instance_pool(
        leaf, labels.to(device), reduce=reduce, max_instances=60, return_ids=True, **there
    )
    exact = features.detach().double().requires_grad_()
    expected = reference.instance_pool(exact, labels, reduce=reduce, max_instances=60, **options)
    for name in ("valid", "ids", "counts"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
    is_double = features.dtype == torch.float64
    assert ours.features.dtype == (torch.float64 if is_double else torch.float32)
    assert_close(ours.features.cpu(), expected.features.detach(), 1e-14 if is_double else 1e-6)
    weights = torch.randn_like(expected.features)
    ours.features.backward(weights.to(ours.features))
    expected.features.backward(weights)
    assert leaf.grad.dtype == features.dtype
    assert_close(leaf.grad.cpu(), exact.grad, TOLERANCE[features.dtype])


REDUCES = pytest.mark.parametrize("reduce", ["mean", "sum", "max"])


@REDUCES
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_types_and_layouts(device: str, dtype: torch.dtype, layout: str, reduce: str) -> None:
    features = LAYOUTS[layout](torch.randn(2, 8, 24, 28).to(dtype))
    assert_same_pooling(features, labels_of_blocks(2, *features.shape[2:]), device, reduce)


@REDUCES
@pytest.mark.parametrize("channels", [1, 3, 130])
@pytest.mark.parametrize("spatial", [(1,), (1025,), (17, 1), (3, 5, 7)], ids=str)
def test_pooling_sizes(device: str, channels: int, spatial: tuple[int, ...], reduce: str) -> None:
    features, labels = torch.randn(2, channels, *spatial), labels_of_blocks(2, *spatial)
    assert_same_pooling(features, labels, device, reduce, background=None, ignore_index=2)


@REDUCES
def test_pooling_of_points_with_offsets(device: str, reduce: str) -> None:
    features, labels = torch.randn(500, 6), torch.randint(0, 9, (500,)) * 2**40 - 2**62
    assert_same_pooling(features, labels, device, reduce)
    offsets = torch.tensor([0, 0, 10, 10, 300, 500])
    assert_same_pooling(features, labels, device, reduce, offsets=offsets)


@REDUCES
def test_pooling_of_nothing(device: str, reduce: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4)):
        labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        assert_same_pooling(torch.randn(shape), labels, device, reduce)


def test_pooling_of_equal_and_bad_features(device: str) -> None:
    features = torch.randint(0, 3, (2, 4, 9, 40)).float()
    labels = labels_of_blocks(2, 9, 40)
    assert_same_pooling(features, labels, device, "max")
    features[1, 2, 3, 4], features[0, 1, 5, 6] = float("nan"), float("inf")
    labels[1, 3, 4] = labels[0, 5, 6] = 3
    for reduce in ("mean", "max"):
        ours = instembed.instance_pool(features.to(device), labels.to(device), reduce=reduce, max_instances=9)
        expected = reference.instance_pool(features, labels, reduce=reduce, max_instances=9)
        assert ours.features.isnan().sum() == 1
        torch.testing.assert_close(ours.features.cpu(), expected.features, equal_nan=True)


@REDUCES
def test_pooling_of_too_many_instances(device: str, reduce: str) -> None:
    labels = torch.arange(1, 101).reshape(1, 10, 10).repeat(2, 1, 1)
    labels[1] = 5
    features = torch.randn(2, 3, 10, 10).to(device).requires_grad_()
    found = instembed.instance_pool(
        features, labels.to(device), reduce=reduce, max_instances=99, return_ids=True
    )
    assert found.features[0].isnan().all() and not found.valid[0].any() and not found.ids[0].any()
    assert found.valid[1].tolist() == [True] + 98 * [False] and found.counts[1, 0] == 100
    found.features.sum().backward()
    assert not features.grad[0].any() and features.grad[1].any()
    assert instembed.instance_pool(features, labels.to(device)).features.shape == (2, 64, 3)


def test_pooling_by_wrong_offsets(device: str) -> None:
    features, labels = torch.randn(100, 3).to(device).requires_grad_(), torch.ones(100, dtype=torch.int64)
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        features.grad = None
        offsets = torch.tensor(wrong, device=device)
        found = instembed.instance_pool(features, labels.to(device), offsets=offsets)
        assert found.features.isnan().all() and not found.valid.any()
        found.features.sum().backward()
        assert not features.grad.any()


def test_pooling_overflow_check(device: str, overflow_checks: None) -> None:
    features, labels = torch.randn(1, 2, 100).to(device), torch.arange(100)[None].to(device)
    with pytest.raises(ValueError, match="max_instances=9 "):
        instembed.instance_pool(features, labels, max_instances=9)
    with pytest.raises(ValueError, match="offsets"):
        instembed.instance_pool(features[0].t(), labels[0], offsets=torch.tensor([0, 101], device=device))


def test_pooling_twice_differentiable(device: str) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    labels = labels_of_blocks(2, 4, 5, size=2).to(device)
    for reduce in ("mean", "sum", "max"):
        torch.autograd.gradgradcheck(
            lambda x, reduce=reduce: instembed.instance_pool(x, labels, reduce=reduce).features, features
        )
