"""Recurrent mean shift against its float64 matrix version, and everything autograd asks of an op."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from instembed import reference
from instembed._native import core
from tests.comparing import assert_close, assert_compiles
from tests.layouts import layouts

pytestmark = pytest.mark.usefixtures("each_device")

# Of points and gradients, relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def blobs(
    count: int, channels: int = 8, clusters: int = 5, noise: float = 0.08, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(count, channels) points around directions, of any length."""
    centers = normalize(torch.randn(clusters, channels), dim=1)
    points = centers[torch.randint(0, clusters, (count,))] + noise * torch.randn(count, channels)
    return (points * (0.5 + torch.rand(count, 1))).to(dtype)


def assert_matches_reference(embeddings: Tensor, bandwidth: float, **options: object) -> None:
    """Without leaving anything out, points and gradient are those of the matrix version in float64."""
    ours = embeddings.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    shifted = instembed.recurrent_mean_shift(ours, bandwidth, **{"tolerance": 0.0, **options})
    expected = reference.recurrent_mean_shift(exact, bandwidth, **options)
    assert shifted.shape == expected.shape
    assert shifted.dtype == (torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    weights = torch.randn_like(expected)
    (shifted.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = TOLERANCE[embeddings.dtype]
    assert_close(shifted, expected, min(tolerance, 1e-5))
    assert ours.grad.dtype == embeddings.dtype
    assert_close(ours.grad, exact.grad, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bandwidth", [0.1, 0.2, 0.5, 3.0])
@pytest.mark.parametrize("step", [1.0, 0.5])
def test_types(dtype: torch.dtype, bandwidth: float, step: float) -> None:
    for iterations in (1, 3):
        assert_matches_reference(blobs(300, dtype=dtype), bandwidth, iterations=iterations, step=step)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels(channels: int, dtype: torch.dtype) -> None:
    assert_matches_reference(blobs(150, channels, dtype=dtype), 0.3, iterations=2)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 63, 64, 65, 129, 255, 1000, 2500])
def test_sizes(count: int, two_threads: None) -> None:
    assert_matches_reference(blobs(count), 0.2, iterations=2)
    assert_matches_reference(torch.randn(count, 3), 0.2, iterations=2)


@pytest.mark.parametrize("step", [0.0, 0.1, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_steps(step: float, iterations: int) -> None:
    assert_matches_reference(blobs(100, dtype=torch.float64), 0.3, iterations=iterations, step=step)


@pytest.mark.parametrize("shape", [(2, 5, 70), (2, 5, 7, 11), (3, 4, 3, 5, 7)], ids=str)
def test_images_and_masks(shape: tuple[int, ...]) -> None:
    embeddings = torch.randn(shape, dtype=torch.float64)
    flags = torch.randint(0, 3, (shape[0], *shape[2:]))
    for mask in (None, flags, flags > 0, flags.to(torch.uint8), -flags):
        assert_matches_reference(embeddings, 0.4, iterations=2, mask=mask, return_all=True)


@pytest.mark.parametrize("name", layouts(8, 13, 17))
def test_layouts(name: str) -> None:
    embeddings = layouts(8, 13, 17)[name]
    mask = (torch.rand(2, 17, 13) < 0.8).transpose(1, 2)
    leaf, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    weights = torch.randn(2, 8, 13, 17)
    shifted = instembed.recurrent_mean_shift(leaf, 0.5, mask=mask, iterations=2)
    (shifted * weights).sum().backward()
    (reference.recurrent_mean_shift(exact, 0.5, mask=mask, iterations=2) * weights).sum().backward()
    assert_close(leaf.grad, exact.grad, 1e-5)
    if name == "channels_last":
        assert shifted.is_contiguous(memory_format=torch.channels_last)
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last)


def test_ragged_points_are_images_of_their_own() -> None:
    points = blobs(400, dtype=torch.float64)
    offsets = torch.tensor([0, 150, 150, 151, 400], dtype=torch.int32)
    mask = torch.rand(400) < 0.7
    assert_matches_reference(points, 0.2, offsets=offsets, mask=mask)
    ours = instembed.recurrent_mean_shift(points, 0.2, offsets=offsets, mask=mask)
    alone = instembed.recurrent_mean_shift(points[151:], 0.2, mask=mask[151:])
    assert torch.equal(ours[151:], alone)


def test_many_small_images(two_threads: None) -> None:
    assert_matches_reference(torch.randn(9, 4, 6, 7), 0.4, iterations=2)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_points(shape: tuple[int, ...]) -> None:
    embeddings = torch.zeros(shape, requires_grad=True)
    for options in ({}, {"return_all": True}, {"recompute": True}, {"backprop_iterations": 1}):
        shifted = instembed.recurrent_mean_shift(embeddings, 0.1, iterations=3, **options)
        assert shifted.shape == ((4, *shape) if "return_all" in options else shape)
        (gradient,) = torch.autograd.grad(shifted.sum(), embeddings)
        assert gradient.shape == shape


def test_empty_mask_leaves_unit_vectors() -> None:
    embeddings = torch.randn(2, 5, 6, 7, requires_grad=True)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    shifted = instembed.recurrent_mean_shift(embeddings, 0.1, mask=mask)
    torch.testing.assert_close(shifted, normalize(embeddings, dim=1))
    weights = torch.randn_like(shifted)
    (gradient,) = torch.autograd.grad((shifted * weights).sum(), embeddings)
    (expected,) = torch.autograd.grad((normalize(embeddings, dim=1) * weights).sum(), embeddings)
    torch.testing.assert_close(gradient, expected)


def test_masked_out_points_move_nobody() -> None:
    points = blobs(200)
    mask = torch.rand(200) < 0.5
    shifted = instembed.recurrent_mean_shift(points, 0.2, mask=mask)
    assert torch.equal(shifted[mask], instembed.recurrent_mean_shift(points[mask], 0.2))
    torch.testing.assert_close(shifted[~mask], normalize(points[~mask], dim=1))


def test_zero_vectors_stay_zero_and_move_nobody() -> None:
    points = blobs(100)
    points[30:40] = 0
    points[35] = 1e-13
    leaf = points.clone().requires_grad_()
    shifted = instembed.recurrent_mean_shift(leaf, 0.2)
    others = torch.ones(100, dtype=torch.bool)
    others[30:40] = False
    assert not shifted[~others].any()
    assert torch.equal(shifted[others], instembed.recurrent_mean_shift(points[others], 0.2))
    shifted.square().sum().backward()
    assert not leaf.grad[~others].any() and leaf.grad.isfinite().all()
    assert_matches_reference(points, 0.2, iterations=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_points_show_and_move_nobody(value: float) -> None:
    points = blobs(100)
    points[50, 3] = value
    others = torch.arange(100) != 50
    leaf = points.clone().requires_grad_()
    for iterates in (
        instembed.recurrent_mean_shift(leaf, 0.2, return_all=True),
        reference.recurrent_mean_shift(points, 0.2, return_all=True),
    ):
        assert iterates[:, 50].isnan().any(-1).all() and iterates[:, others].isfinite().all()
    shifted = instembed.recurrent_mean_shift(leaf, 0.2)
    assert torch.equal(shifted[others], instembed.recurrent_mean_shift(points[others], 0.2))
    shifted[others].sum().backward()
    assert leaf.grad[others].isfinite().all()


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e18, 3e38])
def test_any_length(scale: float) -> None:
    directions = normalize(blobs(100), dim=1)
    leaf = (scale * directions).requires_grad_()
    shifted = instembed.recurrent_mean_shift(leaf, 0.2)
    torch.testing.assert_close(shifted, instembed.recurrent_mean_shift(directions, 0.2), rtol=0, atol=1e-5)
    shifted[:, 0].sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_do_not_drift(dtype: torch.dtype) -> None:
    iterates = instembed.recurrent_mean_shift(blobs(500, dtype=dtype), 0.1, iterations=20, return_all=True)
    drift = (torch.linalg.vector_norm(iterates.double(), dim=2) - 1).abs().max().item()
    assert drift < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bandwidth", [1e-3, 1e-4, 1e-8, 1e-30, 1e-200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_diagonal_is_left(bandwidth: float, dtype: torch.dtype) -> None:
    points = torch.randn(200, 6, dtype=dtype, requires_grad=True)
    shifted = instembed.recurrent_mean_shift(points, bandwidth)
    torch.testing.assert_close(shifted, normalize(points, dim=1))
    weights = torch.randn_like(shifted)
    (gradient,) = torch.autograd.grad((shifted * weights).sum(), points)
    (expected,) = torch.autograd.grad((normalize(points, dim=1) * weights).sum(), points)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bandwidth", [1e15, 1e200])
def test_everything_is_near(bandwidth: float) -> None:
    points = 0.3 + torch.randn(200, 6)
    shifted = instembed.recurrent_mean_shift(points, bandwidth, iterations=1)
    mean = normalize(normalize(points, dim=1).mean(0, keepdim=True), dim=1)
    torch.testing.assert_close(shifted, mean.expand(200, 6))


@pytest.mark.parametrize("bandwidth", [1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("count", [2, 100, 1000])
def test_identical_points_stay(bandwidth: float, count: int) -> None:
    """Rounding of lengths does not tell them apart, however narrow the kernel is."""
    points = torch.randn(1, 7).expand(count, 7).clone().requires_grad_()
    unit = normalize(points.detach(), dim=1)
    _, _, denominators = torch.ops.instembed.recurrent_mean_shift(unit, None, None, bandwidth, 1.0, 1e-6)
    assert (denominators == count).all()
    shifted = instembed.recurrent_mean_shift(points, bandwidth)
    torch.testing.assert_close(shifted.detach(), unit)
    (gradient,) = torch.autograd.grad((shifted * torch.randn(7)).sum(), points)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 1e3, 1e6])
def test_antipodal_points(bandwidth: float) -> None:
    """They cancel, up to rounding where the kernel is wide: a direction is left, or zero, and no NaN."""
    half = torch.randn(50, 5, dtype=torch.float64)
    points = torch.cat([half, -half]).requires_grad_()
    shifted = instembed.recurrent_mean_shift(points, bandwidth, return_all=True)
    norms = torch.linalg.vector_norm(shifted, dim=2)
    assert (((norms - 1).abs() < 1e-6) | (norms == 0)).all()
    if bandwidth <= 1:
        assert_matches_reference(points, bandwidth, iterations=2)
    shifted.sum().backward()
    assert points.grad.isfinite().all()


def test_points_that_cancel_exactly_become_zero() -> None:
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    iterates = instembed.recurrent_mean_shift(points, 1e9, iterations=2, return_all=True)
    assert iterates[0].any() and not iterates[1:].any()
    iterates[1:].sum().backward()
    assert not points.grad.any()


def test_one_point_stays() -> None:
    point = torch.tensor([[3.0, 4.0]], requires_grad=True)
    shifted = instembed.recurrent_mean_shift(point, 0.1)
    torch.testing.assert_close(shifted.detach(), torch.tensor([[0.6, 0.8]]))
    shifted[0, 0].backward()
    torch.testing.assert_close(point.grad, torch.tensor([[0.16 * 0.8, -0.12 * 0.8]]))


def test_two_points_by_hand() -> None:
    """At an angle a, each mean is at tan(a/2) (1 - K) / (1 + K) from their bisector."""
    angle, bandwidth = 0.4, 0.3
    points = torch.tensor([[math.cos(angle / 2), s * math.sin(angle / 2)] for s in (-1, 1)])
    shifted = instembed.recurrent_mean_shift(points, bandwidth, iterations=1)
    kernel = math.exp((math.cos(angle) - 1) / bandwidth**2)
    slope = math.tan(angle / 2) * (1 - kernel) / (1 + kernel)
    torch.testing.assert_close(shifted[1, 1] / shifted[1, 0], torch.tensor(slope))


def test_clusters_converge_to_their_modes() -> None:
    centers = torch.eye(6)
    ids = torch.arange(600) % 6
    points = centers[ids] + 0.1 * torch.randn(600, 6)
    shifted = instembed.recurrent_mean_shift(points, 0.3, iterations=10)
    similarity = shifted @ shifted.T
    same = ids[:, None] == ids
    assert similarity[same].min() > 0.999 and similarity[~same].max() < 0.5


@pytest.mark.parametrize("tolerance", [1e-8, 1e-4, 1e-2, 0.5])
@pytest.mark.parametrize("bandwidth", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("channels", [3, 16])
def test_bound_of_what_is_left_out(tolerance: float, bandwidth: float, channels: int) -> None:
    """Each mean is off by at most 2 e_i / d_i, e_i being what the row has below tolerance / 64."""
    x = normalize(blobs(3000, channels, 30, dtype=torch.float64), dim=1)
    kernel = torch.exp((x @ x.T - 1) / bandwidth**2)
    total = kernel.sum(1)
    below = (kernel * (kernel < tolerance / 64)).sum(1)
    y = kernel @ x / total[:, None]
    shifted, norms, denominators = torch.ops.instembed.recurrent_mean_shift(
        x, None, None, bandwidth, 1.0, tolerance
    )
    error = torch.linalg.vector_norm(shifted * norms[:, None] - y, dim=1)
    assert (error <= 2 * below / total + 1e-12).all()
    missing = total - denominators
    assert (missing <= below + 1e-9).all() and (missing >= -1e-9).all()
    assert (below <= len(x) * tolerance / 64).all() and (total >= 1).all()
    if tolerance >= 1e-4 and bandwidth < 0.4:
        assert missing.max() > 0  # something was left out


def test_nothing_is_left_out_without_tolerance() -> None:
    x = normalize(blobs(3000, 4, 30, dtype=torch.float64), dim=1)
    _, _, denominators = torch.ops.instembed.recurrent_mean_shift(x, None, None, 0.1, 1.0, 0.0)
    torch.testing.assert_close(denominators, torch.exp((x @ x.T - 1) / 0.01).sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bandwidth", [0.1, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_tolerance_keeps_the_gradient(bandwidth: float, dtype: torch.dtype) -> None:
    """Points and gradient to 1e-5 of the matrix version on clusters."""
    points = blobs(3000, 16, 30, dtype=dtype)
    assert_matches = {"iterations": 1, "tolerance": 1e-6}
    ours, exact = points.clone().requires_grad_(), points.double().requires_grad_()
    shifted = instembed.recurrent_mean_shift(ours, bandwidth, **assert_matches)
    expected = reference.recurrent_mean_shift(exact, bandwidth, iterations=1)
    weights = torch.randn_like(expected)
    (shifted * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(shifted, expected, 1e-5)
    assert_close(ours.grad, exact.grad, 1e-5)


@pytest.mark.parametrize("return_all", [False, True])
@pytest.mark.parametrize("last", [0, 1, 2, 4, 9])
def test_truncated_backprop_is_detaching(last: int, return_all: bool) -> None:
    """What happens before the last iterations is a constant displacement, put back on the sphere."""
    points = blobs(80, dtype=torch.float64)
    leaf, by_hand = points.clone().requires_grad_(), points.clone().requires_grad_()
    options = {"iterations": 4, "step": 0.7, "return_all": return_all}
    ours = instembed.recurrent_mean_shift(leaf, 0.3, backprop_iterations=last, tolerance=0.0, **options)
    start = normalize(by_hand, dim=1)
    iterates = [start]
    for iteration in range(4):
        after = reference.recurrent_mean_shift(iterates[-1], 0.3, iterations=1, step=0.7)
        if iteration < 4 - last:
            after = normalize(start + (after - start).detach(), dim=1)
        iterates.append(after)
    expected = torch.stack(iterates) if return_all else iterates[-1]
    weights = torch.randn_like(expected)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(ours, expected, 1e-12)
    assert_close(leaf.grad, by_hand.grad, 1e-12)
    assert torch.equal(ours, instembed.recurrent_mean_shift(points, 0.3, tolerance=0.0, **options))
    exact = points.clone().requires_grad_()
    truncated = reference.recurrent_mean_shift(exact, 0.3, backprop_iterations=last, **options)
    (truncated * weights).sum().backward()
    assert_close(leaf.grad, exact.grad, 1e-12)


@pytest.mark.parametrize("options", [{}, {"return_all": True}, {"backprop_iterations": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recomputing_has_the_same_bits(options: dict, dtype: torch.dtype) -> None:
    points = blobs(500, dtype=dtype)
    results = []
    for recompute in (False, True):
        leaf = points.clone().requires_grad_()
        shifted = instembed.recurrent_mean_shift(leaf, 0.2, recompute=recompute, **options)
        (shifted * torch.linspace(-1, 1, 8)).sum().backward()
        results.append((shifted.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_recomputing_keeps_only_the_embeddings() -> None:
    kept: list[int] = []
    points = blobs(200).requires_grad_()
    for recompute in (False, True):
        kept.append(0)

        def pack(tensor: Tensor) -> Tensor:
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            instembed.recurrent_mean_shift(points, 0.2, recompute=recompute)
    assert kept[1] <= points.numel() < kept[0] / 5


def test_all_iterates() -> None:
    points = blobs(100)
    iterates = instembed.recurrent_mean_shift(points, 0.2, iterations=3, return_all=True)
    assert iterates.shape == (4, 100, 8)
    torch.testing.assert_close(iterates[0], normalize(points, dim=1))
    for iteration in range(4):
        alone = instembed.recurrent_mean_shift(points, 0.2, iterations=iteration)
        assert torch.equal(iterates[iteration], alone)
    images = points.T.reshape(1, 8, 10, 10)
    iterates = instembed.recurrent_mean_shift(images, 0.2, iterations=2, return_all=True)
    assert iterates.shape == (3, 1, 8, 10, 10)


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [0.1, 1.0])
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype, bandwidth: float) -> None:
    embeddings = blobs(6000, dtype=dtype).T.reshape(2, 8, 60, 50)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = embeddings.clone().requires_grad_()
            shifted = instembed.recurrent_mean_shift(leaf, bandwidth, iterations=2, step=0.8)
            shifted.square().mul(torch.linspace(-1, 1, 50)).sum().backward()
            results.append((shifted.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for shifted, gradient in results[1:]:
        assert torch.equal(shifted, results[0][0]) and torch.equal(gradient, results[0][1])


def test_attention_is_a_reference_too() -> None:
    images = torch.randn(2, 5, 8, 9, dtype=torch.float64)
    mask = torch.rand(2, 8, 9) < 0.7
    options = {"iterations": 3, "step": 0.8, "mask": mask, "return_all": True}
    matrix, attention = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected = reference.recurrent_mean_shift(matrix, 0.3, **options)
    found = reference.recurrent_mean_shift(attention, 0.3, attention=True, **options)
    assert_close(found, expected, 1e-12)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert_close(attention.grad, matrix.grad, 1e-10)


@pytest.mark.parametrize("step", [1.0, 0.4])
def test_gradcheck(step: float) -> None:
    points = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) != 4
    assert torch.autograd.gradcheck(
        lambda p: instembed.recurrent_mean_shift(
            p, 0.5, iterations=2, step=step, mask=mask, tolerance=0.0, return_all=True
        ),
        points,
    )


def test_reference_can_be_differentiated_twice() -> None:
    points = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda p: reference.recurrent_mean_shift(p, 0.5, iterations=2), points
    )


def test_double_backward_says_so() -> None:
    points = blobs(20).requires_grad_()
    (gradient,) = torch.autograd.grad(
        instembed.recurrent_mean_shift(points, 0.5).sum(), points, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "options", [{}, {"return_all": True}, {"backprop_iterations": 1}, {"recompute": True}], ids=str
)
def test_compile_fullgraph(options: dict) -> None:
    mask = torch.rand(2, 6, 7) < 0.8
    weights = torch.randn(5, 6, 7)

    def step(embeddings: Tensor) -> Tensor:
        shifted = instembed.recurrent_mean_shift(embeddings * 2, 0.5, iterations=2, mask=mask, **options)
        return (shifted * weights).sum()

    assert_compiles(step, torch.randn(2, 5, 6, 7))


def test_compile_with_inductor_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda e: instembed.recurrent_mean_shift(e.tanh(), 0.5, iterations=2), fullgraph=True, dynamic=True
    )
    for size in ((12, 14), (17, 11)):
        embeddings = torch.randn(2, 5, *size, requires_grad=True)
        shifted = step(embeddings)
        shifted.square().sum().backward()
        torch.testing.assert_close(
            shifted, instembed.recurrent_mean_shift(embeddings.tanh(), 0.5, iterations=2)
        )


def test_autocast(each_device: str) -> None:
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    with torch.autocast(each_device, dtype=torch.bfloat16):
        embeddings = conv(torch.randn(2, 3, 13, 17))
        assert embeddings.dtype == torch.bfloat16
        shifted = instembed.recurrent_mean_shift(embeddings, 0.5)
    assert shifted.dtype == torch.float32
    (shifted * torch.randn_like(shifted)).sum().backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


def test_module() -> None:
    options = {"iterations": 2, "step": 0.5, "tolerance": 1e-4, "backprop_iterations": 1}
    shift = instembed.RecurrentMeanShift(0.3, **options)
    embeddings, mask = torch.randn(2, 5, 6, 7), torch.rand(2, 6, 7) < 0.5
    expected = instembed.recurrent_mean_shift(embeddings, 0.3, mask=mask, **options)
    for module in (shift, copy.deepcopy(shift), torch.nn.Sequential(shift)[0]):
        assert torch.equal(module(embeddings, mask), expected)
    assert "step=0.5" in repr(shift) and not list(shift.parameters()) and not shift.state_dict()
    with pytest.raises(ValueError, match="bandwidth"):
        instembed.RecurrentMeanShift(-1)


def test_frozen_inputs_and_inference() -> None:
    points = blobs(50)
    assert not instembed.recurrent_mean_shift(points, 0.2).requires_grad
    leaf = points.clone().requires_grad_()
    with torch.no_grad():
        assert not instembed.recurrent_mean_shift(leaf, 0.2, recompute=True).requires_grad
    with torch.inference_mode():
        instembed.recurrent_mean_shift(points, 0.2)


def test_inputs_are_left_alone() -> None:
    points = blobs(50)
    before = points.clone()
    instembed.recurrent_mean_shift(points.requires_grad_(), 0.2).sum().backward()
    assert torch.equal(points.detach(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": np.zeros((2, 3, 5), np.int32)}, "points"),
        ({"points": np.zeros((2, 3, 5), np.float16)}, "points"),
        ({"points": np.zeros((2, 3), np.float32)}, "embeddings"),
        ({"mask": np.zeros((2, 4), np.uint8)}, "mask"),
        ({"shifted": np.zeros((2, 3, 5))}, "shifted"),
        ({"shifted": np.zeros((2, 3, 6), np.float32)}, "shifted"),
        ({"norms": np.zeros((2, 4), np.float32)}, "norms"),
        ({"denominators": np.zeros((2, 5))}, "denominators"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_core_guards_its_own_boundary(change: dict, message: str) -> None:
    arguments = {
        "points": np.zeros((2, 3, 5), np.float32),
        "mask": None,
        "offsets": None,
        "shifted": np.zeros((2, 3, 5), np.float32),
        "norms": np.zeros((2, 5), np.float32),
        "denominators": np.zeros((2, 5), np.float32),
        "bandwidth": 0.1,
        "step": 1.0,
        "tolerance": 1e-6,
        "threads": 1,
    }
    core.recurrent_mean_shift_forward(**arguments)
    with pytest.raises(ValueError, match=message):
        core.recurrent_mean_shift_forward(**(arguments | change))
