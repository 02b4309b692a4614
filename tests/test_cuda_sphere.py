"""The CUDA kernels of recurrent pixel embedding, on a GPU or on the simulated device (tests/test_cuda.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from instembed import reference
from tests.comparing import assert_close, there
from tests.layouts import LAYOUTS
from tests.test_cuda import (  # noqa: F401  (run here with this file's workloads)
    test_graph_capture_and_replay,
    test_no_synchronisation,
    test_other_streams,
    test_same_bits_in_every_run,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

TYPES_AND_LAYOUTS = pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, "planar") for dtype in TOLERANCE] + [(torch.float32, layout) for layout in list(LAYOUTS)[1:]],
    ids=str,
)


def blobs(*shape: int, channels: int = 6, clusters: int = 4, noise: float = 0.08) -> Tensor:
    """(B, channels, *spatial) around directions, of any length."""
    centers = normalize(torch.randn(clusters, channels), dim=1)
    points = centers[torch.randint(clusters, shape)] + noise * torch.randn(*shape, channels)
    return (points * (0.5 + torch.rand(*shape, 1))).movedim(-1, 1)


# ---------------------------------------------------------------------------------------------------------
# Recurrent mean shift


def assert_same_shift(embeddings: Tensor, device: str, bandwidth: float = 0.3, **options: object) -> None:
    leaf = there(embeddings.detach(), device).requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    options = {"iterations": 2, **options}
    shifted = instembed.recurrent_mean_shift(leaf, bandwidth, tolerance=0.0, **there(options, device))
    expected = reference.recurrent_mean_shift(exact, bandwidth, **options)
    weights = torch.randn_like(expected)
    (shifted.double() * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    tolerance = TOLERANCE[embeddings.dtype]
    assert_close(shifted.cpu(), expected, min(tolerance, 1e-5))
    assert leaf.grad.dtype == embeddings.dtype
    assert_close(leaf.grad.cpu(), exact.grad, tolerance)


@TYPES_AND_LAYOUTS
def test_shift_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    assert_same_shift(LAYOUTS[layout](blobs(2, 6, 9).to(dtype)), device)


@pytest.mark.parametrize("channels", [1, 17, 65])
@pytest.mark.parametrize("spatial", [(1,), (65,), (2, 3, 5)], ids=str)
def test_shift_sizes(device: str, channels: int, spatial: tuple[int, ...]) -> None:
    assert_same_shift(blobs(1, *spatial, channels=channels), device, iterations=1)


@pytest.mark.parametrize("bandwidth", [0.1, 3.0])
@pytest.mark.parametrize("step", [0.0, 0.5, 1.5])
def test_shift_steps(device: str, bandwidth: float, step: float) -> None:
    assert_same_shift(blobs(1, 70), device, bandwidth, step=step)


def test_shift_masks_and_iterates(device: str) -> None:
    flags = torch.randint(0, 3, (2, 7, 11))
    for mask in (flags > 0, flags, -flags.to(torch.int8), flags.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same_shift(blobs(2, 7, 11), device, mask=mask, iterations=1, return_all=True)


def test_shift_of_points_with_offsets(device: str) -> None:
    points = blobs(1, 200)[0].T.contiguous()
    assert_same_shift(points, device)
    offsets = torch.tensor([0, 0, 70, 70, 71, 200])
    assert_same_shift(points, device, offsets=offsets, mask=torch.rand(200) < 0.7)


def test_shift_of_nothing(device: str) -> None:
    for shape in ((0, 3), (0, 3, 4, 5), (2, 3, 0, 5)):
        embeddings = torch.zeros(shape, device=device, requires_grad=True)
        shifted = instembed.recurrent_mean_shift(embeddings, 0.1)
        (gradient,) = torch.autograd.grad(shifted.sum(), embeddings)
        assert shifted.shape == gradient.shape == shape
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    assert_same_shift(torch.randn(2, 5, 6, 7), device, mask=mask)


def test_shift_of_what_is_no_direction(device: str) -> None:
    points = blobs(1, 100)[0].T.contiguous()
    points[3] = 0
    assert_same_shift(points, device)
    points[[5, 70], [0, 2]] = torch.tensor([float("nan"), float("inf")])
    shifted = instembed.recurrent_mean_shift(there(points, device), 0.3).cpu()
    fine = points.isfinite().all(1)
    assert shifted[~fine].isnan().any(1).all()
    torch.testing.assert_close(shifted[fine], instembed.recurrent_mean_shift(points[fine], 0.3))


def test_shift_of_extremes(device: str) -> None:
    alone = torch.randn(70, 8, device=device)  # every value but the diagonal underflows
    torch.testing.assert_close(
        instembed.recurrent_mean_shift(alone, 1e-3, iterations=20), normalize(alone, dim=1)
    )
    same = torch.ones(70, 8, device=device)
    torch.testing.assert_close(instembed.recurrent_mean_shift(same, 0.1), normalize(same, dim=1))
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device)
    torch.testing.assert_close(instembed.recurrent_mean_shift(opposite, 0.1), opposite)
    lengths = instembed.recurrent_mean_shift(torch.randn(70, 8).to(device), 0.5, iterations=20).norm(dim=1)
    assert (lengths - 1).abs().max() < 1e-6


def test_shift_leaves_out_what_its_tolerance_says(device: str) -> None:
    embeddings = blobs(1, 130, noise=0.2)
    shifted = instembed.recurrent_mean_shift(
        there(embeddings, device), 0.3, iterations=1, tolerance=0.9
    ).cpu()
    less, all_of_it = (
        reference.recurrent_mean_shift(embeddings.double(), 0.3, iterations=1, tolerance=tolerance)
        for tolerance in (0.9, 0.0)
    )
    assert_close(shifted, less, 1e-6)
    assert (shifted - all_of_it).abs().max() > 1e-4


def test_shift_by_wrong_offsets_is_nan(device: str) -> None:
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        points = torch.randn(100, 3, device=device, requires_grad=True)
        shifted = instembed.recurrent_mean_shift(points, 0.3, offsets=torch.tensor(wrong, device=device))
        (gradient,) = torch.autograd.grad(shifted.sum(), points)
        assert shifted.isnan().all() and gradient.isnan().all()


# ---------------------------------------------------------------------------------------------------------
# Cosine margin loss


def loss_and_gradient(
    function: Callable[..., Tensor], embeddings: Tensor, *arguments: object, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().requires_grad_()
    loss = function(leaf, *arguments, reduction="none", **options)
    (loss * torch.arange(1, len(loss) + 1, device=loss.device)).sum().backward()
    return loss.detach().cpu(), leaf.grad.cpu()


def assert_same_loss(embeddings: Tensor, labels: Tensor, device: str, **options: object) -> None:
    loss, gradient = loss_and_gradient(
        instembed.cosine_margin_loss,
        there(embeddings, device),
        there(labels, device),
        **there(options, device),
    )
    expected = loss_and_gradient(reference.cosine_margin_loss, embeddings.double(), labels, **options)
    tolerance = TOLERANCE[embeddings.dtype]
    assert_close(loss, expected[0], min(tolerance, 1e-5))
    assert gradient.dtype == embeddings.dtype
    assert_close(gradient, expected[1], tolerance, least=1 / labels.numel())


@TYPES_AND_LAYOUTS
def test_loss_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    embeddings = LAYOUTS[layout](torch.randn(2, 6, 6, 9).to(dtype))
    assert_same_loss(embeddings, torch.randint(0, 4, (2, *embeddings.shape[2:])), device)


@pytest.mark.parametrize("channels", [1, 17, 65])
@pytest.mark.parametrize("spatial", [(1,), (65,), (2, 3, 5)], ids=str)
def test_loss_sizes(device: str, channels: int, spatial: tuple[int, ...]) -> None:
    labels = torch.randint(-3, 4, (1, *spatial)) * 2**40
    assert_same_loss(torch.randn(1, channels, *spatial), labels, device)


@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0.0},
        {"margin": 0.8, "squared": True},
        {"margin": 1.0},
        {"background": None, "squared": True},
        {"background": 2, "ignore_index": 0},
        {"normalize": False},
    ],
    ids=str,
)
def test_loss_options(device: str, options: dict) -> None:
    labels = torch.randint(0, 5, (2, 7, 11))
    assert_same_loss(torch.randn(2, 6, 7, 11), labels, device, **options)


def test_loss_of_many_instances(device: str) -> None:
    embeddings = torch.randn(2, 6, 100)
    assert_same_loss(embeddings, torch.arange(200).reshape(2, 100), device, background=None)
    assert_same_loss(embeddings, torch.full((2, 100), 7), device)


def test_loss_of_points_with_offsets(device: str) -> None:
    points, labels = torch.randn(150, 5), torch.randint(0, 4, (150,))
    assert_same_loss(points, labels, device)
    assert_same_loss(points, labels, device, offsets=torch.tensor([0, 0, 70, 70, 71, 150]))


@pytest.mark.parametrize("samples", [0.35, 30, (0.5, 20), (0.01, 4000), (1.0, 4000)], ids=str)
def test_loss_of_samples(device: str, samples: float | tuple[float, int]) -> None:
    """The pixels with the least random numbers, as the reference picks them from the same numbers."""
    points, labels = torch.randn(300, 5), torch.randint(0, 4, (300,))
    offsets = torch.tensor([0, 0, 140, 141, 300])
    for options in ({}, {"offsets": offsets}):
        drawn = torch.rand(300, generator=torch.Generator(device).manual_seed(3), device=device).cpu()
        loss, gradient = loss_and_gradient(
            instembed.cosine_margin_loss,
            there(points, device),
            there(labels, device),
            samples=samples,
            generator=torch.Generator(device).manual_seed(3),
            **there(options, device),
        )
        taken = samples_of(labels, drawn, options.get("offsets", torch.tensor([0, 300])), samples)
        expected = loss_and_gradient(
            reference.cosine_margin_loss, points.double(), torch.where(taken, labels, 0), **options
        )
        assert_close(loss, expected[0], 1e-5)
        assert_close(gradient, expected[1], 1e-5)


def samples_of(labels: Tensor, keys: Tensor, offsets: Tensor, samples: float | tuple[float, int]) -> Tensor:
    """Whether each point is among those that are drawn."""
    share, most = samples if isinstance(samples, tuple) else (samples, 300) if samples < 1 else (1, samples)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for start, end in itertools.pairwise(offsets.tolist()):
        chosen = start + labels[start:end].nonzero()[:, 0]
        count = min(math.ceil(share * len(chosen)), most)
        taken[chosen[keys[chosen].argsort(stable=True)[:count]]] = True
    return taken


def test_loss_of_nothing(device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4)):
        labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
        loss, gradient = loss_and_gradient(
            instembed.cosine_margin_loss, torch.randn(shape, device=device), labels
        )
        assert not loss.any() and not gradient.any()


def test_bad_embeddings_show_in_their_own_image_only(device: str) -> None:
    embeddings, labels = torch.randn(2, 4, 9, 9), torch.randint(0, 3, (2, 9, 9))
    labels[0, 3, 4] = 1
    for value in (float("nan"), float("inf")):
        embeddings[0, 2, 3, 4] = value
        loss, gradient = loss_and_gradient(
            instembed.cosine_margin_loss, there(embeddings, device), there(labels, device)
        )
        assert loss[0].isnan() and loss[1].isfinite() and gradient[1].isfinite().all()


def test_loss_by_wrong_offsets_is_nan(device: str) -> None:
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        loss, gradient = loss_and_gradient(
            instembed.cosine_margin_loss,
            torch.randn(100, 3, device=device),
            torch.randint(0, 4, (100,), device=device),
            offsets=torch.tensor(wrong, device=device),
            samples=50,
        )
        assert loss.isnan().all() and gradient.isnan().all()


# ---------------------------------------------------------------------------------------------------------
# Grouping on the sphere


def assert_same_groups(embeddings: Tensor, device: str, threshold: float = 0.95, **options: object) -> None:
    found = instembed.group_on_sphere(
        there(embeddings, device), threshold=threshold, max_instances=300, **there(options, device)
    )
    labels, centers = reference.group_on_sphere(embeddings, threshold=threshold, **options)
    assert torch.equal(found.labels.cpu(), labels)
    assert found.num_instances.tolist() == [len(of_image) for of_image in centers]
    pixels = reference_images(labels, options.get("offsets"))
    for b, of_image in enumerate(centers):
        assert_close(found.centers[b, : len(of_image)].cpu(), of_image.double(), 1e-6)
        counts = pixels[b].flatten().bincount(minlength=301)[1:]
        assert torch.equal(found.counts[b].cpu(), counts)
        assert not found.centers[b, len(of_image) :].any()


def reference_images(labels: Tensor, offsets: Tensor | None) -> list[Tensor]:
    if labels.dim() > 1:
        return list(labels)
    bounds = [0, len(labels)] if offsets is None else offsets.tolist()
    return [labels[start:end] for start, end in itertools.pairwise(bounds)]


@TYPES_AND_LAYOUTS
def test_group_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    assert_same_groups(LAYOUTS[layout](blobs(2, 6, 9).to(dtype)), device)


@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("spatial", [(1,), (65,), (2, 3, 5)], ids=str)
def test_group_sizes(device: str, channels: int, spatial: tuple[int, ...]) -> None:
    assert_same_groups(blobs(1, *spatial, channels=channels), device)


@pytest.mark.parametrize("leftovers", ["noise", "nearest"])
@pytest.mark.parametrize("min_size", [1, 3, 1000])
def test_group_small_components_and_masks(device: str, leftovers: str, min_size: int) -> None:
    options = {"min_size": min_size, "leftovers": leftovers}
    assert_same_groups(blobs(2, 7, 11, noise=0.15), device, mask=torch.randint(0, 3, (2, 7, 11)), **options)
    points = blobs(1, 150, noise=0.15)[0].T.contiguous()
    assert_same_groups(points, device, offsets=torch.tensor([0, 0, 70, 70, 71, 150]), **options)


def test_group_chains(device: str) -> None:
    angles = 3 * torch.arange(200, dtype=torch.float64)[torch.randperm(200)] / 200
    chain = torch.stack([angles.cos(), angles.sin()], 1)
    for step in (0.8, 1.2):
        assert_same_groups(chain, device, math.cos(step * 3 / 200))


def test_group_of_nothing(device: str) -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (0, 3)):
        assert_same_groups(torch.zeros(shape), device)
    points = blobs(1, 70)[0].T.contiguous()
    points[[5, 60], [0, 2]] = torch.tensor([float("nan"), float("inf")])
    points[7] = 0
    assert_same_groups(points, device)
    assert_same_groups(points, device, mask=torch.zeros(70, dtype=torch.bool))


def test_group_overflow_and_wrong_offsets(device: str) -> None:
    found = instembed.group_on_sphere(torch.randn(40, 8, device=device), threshold=1.0, max_instances=39)
    assert found.num_instances.tolist() == [40]
    assert not found.labels.any() and not found.counts.any() and not found.centers.any()
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        offsets = torch.tensor(wrong, device=device)
        found = instembed.group_on_sphere(torch.randn(100, 3, device=device), threshold=0.9, offsets=offsets)
        assert found.num_instances.tolist() == [-1] * 3 and not found.labels.any()


# ---------------------------------------------------------------------------------------------------------
# What only a GPU can show


@pytest.fixture(params=["shift", "loss", "group"])
def workload(request: pytest.FixtureRequest) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]:
    """What the tests that come from tests/test_cuda.py run, and the tensors that it reads."""
    if not instembed.cuda_available():
        pytest.skip("needs a GPU")
    points = blobs(2, 60, 70, channels=16, clusters=20).cuda().requires_grad_()
    labels = torch.randint(0, 20, (2, 60, 70)).cuda()

    def step() -> tuple[Tensor, ...]:
        if request.param == "group":
            return tuple(
                instembed.group_on_sphere(points, threshold=0.9, mask=labels, min_size=3, leftovers="nearest")
            )
        if request.param == "shift":
            value = (
                instembed.recurrent_mean_shift(points, 0.2, iterations=2, mask=labels).square()[:, :3].sum()
            )
        else:
            value = instembed.cosine_margin_loss(points, labels)
        return value.detach(), *torch.autograd.grad(value, points)

    return step, [points, labels]
