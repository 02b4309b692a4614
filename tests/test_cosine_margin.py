"""The cosine margin loss against its float64 definition, and everything autograd asks of an op."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import instembed
from instembed import reference
from tests.comparing import assert_close, assert_compiles
from tests.layouts import layouts

pytestmark = pytest.mark.usefixtures("each_device")

# Of losses and gradients, relative to the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def blobs(
    count: int, channels: int = 8, instances: int = 5, noise: float = 0.2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(count, channels) points of any length around a direction for each instance, and their labels."""
    centers = normalize(torch.randn(instances + 1, channels), dim=1)
    labels = torch.randint(0, instances + 1, (count,))
    points = centers[labels] + noise * torch.randn(count, channels)
    return (points * (0.5 + torch.rand(count, 1))).to(dtype), labels


def assert_matches_reference(embeddings: Tensor, labels: Tensor, **options: object) -> None:
    ours = embeddings.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    loss = instembed.cosine_margin_loss(ours, labels, **options)
    expected = reference.cosine_margin_loss(exact, labels, **options)
    assert loss.dtype == (torch.float64 if embeddings.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        assert torch.equal(instembed.cosine_margin_loss(embeddings, labels, **options), loss)
    loss.sum().backward()
    expected.sum().backward()
    tolerance = TOLERANCE[embeddings.dtype]
    assert_close(loss, expected, min(tolerance, 1e-5), least=1e-2)
    assert ours.grad.dtype == embeddings.dtype
    assert_close(ours.grad, exact.grad, tolerance, least=0.1 / max(labels.numel(), 1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("margin", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("squared", [False, True])
def test_types(dtype: torch.dtype, margin: float, squared: bool) -> None:
    for noise in (0.05, 0.5):
        points, labels = blobs(300, noise=noise, dtype=dtype)
        assert_matches_reference(points, labels, margin=margin, squared=squared)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 15, 16, 17, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_channels(channels: int, dtype: torch.dtype, squared: bool) -> None:
    assert_matches_reference(*blobs(150, channels, dtype=dtype), squared=squared)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 17, 63, 64, 65, 129, 255, 1000, 2500])
@pytest.mark.parametrize("squared", [False, True])
def test_sizes(count: int, squared: bool, two_threads: None) -> None:
    for noise in (0.02, 0.2, 2.0):
        assert_matches_reference(*blobs(count, noise=noise), squared=squared)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("margin", [0.4, 0.5, 0.7])
def test_skipped_and_joined_tiles(margin: float, squared: bool, two_threads: None) -> None:
    """Tight groups of points: most pairs of tiles are decided by their bounds."""
    for offset in (0.0, 1.0, 3.0):  # apart in part, to near each other
        points, labels = blobs(2000, 8, 12, 0.01, torch.float64)
        points[:, 0] += offset
        assert_matches_reference(points, labels, margin=margin, squared=squared)
        assert_matches_reference(points.float(), labels, margin=margin, squared=squared)


def test_instances_of_every_size(two_threads: None) -> None:
    points, _ = blobs(1500, dtype=torch.float64)
    for labels in (
        torch.arange(1500),  # a pixel each, without pixel 0
        torch.full((1500,), 7),  # one
        (torch.rand(1500) ** 6 * 40).long(),  # large and small
        torch.arange(1500).div(2, rounding_mode="floor") - 300,
    ):
        assert_matches_reference(points, labels)
        assert_matches_reference(points, labels, squared=True)


@pytest.mark.parametrize("shape", [(2, 5, 70), (2, 5, 7, 11), (3, 4, 3, 5, 7)], ids=str)
def test_images(shape: tuple[int, ...]) -> None:
    embeddings = torch.randn(shape, dtype=torch.float64)
    labels = torch.randint(-1, 4, (shape[0], *shape[2:]))
    labels[0] = 0  # an image without instances
    for reduction in ("mean", "sum", "none"):
        assert_matches_reference(embeddings, labels, reduction=reduction)
    losses = instembed.cosine_margin_loss(embeddings, labels, reduction="none")
    assert losses.shape == shape[:1] and losses[0] == 0 and (losses[1:] > 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32]
)
def test_label_types(dtype: torch.dtype) -> None:
    points, labels = blobs(200)
    assert torch.equal(
        instembed.cosine_margin_loss(points, labels.to(dtype)), instembed.cosine_margin_loss(points, labels)
    )


def test_huge_ids() -> None:
    points, labels = blobs(200)
    ids = torch.tensor([0, -(2**63), 2**63 - 1, 26_005, 2**24, -7])
    assert torch.equal(
        instembed.cosine_margin_loss(points, ids[labels]), instembed.cosine_margin_loss(points, labels)
    )


@pytest.mark.parametrize("background", [0, None, 3])
@pytest.mark.parametrize("ignore_index", [None, 2, 0])
def test_background_and_ignored(background: int | None, ignore_index: int | None) -> None:
    points, labels = blobs(200, dtype=torch.float64)
    assert_matches_reference(points, labels, background=background, ignore_index=ignore_index)
    points[labels == 3] = math.nan
    leaf = points.requires_grad_()
    loss = instembed.cosine_margin_loss(leaf, labels, background=3)
    loss.backward()
    assert loss.isfinite() and not leaf.grad[labels == 3].nan_to_num().any()


@pytest.mark.parametrize("name", layouts(8, 13, 17))
@pytest.mark.parametrize("unit", [False, True])
def test_layouts(name: str, unit: bool) -> None:
    embeddings = layouts(8, 13, 17)[name]  # taken as they are, the op sees the layout itself
    labels = torch.randint(0, 5, (2, 17, 13)).transpose(1, 2)
    leaf, exact = embeddings.detach().requires_grad_(), embeddings.detach().double().requires_grad_()
    instembed.cosine_margin_loss(leaf, labels, normalize=not unit).backward()
    reference.cosine_margin_loss(exact, labels, normalize=not unit).backward()
    assert_close(leaf.grad, exact.grad, 1e-5)
    if name == "channels_last":
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last)


