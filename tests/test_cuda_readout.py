"""The CUDA kernels of associative embedding and of the read-out: see test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from instembed import PosesWithDetails, reference
from tests import test_associative_embedding, test_gather_at, test_group_keypoints
from tests.comparing import TOLERANCE, assert_close, there
from tests.layouts import LAYOUTS, labels_of_blocks

# ---------------------------------------------------------------------------------------------------------
# Instance pooling


def assert_same_pooling(
    features: Tensor, labels: Tensor, device: str, reduce: str, **options: object
) -> None:
    """Values, ids, counts and the gradient of a random sum of the values."""
    leaf = there(features.detach(), device).requires_grad_()
    ours = instembed.instance_pool(
        leaf,
        there(labels, device),
        reduce=reduce,
        max_instances=60,
        return_ids=True,
        **there(options, device),
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
        ours = instembed.instance_pool(
            there(features, device), there(labels, device), reduce=reduce, max_instances=9
        )
        expected = reference.instance_pool(features, labels, reduce=reduce, max_instances=9)
        assert ours.features.isnan().sum() == 1
        torch.testing.assert_close(ours.features.cpu(), expected.features, equal_nan=True)


@REDUCES
def test_pooling_of_too_many_instances(device: str, reduce: str) -> None:
    labels = torch.arange(1, 101).reshape(1, 10, 10).repeat(2, 1, 1)
    labels[1] = 5
    features = torch.randn(2, 3, 10, 10).to(device).requires_grad_()
    found = instembed.instance_pool(
        features, there(labels, device), reduce=reduce, max_instances=99, return_ids=True
    )
    assert found.features[0].isnan().all() and not found.valid[0].any() and not found.ids[0].any()
    assert found.valid[1].tolist() == [True] + 98 * [False] and found.counts[1, 0] == 100
    found.features.sum().backward()
    assert not features.grad[0].any() and features.grad[1].any()
    assert instembed.instance_pool(features, there(labels, device)).features.shape == (2, 64, 3)


def test_pooling_by_wrong_offsets(device: str) -> None:
    features, labels = torch.randn(100, 3).to(device).requires_grad_(), torch.ones(100, dtype=torch.int64)
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        features.grad = None
        offsets = torch.tensor(wrong, device=device)
        found = instembed.instance_pool(features, there(labels, device), offsets=offsets)
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
    features = torch.randn(1, 2, 2, 3, dtype=torch.float64, device=device, requires_grad=True)
    labels = labels_of_blocks(1, 2, 3, size=2).to(device)
    for reduce in ("mean", "sum", "max"):
        torch.autograd.gradgradcheck(
            lambda x, reduce=reduce: instembed.instance_pool(x, labels, reduce=reduce).features, features
        )


# ---------------------------------------------------------------------------------------------------------
# Gathering at points, and location maps


MODES = pytest.mark.parametrize("mode", ["nearest", "bilinear"])


def assert_same_values(
    features: Tensor, points: Tensor, device: str, mode: str, valid: Tensor | None = None
) -> None:
    """Values and gradients of a random sum of them."""
    leaf = there(features.detach(), device).requires_grad_()
    places = there(points.detach(), device).requires_grad_(points.is_floating_point())
    ours = instembed.gather_at(leaf, places, valid=there(valid, device), mode=mode)
    exact = features.detach().double().requires_grad_()
    exact_places = points.detach().double().requires_grad_()
    expected = reference.gather_at(exact, exact_places, valid=valid, mode=mode)
    assert ours.dtype == features.dtype
    assert_close(ours.detach().cpu(), expected.detach(), TOLERANCE[features.dtype])
    weights = torch.randn_like(expected).to(features.dtype)
    ours.backward(weights.to(device))
    expected.backward(weights.double())
    assert_close(leaf.grad.cpu(), exact.grad, TOLERANCE[features.dtype])
    if mode == "bilinear" and points.is_floating_point():
        none = torch.zeros_like(exact_places)
        expected_grad = none if exact_places.grad is None else exact_places.grad
        assert_close(places.grad.cpu(), expected_grad, TOLERANCE[points.dtype])


@MODES
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spatial", [(11,), (7, 9), (4, 5, 6), (1, 1)], ids=str)
def test_gathering_types_and_sizes(
    device: str, dtype: torch.dtype, spatial: tuple[int, ...], mode: str
) -> None:
    features = torch.randn(2, 5, *spatial).to(dtype)
    points = test_gather_at.points_in(features, 40)
    assert_same_values(features, points, device, mode, torch.randint(-1, 3, (2, 40)))
    assert_same_values(features, points.to(dtype), device, mode)


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathering_layouts(device: str, layout: str, mode: str) -> None:
    features = LAYOUTS[layout](torch.randn(2, 70, 12, 14))
    points = test_gather_at.points_in(features, 4, 30)
    assert_same_values(features, points, device, mode)
    assert_same_values(features, points.transpose(1, 2)[:, ::2], device, mode)
    assert_same_values(features, points.nan_to_num().long(), device, mode)


@MODES
def test_gathering_many_points_at_one_pixel(device: str, mode: str) -> None:
    """In bfloat16 a running sum of ones stops at 256."""
    features = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16, device=device, requires_grad=True)
    instembed.gather_at(features, torch.ones(1, 4096, 2, device=device), mode=mode).sum().backward()
    assert features.grad[0, 0, 1, 1] == 4096 and features.grad.sum() == 2 * 4096


@MODES
def test_gathering_nothing(device: str, mode: str) -> None:
    for shape, count in (((2, 3, 4, 5), 0), ((0, 3, 4, 5), 6), ((2, 3, 0, 5), 6)):
        assert_same_values(torch.randn(shape), torch.zeros(shape[0], count, 2), device, mode)


def test_location_maps(device: str) -> None:
    maps = torch.randn(2, 45, 12, 14)
    keypoints, valid = 15 * torch.rand(2, 6, 15, 2) - 1, torch.rand(2, 6, 15) < 0.6
    leaf = there(maps.detach(), device).requires_grad_()
    ours = instembed.read_location_maps(leaf, there(keypoints, device), there(valid, device))
    exact = maps.detach().double().requires_grad_()
    body = instembed.readout.BODY_15
    expected = reference.read_location_maps(exact, keypoints, valid, limbs=body.limbs, root=body.root)
    assert_close(ours.detach().cpu(), expected.detach(), 1e-6)
    ours.square().sum().backward()
    expected.square().sum().backward()
    assert_close(leaf.grad.cpu(), exact.grad, 1e-5)


# ---------------------------------------------------------------------------------------------------------
# The associative embedding loss


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("kind", ["exp", "hinge"])
def test_tag_loss(device: str, dtype: torch.dtype, dimensions: int, kind: str) -> None:
    tags, keypoints, visible = test_associative_embedding.people(dimensions=dimensions, dtype=dtype)
    gathered = test_associative_embedding.gather(tags, keypoints, visible)
    for given, places, counts in ((tags, keypoints, visible), (gathered[0], None, gathered[1])):
        leaf = there(given.detach(), device).requires_grad_()
        loss = instembed.associative_embedding_loss(
            leaf, there(places, device), there(counts, device), kind=kind, reduction="none"
        )
        exact = given.detach().double().requires_grad_()
        expected = reference.associative_embedding_loss(exact, places, counts, kind=kind, reduction="none")
        assert_close(loss.detach().cpu(), expected.detach(), 1e-12 if dtype == torch.float64 else 1e-6)
        loss.sum().backward()
        expected.sum().backward()
        assert_close(leaf.grad.cpu(), exact.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_tag_loss_of_people(device: str, count: int) -> None:
    tags, keypoints, visible = test_associative_embedding.people(count=count, dtype=torch.float64)
    leaf = there(tags.detach(), device).requires_grad_()
    loss = instembed.associative_embedding_loss(leaf, there(keypoints, device), there(visible, device))
    exact = tags.requires_grad_()
    expected = reference.associative_embedding_loss(exact, keypoints, visible)
    assert_close(loss.detach().cpu(), expected.detach(), 1e-12)
    loss.backward()
    expected.backward()
    assert_close(leaf.grad.cpu(), exact.grad, 1e-11)


# ---------------------------------------------------------------------------------------------------------
# Grouping of keypoints: the same bits as the definition


def assert_same_people(heatmaps: Tensor, tags: Tensor, device: str, **options: object) -> None:
    found = instembed.group_keypoints(
        there(heatmaps, device), there(tags, device), return_details=True, **options
    )
    expected = reference.group_keypoints(heatmaps, tags, **options)
    for name, a, b in zip(PosesWithDetails._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [1, 3])
def test_people_types(device: str, dtype: torch.dtype, dims: int) -> None:
    heatmaps, tags = (maps.to(dtype) for maps in test_group_keypoints.scene(2, 4, 25, 31, 5, dims))
    assert_same_people(heatmaps, tags, device)
    assert_same_people(heatmaps.transpose(2, 3), tags.transpose(2, 3), device, max_people=2)


@pytest.mark.parametrize(
    "options",
    [
        {"nms": 1, "max_people": 40},
        {"nms": 101, "peak_threshold": 0.0},
        {"tag_threshold": 0.1},
        {"adjust": False},
        {"refine": False},
        {"joint_order": [2, 0, 1, 3]},
    ],
    ids=str,
)
def test_people_options(device: str, options: dict) -> None:
    assert_same_people(*test_group_keypoints.scene(1, 4, 20, 23, 4), device, **options)


def test_people_of_ties_and_bad_pixels(device: str) -> None:
    heatmaps = torch.randint(0, 5, (2, 3, 12, 15)) / 4
    tags = torch.randint(0, 4, (2, 3, 12, 15)) / 2
    assert_same_people(heatmaps, tags, device)
    for maps in (heatmaps, tags):
        spoiled = torch.rand(maps.shape) < 0.1
        maps[spoiled] = torch.tensor([float("nan"), float("inf"), -float("inf")])[
            torch.randint(3, (int(spoiled.sum()),))
        ]
    assert_same_people(heatmaps, tags, device)


def test_people_of_nothing(device: str) -> None:
    for shape in ((0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 6)):
        assert_same_people(torch.zeros(shape), torch.zeros(shape), device)
