"""The CUDA kernels of recurrent pixel embedding, on a GPU or on the simulated device (tests/test_cuda.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from instembed import reference
from tests.comparing import assert_close

LAYOUTS = {
    "planar": lambda maps: maps,
    "channels_last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "cropped": lambda maps: maps[:, :, 1:, 3:],
    "transposed": lambda maps: maps.transpose(2, 3),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def blobs(*shape: int, channels: int = 6, clusters: int = 4, noise: float = 0.08) -> Tensor:
    """(B, channels, *spatial) around directions, of any length."""
    centers = normalize(torch.randn(clusters, channels), dim=1)
    points = centers[torch.randint(clusters, shape)] + noise * torch.randn(*shape, channels)
    return (points * (0.5 + torch.rand(*shape, 1))).movedim(-1, 1)


def there(device: str, options: dict[str, object]) -> dict[str, object]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


# ---------------------------------------------------------------------------------------------------------
# Recurrent mean shift


def assert_same_shift(embeddings: Tensor, device: str, bandwidth: float = 0.3, **options: object) -> None:
    leaf = embeddings.detach().to(device).requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    options = {"iterations": 2, **options}
    shifted = instembed.recurrent_mean_shift(leaf, bandwidth, tolerance=0.0, **there(device, options))
    expected = reference.recurrent_mean_shift(exact, bandwidth, **options)
    weights = torch.randn_like(expected)
    (shifted.double() * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    tolerance = TOLERANCE[embeddings.dtype]
    assert_close(shifted.cpu(), expected, min(tolerance, 1e-5))
    assert leaf.grad.dtype == embeddings.dtype
    assert_close(leaf.grad.cpu(), exact.grad, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    assert_same_shift(LAYOUTS[layout](blobs(2, 9, 12).to(dtype)), device)


@pytest.mark.parametrize("channels", [1, 17, 65])
@pytest.mark.parametrize("spatial", [(1,), (65,), (3, 5, 7)], ids=str)
def test_shift_sizes(device: str, channels: int, spatial: tuple[int, ...]) -> None:
    assert_same_shift(blobs(1, *spatial, channels=channels), device, iterations=1)


@pytest.mark.parametrize("bandwidth", [0.1, 3.0])
@pytest.mark.parametrize("step", [0.0, 0.5, 1.5])
def test_shift_steps(device: str, bandwidth: float, step: float) -> None:
    assert_same_shift(blobs(1, 90), device, bandwidth, step=step)


def test_shift_masks_and_iterates(device: str) -> None:
    flags = torch.randint(0, 3, (2, 7, 11))
    for mask in (flags > 0, flags, -flags.to(torch.int8), flags.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same_shift(blobs(2, 7, 11), device, mask=mask, return_all=True)


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
    shifted = instembed.recurrent_mean_shift(points.to(device), 0.3).cpu()
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
    shifted = instembed.recurrent_mean_shift(embeddings.to(device), 0.3, iterations=1, tolerance=0.9).cpu()
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