def test_ragged_points_are_images_of_their_own() -> None:
    points, labels = blobs(400, dtype=torch.float64)
    offsets = torch.tensor([0, 150, 150, 151, 400], dtype=torch.int32)
    assert_matches_reference(points, labels, offsets=offsets, reduction="none")
    losses = instembed.cosine_margin_loss(points, labels, offsets=offsets, reduction="none")
    assert losses[3] == instembed.cosine_margin_loss(points[151:], labels[151:])


def test_many_small_images(two_threads: None) -> None:
    assert_matches_reference(torch.randn(9, 4, 6, 7), torch.randint(0, 3, (9, 6, 7)))


@pytest.mark.parametrize("scale", [0.1, 1.3, 100.0])
@pytest.mark.parametrize("margin", [0.2, 0.5, 0.8])
def test_vectors_as_they_are(scale: float, margin: float) -> None:
    """Without normalising, similarities are those of whatever lengths come."""
    points, labels = blobs(500, 4, noise=0.05, dtype=torch.float64)
    points[7] = 0
    for squared in (False, True):
        options = {"margin": margin, "squared": squared, "normalize": False}
        assert_matches_reference(scale * points, labels, **options)


def test_two_points_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert instembed.cosine_margin_loss(points, torch.tensor([1, 1])).item() == pytest.approx(0.5 * 0.2)
    # Each weighs 1/2: two ordered pairs at s = 0.8.
    different = torch.tensor([1, 2])
    assert instembed.cosine_margin_loss(points, different).item() == pytest.approx(0.5 * 0.3)
    assert instembed.cosine_margin_loss(points, different, squared=True).item() == pytest.approx(0.5 * 0.09)
    assert instembed.cosine_margin_loss(points, different, margin=0.9).item() == 0


def test_sum_over_instances_is_the_sum_over_pairs() -> None:
    """The part of one instance does not lose its digits where the instance is tight."""
    center = normalize(torch.randn(1, 16, dtype=torch.float64), dim=1)
    for noise in (1e-2, 1e-3):
        points = normalize(center + noise * torch.randn(200, 16, dtype=torch.float64), dim=1)
        loss = instembed.cosine_margin_loss(points.float(), torch.ones(200, dtype=torch.int64))
        expected = (1 - points @ points.T).mean() / 2
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_zero_vectors() -> None:
    points, labels = blobs(100, dtype=torch.float64)
    points[30:40] = 0
    for squared in (False, True):
        assert_matches_reference(points, labels, squared=squared, margin=0.4)
        assert_matches_reference(points.float(), labels, squared=squared)
    leaf = points.requires_grad_()
    instembed.cosine_margin_loss(leaf, labels).backward()
    assert not leaf.grad[30:40].any()
    nothing = torch.zeros(4, 3, requires_grad=True)
    loss = instembed.cosine_margin_loss(nothing, torch.tensor([1, 1, 2, 2]), margin=0.25)
    assert loss.item() == pytest.approx(0.5 * 0.5 + 0.5 * 0.25)  # 1 - s and s - margin at s = 1/2
    loss.backward()
    assert not nothing.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalized", [True, False])
