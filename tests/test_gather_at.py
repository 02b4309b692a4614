"""Features at points against the float64 reference, and everything autograd asks of an op."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import instembed
from instembed import reference
from instembed._native import core
from tests.comparing import assert_close, on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
MODES = ["nearest", "bilinear"]


def points_in(features: Tensor, *shape: int) -> Tensor:
    """Points in and around the maps: inside, on centres, on borders, outside and at NaN."""
    sizes = features.shape[:1:-1]
    points = torch.rand(len(features), *shape, len(sizes)) * (torch.tensor(sizes) + 3) - 2
    choice = torch.rand(points.shape)
    points = torch.where(choice < 0.2, points.round(), points)
    points = torch.where((choice > 0.2) & (choice < 0.3), points.floor() + 0.5, points)
    return torch.where(choice > 0.97, math.nan, points)


def assert_matches_reference(
    features: Tensor, points: Tensor, mode: str, valid: Tensor | None = None
) -> None:
    ours = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    our_points = points.detach().clone().requires_grad_()
    exact = features.detach().cpu().double().requires_grad_()
    exact_points = points.cpu().double().requires_grad_()
    values = instembed.gather_at(ours, our_points, valid=valid, mode=mode)
    expected = reference.gather_at(exact, exact_points, valid=on_cpu(valid), mode=mode)
    assert values.shape == expected.shape == (*points.shape[:-1], features.shape[1])
    assert values.dtype == features.dtype
    assert_close(values.cpu(), expected, TOLERANCE[features.dtype])
    weights = torch.randn_like(expected).to(features.dtype)
    gradients = torch.autograd.grad(values, [ours, our_points], weights.to(values.device), allow_unused=True)
    exact_gradients = torch.autograd.grad(
        expected, [exact, exact_points], weights.double(), allow_unused=True
    )
    assert gradients[0].dtype == features.dtype
    assert_close(gradients[0].cpu(), exact_gradients[0], TOLERANCE[features.dtype])
    if mode == "nearest":
        assert gradients[1] is None
    else:
        assert_close(gradients[1].cpu(), exact_gradients[1], 1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spatial", [(11,), (7, 9), (4, 5, 6), (1, 1), (1, 9), (3, 1, 2)], ids=str)
def test_types_and_sizes(mode: str, dtype: torch.dtype, spatial: tuple[int, ...]) -> None:
    features = torch.randn(2, 5, *spatial).to(dtype)
    assert_matches_reference(features, points_in(features, 40), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3, 63, 64, 65, 200])
@pytest.mark.parametrize("count", [1, 255, 257, 1000])
def test_tasks(mode: str, channels: int, count: int, two_threads: None) -> None:
    features = torch.randn(2, channels, 7, 9)
    assert_matches_reference(features, points_in(features, count), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (0,), (3, 0)], ids=str)
def test_shapes_of_points(mode: str, shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 5, 7, 9)
    points = points_in(features, *shape)
    assert_matches_reference(features, points, mode)
    assert_matches_reference(features, points, mode, torch.randint(-1, 3, points.shape[:-1]))


def layouts() -> dict[str, Tensor]:
    return {
        "channels_last": torch.randn(2, 8, 7, 9).contiguous(memory_format=torch.channels_last),
        "channels_last_3d": torch.randn(2, 8, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
        "cropped": torch.randn(2, 8, 20, 30)[:, :, 3:10, 5:14],
        "transposed": torch.randn(2, 8, 9, 7).transpose(2, 3),
        "channel_slice": torch.randn(2, 19, 7, 9)[:, 2:18:2],
        "expanded": torch.randn(2, 8, 7, 1).expand(2, 8, 7, 9),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", layouts())
def test_layouts(mode: str, name: str) -> None:
    features = layouts()[name].detach()
    points = points_in(features, 30)
    leaf, exact = features.requires_grad_(), features.detach().cpu().double().contiguous().requires_grad_()
    values = instembed.gather_at(leaf, points, mode=mode)
    expected = reference.gather_at(exact, points.cpu().double(), mode=mode)
    assert_close(values.cpu(), expected, 1e-6)
    values.square().sum().backward()
    expected.square().sum().backward()
    assert_close(leaf.grad.cpu(), exact.grad, 1e-6)
    if name == "channels_last":
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    strided = torch.zeros(*points.shape[:2], 5)[..., 1:4:2] if points.shape[-1] == 2 else points
    if strided is not points:
        strided.copy_(points)
        assert torch.equal(instembed.gather_at(leaf, strided, mode=mode), values)


@pytest.mark.parametrize("mode", MODES)
def test_several_points_on_one_pixel_add_up_once(mode: str) -> None:
    """In bfloat16 a running sum of ones stops at 256."""
    features = torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    instembed.gather_at(features, torch.ones(1, 4096, 2), mode=mode).sum().backward()
    assert features.grad[0, 0, 1, 1] == 4096 and features.grad.sum() == 2 * 4096


def test_coordinates_are_x_y_z() -> None:
    features = torch.arange(2.0 * 3 * 4).view(1, 1, 2, 3, 4)
    point = torch.tensor([[3, 1, 0]])  # x, y, z
    assert instembed.gather_at(features, point).item() == features[0, 0, 0, 1, 3]
    between = torch.tensor([[2.5, 0.5, 0.5]])
    expected = features[0, 0, :, :2, 2:].mean()
    assert instembed.gather_at(features, between, mode="bilinear").item() == pytest.approx(expected.item())


def test_ties_and_borders() -> None:
    features = torch.tensor([[[1.0, 2.0, 4.0]]])
    places = torch.tensor([-0.51, -0.5, 0.49, 0.5, 1.5, 2.49, 2.5, math.nan, math.inf]).view(1, -1, 1)
    nearest = instembed.gather_at(features, places).flatten().tolist()
    assert nearest == [0, 1, 1, 2, 4, 4, 0, 0, 0]
    linear = instembed.gather_at(features, places, mode="bilinear").flatten()
    torch.testing.assert_close(linear, torch.tensor([0, 1, 1.49, 1.5, 3, 4, 0, 0, 0]))


def test_bilinear_is_grid_sample() -> None:
    features = torch.randn(2, 5, 7, 9, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 30, 2, dtype=torch.float64) * torch.tensor([8.0, 6.0])
    points.requires_grad_()
    grid = (points / torch.tensor([8.0, 6.0]) * 2 - 1)[:, None]
    sampled = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)
    expected = sampled[:, :, 0].transpose(1, 2)
    ours = instembed.gather_at(features, points, mode="bilinear")
    torch.testing.assert_close(ours, expected)
    for got, want in zip(
        torch.autograd.grad(ours.square().sum(), [features, points]),
        torch.autograd.grad(expected.square().sum(), [features, points]),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_there_is_zero(mode: str) -> None:
    for shape in ((2, 3, 0, 4), (0, 3, 4, 4), (2, 3, 4, 4)):
        features = torch.randn(shape, requires_grad=True)
        points = torch.zeros(shape[0], 6, 2)
        values = instembed.gather_at(features, points, valid=torch.zeros(shape[0], 6).bool(), mode=mode)
        assert not values.any() and values.requires_grad
        values.sum().backward()
        assert features.grad.shape == shape and not features.grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_bad_features_show_only_where_read(mode: str) -> None:
    features = torch.zeros(1, 2, 4, 4)
    features[0, :, 0, 0] = math.nan
    points = torch.tensor([[[0.2, 0.2], [2.0, 2.0], [0.2, 0.2]]])
    values = instembed.gather_at(features, points, valid=torch.tensor([[1, 1, 0]]), mode=mode)
    assert values[0, 0].isnan().all() and not values[0, 1:].any()


@pytest.mark.parametrize("dtype", [*instembed._arguments.FLOATING, *instembed._arguments.INTEGER], ids=str)
def test_types_of_points_and_valid(dtype: torch.dtype) -> None:
    features = torch.randn(2, 3, 7, 9)
    points, valid = torch.randint(0, 7, (2, 20, 2)), torch.randint(0, 3, (2, 20))
    flags = valid.to(dtype) if not dtype.is_floating_point else valid > 0
    expected = instembed.gather_at(features, points, valid=valid)
    for mode in MODES:
        assert torch.equal(instembed.gather_at(features, points.to(dtype), valid=flags, mode=mode), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spatial", [(6,), (4, 5), (3, 2, 4)], ids=str)
def test_gradcheck(mode: str, spatial: tuple[int, ...]) -> None:
    features = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 4, len(spatial), dtype=torch.float64) * torch.tensor(spatial[::-1]) - 0.4
    valid = torch.tensor([[1, 1, 1, 0]] * 2)

    def gather(f: Tensor, p: Tensor) -> Tensor:
        return instembed.gather_at(f, p, valid=valid, mode=mode)

    assert torch.autograd.gradcheck(gather, (features, points.requires_grad_(mode == "bilinear")))


@pytest.mark.cpu_only
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_on_any_number_of_threads(mode: str) -> None:
    features, results = torch.randn(2, 130, 30, 40), []
    points = points_in(features, 3000)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaves = [features.clone().requires_grad_(), points.clone().requires_grad_(mode == "bilinear")]
            values = instembed.gather_at(*leaves, mode=mode)
            values.square().sum().backward()
            results.append(
                [values.detach(), leaves[0].grad, *([leaves[1].grad] if mode == "bilinear" else [])]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_wanted_gradients() -> None:
    features, points = torch.randn(2, 3, 7, 9), torch.rand(2, 5, 2)
    points.requires_grad_()
    instembed.gather_at(features, points, mode="bilinear").sum().backward()
    assert points.grad.any() and features.grad is None
    assert not instembed.gather_at(features, points.detach()).requires_grad


def test_double_backward_says_so() -> None:
    features = torch.randn(1, 3, 6, 6, requires_grad=True)
    values = instembed.gather_at(features, torch.ones(1, 2, 2))
    (gradient,) = torch.autograd.grad(values.square().sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_compile(mode: str) -> None:
    torch._dynamo.reset()

    def step(f: Tensor, p: Tensor) -> Tensor:
        return instembed.gather_at(f * 2, p + 0.1, valid=p[..., 0] > 1, mode=mode).sin()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size, count in ((8, 5), (11, 9)):
        features = torch.randn(2, 3, size, size + 1)
        points = size * torch.rand(2, count, 4, 2)
        leaves = [[features.clone().requires_grad_(), points.clone().requires_grad_()] for _ in range(2)]
        values, expected = compiled(*leaves[0]), step(*leaves[1])
        torch.testing.assert_close(values, expected)
        values.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaves[0][0].grad, leaves[1][0].grad)


def test_autocast(each_device: str) -> None:
    conv = torch.nn.Conv2d(3, 4, 3)
    with torch.autocast(each_device, dtype=torch.bfloat16):
        values = instembed.gather_at(conv(torch.randn(2, 3, 9, 9)), torch.ones(2, 5, 2), mode="bilinear")
    assert values.dtype == torch.bfloat16
    values.float().sum().backward()
    assert conv.weight.grad.any()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((2, 1, 4, 5, 6), np.int32)}, "values"),
        ({"features": np.zeros((2, 4, 5), np.float32)}, "features"),
        ({"points": np.zeros((2, 7, 1, 1), np.float32)}, "points"),
        ({"points": np.zeros((2, 7, 2), np.float32)}, "points"),
        ({"valid": np.zeros((2, 6, 1), np.uint8)}, "valid"),
        ({"values": np.zeros((2, 7, 1, 3), np.float32)}, "values"),
        ({"values": np.zeros((2, 7, 1, 4), np.float64)}, "values"),
    ],
)
def test_core_guards_its_own_boundary(change: dict, message: str) -> None:
    arrays = {
        "features": np.zeros((2, 1, 4, 5, 6), np.float32),
        "points": np.zeros((2, 7, 1, 2), np.float32),
        "valid": None,
        "values": np.zeros((2, 7, 1, 4), np.float32),
    }
    core.gather_at_forward(**arrays, linear=True, threads=1)
    with pytest.raises(ValueError, match=message):
        core.gather_at_forward(**(arrays | change), linear=True, threads=1)
