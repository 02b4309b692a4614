"""Masks of seeds, their IoU with instances, and the loss and head that learn from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import instembed
from benchmarks.workloads import ellipses, trained_embeddings
from instembed import reference
from tests.comparing import assert_close, assert_compiles, on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def scene(
    height: int = 37, width: int = 53, channels: int = 6, images: int = 2, kind: str = "trained"
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.stack([ellipses((height, width), 6, generator) for _ in range(images)])
    if kind == "noise":
        return 0.5 * torch.randn(images, channels, height, width, generator=generator), labels
    return trained_embeddings(labels, channels, rough=kind == "rough"), labels


def some_seeds(labels: Tensor, count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-1, labels[0].numel(), (len(labels), count), generator=generator)


def check(embeddings: Tensor, labels: Tensor, seeds: Tensor, *thresholds: float, **options: object) -> Tensor:
    values = thresholds or (0.25, 0.5, 0.75, 0.9)
    found = instembed.seed_mask_iou(embeddings, labels, seeds, values, **options)
    expected = reference.seed_mask_iou(*on_cpu((embeddings, labels, seeds)), values, **options)
    assert torch.equal(found.cpu(), expected.to(found.dtype))
    return found


@pytest.mark.parametrize("kind", ["trained", "rough", "noise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iou_equals_the_definition(dtype: torch.dtype, kind: str) -> None:
    for channels in (1, 3, 8, 17, 64):
        embeddings, labels = scene(channels=channels, kind=kind)
        for scale in (0.2, 1.0):
            found = check((scale * embeddings).to(dtype), labels, some_seeds(labels))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "shape", [(1,), (17,), (1000,), (1, 1), (31, 33), (64, 64), (7, 300), (3, 5, 9), (16, 16, 16)]
)
def test_iou_sizes_and_layouts(shape: tuple[int, ...]) -> None:
    labels = torch.randint(0, 4, (2, *shape)).sort(-1).values
    embeddings = labels[:, None] + 0.3 * torch.randn(2, 5, *shape)
    seeds = some_seeds(labels, 13)
    found = check(embeddings, labels, seeds)
    last = embeddings.movedim(1, -1).contiguous().movedim(-1, 1)  # channels-last, for every rank
    gaps = torch.stack([embeddings, embeddings], -1).flatten(-2)[..., ::2]
    for other in (last, gaps):
        assert torch.equal(instembed.seed_mask_iou(other, labels, seeds), found)
    strided = torch.stack([labels, labels], -1).flatten(-2)[..., ::2]
    assert torch.equal(instembed.seed_mask_iou(embeddings, strided, seeds), found)


def test_iou_labels_of_any_kind() -> None:
    embeddings, labels = scene()
    seeds = some_seeds(labels)
    expected = check(embeddings, labels, seeds)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(check(embeddings, labels.to(dtype), seeds), expected)
    huge = torch.where(labels > 0, labels * (2**62 // 7) * (1 - 2 * (labels % 2)), 0)
    assert torch.equal(check(embeddings, huge, seeds), expected)
    for background, ignore in ((None, None), (2, None), (0, 3), (None, 0), (3, 3)):
        check(embeddings, labels, seeds, background=background, ignore_index=ignore)
    noise = torch.randint(0, 50, labels.shape)  # runs of one pixel
    check(embeddings, noise, seeds, ignore_index=5)


def test_iou_of_one_instance_by_hand() -> None:
    d2 = math.log(3)  # the distance at which the similarity is 1/2
    embeddings = torch.tensor([[[0.0, 0.0, math.sqrt(d2) * 0.99, math.sqrt(d2) * 1.01, 9.0, math.nan]]])
    labels = torch.tensor([[1, 1, 1, 0, 1, 0]])
    seeds = torch.tensor([[0, 3, 4, -1]])
    found = check(embeddings, labels, seeds, 0.5, 1.0)
    torch.testing.assert_close(found[0], torch.tensor([[3 / 4, 2 / 4], [0, 0], [1 / 4, 1 / 4], [0, 0]]))


def test_iou_at_ties_with_the_radius() -> None:
    """On a grid, many distances are the radius but for their last bits."""
    for threshold in (0.25, 0.5, 0.9, 1.0, 1e-6):
        radius = math.sqrt(reference.seediness.squared_radius(threshold)) or 1.0
        for dtype in (torch.float32, torch.float64):
            steps = torch.randint(-1, 2, (2, 3, 20, 20)).to(dtype)
            labels = torch.randint(1, 3, (2, 20, 20))
            check(radius * steps, labels, some_seeds(labels), threshold)
            check(1e4 + radius * steps, labels, some_seeds(labels), threshold)


def test_iou_of_not_finite_and_extreme_embeddings() -> None:
    labels = torch.randint(1, 4, (1, 30, 30))
    for dtype in DTYPES:
        largest = torch.finfo(dtype).max
        for values in ((math.nan, math.inf, -math.inf), (largest, -largest, 0.0), (1e-30, 1e-20, 0.0)):
            embeddings = 0.2 * torch.randn(1, 4, 30, 30)
            bad = torch.rand(embeddings.shape) < 0.1
            embeddings = embeddings.to(dtype)
            embeddings[bad] = torch.tensor(values, dtype=dtype)[torch.randint(0, 3, (int(bad.sum()),))]
            check(embeddings, labels, some_seeds(labels), 0.3, 1.0)


def test_iou_of_nothing() -> None:
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 0)):
        empty = torch.zeros(shape)
        labels = torch.zeros(empty[:, 0].shape, dtype=torch.int64)
        seeds = torch.full((shape[0], 4), -1)
        assert not check(empty, labels, seeds).any()
    embeddings, labels = scene()
    assert check(embeddings, labels, some_seeds(labels, 0)).shape == (2, 0, 4)
    assert not check(embeddings, 0 * labels, some_seeds(labels)).any()
    assert not check(embeddings, 0 * labels + 255, some_seeds(labels), ignore_index=255).any()
    one = check(embeddings, 0 * labels + 9, some_seeds(labels))
    assert one.any()


def test_iou_with_more_seeds_than_pixels() -> None:
    embeddings, labels = scene(5, 7)
    check(embeddings, labels, some_seeds(labels, 200))


@pytest.mark.cpu_only
def test_iou_same_bits_whatever_the_threads(two_threads: None) -> None:
    for kind in ("rough", "noise"):
        embeddings, labels = scene(150, 201, 24, kind=kind)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(instembed.seed_mask_iou(embeddings, labels, some_seeds(labels)))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# The loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_equals_the_definition(dtype: torch.dtype, reduction: str) -> None:
    embeddings, labels = scene(kind="rough")
    seeds = some_seeds(labels)
    classes = labels % 3 + 1
    for options in ({}, {"classes": classes, "ignore_index": 2}, {"iou": 0.9, "background": None}):
        logits = torch.randn(2, 4, 4, 37, 53).to(dtype).requires_grad_()
        exact = logits.detach().cpu().double().requires_grad_()
        options = {"seeds": seeds, "reduction": reduction, **options}
        loss = instembed.seediness_loss(logits, embeddings, labels, **options)
        expected = reference.seediness_loss(exact, *on_cpu((embeddings, labels)), **on_cpu(options))
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(loss, expected, 1e-12 if dtype == torch.float64 else 1e-6)
        loss.sum().backward()
        expected.sum().backward()
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
        assert_close(logits.grad, exact.grad, tolerance)


def test_loss_by_hand() -> None:
    labels = torch.tensor([[5, 5, 0]])
    embeddings = torch.tensor([[[0.0, 0.0, 9.0]]])
    logits = torch.zeros(1, 1, 3, 3)
    logits[0, 0, 2, 0] = 2.0  # the first pixel is surely of class 2
    options = {"thresholds": (0.5,), "seeds": torch.tensor([[0, 2, -1]]), "reduction": "none"}
    loss = instembed.seediness_loss(logits, embeddings, labels, classes=torch.tensor([[2, 2, 0]]), **options)
    expected = (-math.log(math.exp(2) / (math.exp(2) + 2)) + math.log(3)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_loss_without_seeds_is_zero_and_attached() -> None:
    embeddings, labels = scene()
    for seeds in (torch.full((2, 3), -1), torch.zeros(2, 0, dtype=torch.int64)):
        logits = torch.randn(2, 4, 2, 37, 53, requires_grad=True)
        loss = instembed.seediness_loss(logits, embeddings, labels, seeds=seeds)
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()
    logits = torch.randn(2, 4, 2, 37, 53)
    ignored = instembed.seediness_loss(
        logits, embeddings, 0 * labels + 7, seeds=some_seeds(labels), ignore_index=7
    )
    assert ignored.item() == 0
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5)):
        logits = torch.zeros(shape[0], 4, 2, *shape[2:], requires_grad=True)
        seeds = torch.full((shape[0], 2), -1)
        loss = instembed.seediness_loss(
            logits, torch.zeros(shape), torch.zeros(shape[0], *shape[2:]).long(), seeds=seeds
        )
        loss.backward()
        assert loss.item() == 0


def test_loss_draws_its_seeds() -> None:
    embeddings, labels = scene(kind="rough")
    logits = torch.randn(2, 4, 2, 37, 53)
    seeded = torch.Generator(logits.device).manual_seed
    for options in ({}, {"ignore_index": 2}, {"background": 3}, {"background": None}, {"ignore_index": 0}):
        loss = instembed.seediness_loss(
            logits, embeddings, labels, samples=5, background_samples=70, generator=seeded(2), **options
        )
        generator = seeded(2)
        seeds = instembed.sample_pixels(labels, 5, generator=generator, **options).indices.flatten(1)
        background = options.get("background", 0)
        if background is not None and background != options.get("ignore_index"):
            flags = labels == background
            drawn = instembed.sample_pixels(flags.int(), 70, generator=generator, max_instances=1)
            drawn = drawn.indices.flatten(1)
            found = flags.flatten(1).gather(1, drawn.clamp(min=0))[drawn >= 0]
            assert drawn.shape[1] == 70 and found.all() and len(found) > 70
            seeds = torch.cat([seeds, drawn], 1)
        expected = instembed.seediness_loss(logits, embeddings, labels, seeds=seeds, **options)
        torch.testing.assert_close(loss, expected)
    only = instembed.seediness_loss(
        logits, embeddings, labels, samples=5, background_samples=0, max_instances=9, generator=seeded(2)
    )
    seeds = instembed.sample_pixels(labels, 5, max_instances=9, generator=seeded(2)).indices.flatten(1)
    assert torch.equal(only, instembed.seediness_loss(logits, embeddings, labels, seeds=seeds))
    assert instembed.seediness_loss(logits, embeddings, 0 * labels, background_samples=0).item() == 0


@pytest.mark.parametrize("capacity", [None, 9])
def test_loss_with_drawn_seeds_compiles(capacity: int | None) -> None:
    embeddings, labels = scene(9, 11)

    def step(logits: Tensor) -> Tensor:
        return instembed.seediness_loss(2 * logits, embeddings, labels, samples=3, max_instances=capacity)

    assert_compiles(step, torch.randn(2, 4, 2, 9, 11))


def test_loss_gradcheck() -> None:
    embeddings, labels = scene(3, 4, 2)
    seeds = some_seeds(labels, 6)
    logits = torch.randn(2, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(values: Tensor) -> Tensor:
        return instembed.seediness_loss(
            values, embeddings, labels, seeds=seeds, thresholds=(0.5, 0.9), reduction="none"
        )

    torch.autograd.gradcheck(loss, logits)
    torch.autograd.gradgradcheck(loss, logits)


def test_loss_gives_embeddings_no_gradient() -> None:
    embeddings, labels = scene()
    embeddings.requires_grad_()
    logits = torch.randn(2, 4, 2, 37, 53, requires_grad=True)
    instembed.seediness_loss(logits, embeddings, labels, seeds=some_seeds(labels)).backward()
    assert embeddings.grad is None and logits.grad.any()


@pytest.mark.parametrize("classes", [False, True])
def test_loss_compiles(classes: bool) -> None:
    embeddings, labels = scene(9, 11)
    seeds, of_pixels = some_seeds(labels), labels.clamp(min=1) % 2 + 1

    def step(logits: Tensor) -> Tensor:
        options = {"classes": of_pixels} if classes else {}
        return instembed.seediness_loss(2 * logits, embeddings, labels, seeds=seeds, **options)

    assert_compiles(step, torch.randn(2, 4, 3, 9, 11))


def test_head_learns_which_pixels_grow_into_instances() -> None:
    """At the end, seediness is high where a mask is an instance, and low on the background."""
    embeddings, labels = scene(channels=8)
    head = instembed.SeedinessHead(8).to(embeddings.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    seeds = torch.randint(0, labels[0].numel(), (2, 500))
    for _ in range(80):
        loss = instembed.seediness_loss(head(embeddings), embeddings, labels, seeds=seeds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seediness = head(embeddings).softmax(2)[:, :, 1].amax(1)
    assert seediness[labels == 0].mean() < 0.2 and seediness[labels != 0].mean() > 0.8


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_head_shapes(dims: int, each_device: str) -> None:
    spatial = (5, 6, 7)[:dims]
    head = instembed.SeedinessHead(3, 4, thresholds=(0.5, 0.9), dims=dims).to(each_device)
    assert head(torch.randn(2, 3, *spatial)).shape == (2, 2, 5, *spatial)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "names"),
    [
        ((0,), {}, ValueError, "channels"),
        ((3, 0), {}, ValueError, "num_classes"),
        ((3, 1.0), {}, TypeError, "num_classes"),
        ((3,), {"dims": 4}, ValueError, "dims"),
        ((3,), {"thresholds": (2.0,)}, ValueError, "thresholds"),
    ],
)
def test_head_refuses(arguments: tuple, options: dict, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        instembed.SeedinessHead(*arguments, **options)


def test_weight_ramps() -> None:
    assert [instembed.seediness_weight(step, 4) for step in (0, 1, 2, 4, 9)] == [0, 0.05, 0.1, 0.2, 0.2]
    assert instembed.seediness_weight(0, 0, final=0.5) == 0.5
    with pytest.raises(ValueError, match=r"steps .* -1"):
        instembed.seediness_weight(0, -1)