def test_bad_points_show(value: float, normalized: bool) -> None:
    embeddings = normalize(torch.randn(2, 4, 50), dim=1)
    labels = torch.arange(50).remainder(5).expand(2, 50)
    embeddings[0, 2, 7] = value
    leaf = embeddings.requires_grad_()
    losses = instembed.cosine_margin_loss(leaf, labels, reduction="none", normalize=normalized)
    assert losses[0].isnan() and losses[1].isfinite()
    losses.sum().backward()
    assert leaf.grad[1].isfinite().all() and leaf.grad[0].isnan().any()


def test_too_long_points_show() -> None:
    points = torch.tensor([[3e9, 0.0], [0.0, 1.0]])
    assert instembed.cosine_margin_loss(points, torch.tensor([1, 2]), normalize=False).isnan()
    assert instembed.cosine_margin_loss(points, torch.tensor([1, 2])).item() == 0


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e18, 3e38])
def test_any_length(scale: float) -> None:
    points, labels = blobs(100)
    points = normalize(points, dim=1)
    leaf = (scale * points).requires_grad_()
    loss = instembed.cosine_margin_loss(leaf, labels)
    torch.testing.assert_close(loss, instembed.cosine_margin_loss(points, labels))
    loss.backward()
    assert leaf.grad.isfinite().all()


def test_identical_and_antipodal_points() -> None:
    point = torch.randn(1, 6, dtype=torch.float64)
    labels = torch.arange(100).remainder(4)
    assert_matches_reference(point.expand(100, 6), labels)
    assert_matches_reference(torch.cat([point, -point]).repeat(50, 1), labels)
    one = instembed.cosine_margin_loss(point.expand(100, 6), torch.ones_like(labels))
    assert 0 <= one < 1e-15


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0, 5)], ids=str)
def test_no_points(shape: tuple[int, ...]) -> None:
    embeddings = torch.zeros(shape, requires_grad=True)
    labels = torch.ones(shape[:1] if len(shape) == 2 else (shape[0], *shape[2:]), dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        loss = instembed.cosine_margin_loss(embeddings, labels, reduction=reduction, samples=0.5)
        assert not loss.any()
        (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
        assert gradient.shape == shape


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("samples", [0.35, 1.0, 1e-9, 1, 40, 10**6, (0.35, 40), (0.35, 4000)], ids=str)
def test_samples(samples: object, each_device: str) -> None:
    embeddings = torch.randn(2, 5, 14, 15, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 14, 15))
    options = {"samples": samples, "reduction": "none", "ignore_index": 2}
    loss = instembed.cosine_margin_loss(
        embeddings, labels, generator=torch.Generator(each_device).manual_seed(3), **options
    )
    expected = reference.cosine_margin_loss(
        embeddings, labels, generator=torch.Generator(each_device).manual_seed(3), **options
    )
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
    (exact,) = torch.autograd.grad(expected.sum(), embeddings)
    torch.testing.assert_close(gradient, exact)
    share, most = samples if isinstance(samples, tuple) else (samples, samples)
    for image in range(2):
        candidates = int(((labels[image] != 0) & (labels[image] != 2)).sum())
        count = candidates if isinstance(share, int) else math.ceil(share * candidates)
        count = count if isinstance(most, float) else min(count, most)
        drawn = (gradient[image] != 0).any(0)
        assert int(drawn.sum()) == count or count == 1  # alone, a pixel has no gradient
        assert not (drawn & ((labels[image] == 0) | (labels[image] == 2))).any()


def test_samples_are_drawn_anew() -> None:
    points, labels = blobs(500)
    first, second = (instembed.cosine_margin_loss(points, labels, samples=100) for _ in range(2))
    assert first != second
    torch.manual_seed(5)
    first = instembed.cosine_margin_loss(points, labels, samples=100)
    torch.manual_seed(5)
    assert instembed.cosine_margin_loss(points, labels, samples=100) == first
    assert instembed.cosine_margin_loss(points, labels, samples=500) == instembed.cosine_margin_loss(
        points, labels
    )


# ------------------------------------------------------------------------------------------------ autograd


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [False, True])
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype, squared: bool) -> None:
    points, labels = blobs(5000, noise=0.3, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf = points.clone().requires_grad_()
            loss = instembed.cosine_margin_loss(leaf, labels, squared=squared)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("options", [{}, {"squared": True}, {"normalize": False}], ids=str)
def test_gradcheck(options: dict) -> None:
    points, labels = blobs(20, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: instembed.cosine_margin_loss(p, labels, margin=0.45, **options), points.requires_grad_()
    )
    assert torch.autograd.gradgradcheck(
        lambda p: reference.cosine_margin_loss(p, labels, margin=0.45, **options), points
    )


def test_differentiable_once() -> None:
    points, labels = blobs(50)
    points.requires_grad_()
    (gradient,) = torch.autograd.grad(instembed.cosine_margin_loss(points, labels), points, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference.cosine_margin_loss"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"squared": True}, {"samples": 1.0}], ids=str)
def test_compile_fullgraph(options: dict) -> None:
    labels = torch.randint(0, 4, (2, 6, 7))
    assert_compiles(lambda e: instembed.cosine_margin_loss(e * 2, labels, **options), torch.randn(2, 5, 6, 7))


def test_autocast(each_device: str) -> None:
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    with torch.autocast(each_device, dtype=torch.bfloat16):
        embeddings = conv(torch.randn(2, 3, 13, 17))
        loss = instembed.cosine_margin_loss(embeddings, torch.randint(0, 5, (2, 13, 17)))
    assert embeddings.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


def test_a_loss_on_each_iterate() -> None:
    """The paper's training: the same gradient as the reference through the whole recurrence."""
    embeddings = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 9, 10))
    gradients = []
    for module in (instembed, reference):
        leaf = embeddings.clone().requires_grad_()
        iterates = module.recurrent_mean_shift(leaf, 0.5, iterations=3, tolerance=0.0, return_all=True)
        losses = [module.cosine_margin_loss(points, labels, normalize=False) for points in iterates]
        torch.stack(losses).sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[0], gradients[1], 1e-10)


def test_descent_separates_instances() -> None:
    labels = torch.arange(200).remainder(4) + 1
    points = torch.randn(200, 8, requires_grad=True)
    optimizer = torch.optim.Adam([points], lr=0.05)
    for _ in range(150):
        loss = instembed.cosine_margin_loss(points, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unit = normalize(points.detach(), dim=1)
    similarity, same = unit @ unit.T, labels[:, None] == labels
    assert similarity[same].min() > 0.9 and similarity[~same].max() < 0.2


def test_module(each_device: str) -> None:
    options = {"margin": 0.3, "samples": (0.5, 20), "squared": True}
    criterion = instembed.CosineMarginLoss(**options)
    embeddings, labels = torch.randn(2, 5, 6, 7), torch.randint(0, 4, (2, 6, 7))
    expected = instembed.cosine_margin_loss(
        embeddings, labels, generator=torch.Generator(each_device).manual_seed(1), **options
    )
    assert torch.equal(
        criterion(embeddings, labels, generator=torch.Generator(each_device).manual_seed(1)), expected
    )
    plain = instembed.CosineMarginLoss(margin=0.3)
    for module in (plain, copy.deepcopy(plain), torch.nn.Sequential(plain)[0]):
        assert module(embeddings, labels) == instembed.cosine_margin_loss(embeddings, labels, margin=0.3)
    assert "margin=0.3" in repr(plain) and not list(plain.parameters()) and not plain.state_dict()
    with pytest.raises(ValueError, match="margin"):
        instembed.CosineMarginLoss(margin=-1)


def test_memory_is_linear() -> None:
    """The matrix of 60,000 points would take 14 GB."""
    points, labels = blobs(60_000, 4, 40, 0.01)
    leaf = points.requires_grad_()
    instembed.cosine_margin_loss(leaf, labels).backward()
    assert leaf.grad.isfinite().all()


def test_inputs_are_left_alone() -> None:
    points, labels = blobs(50)
    before = points.clone(), labels.clone()
    instembed.cosine_margin_loss(points.requires_grad_(), labels, samples=0.5).backward()
    assert torch.equal(points.detach(), before[0]) and torch.equal(labels, before[1])
