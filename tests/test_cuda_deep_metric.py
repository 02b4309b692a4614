"""The CUDA kernels of deep metric learning: see test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import instembed
from benchmarks.workloads import trained_embeddings
from instembed import reference
from tests.comparing import TOLERANCE, assert_close, there
from tests.layouts import LAYOUTS, labels_of_blocks

# The sampled pixels are the same on every device for the same random words, which devices draw differently:
# here they come from the CPU.


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.randint

    def draw_on_cpu(*arguments: object, device: object = None, **options: object) -> Tensor:
        return draw(*arguments, **options).to(device)

    monkeypatch.setattr(torch, "randint", draw_on_cpu)


# ---------------------------------------------------------------------------------------------------------
# Sampled pixels and their loss


def assert_same_sample(labels: Tensor, samples: int, device: str, **options: object) -> None:
    torch.manual_seed(1)
    ours = instembed.sample_pixels(there(labels, device), samples, max_instances=20, **there(options, device))
    torch.manual_seed(1)
    expected, valid = reference.sample_pixels(labels, samples, max_instances=20, **options)
    assert torch.equal(ours.indices.cpu(), expected) and torch.equal(ours.valid.cpu(), valid)


def test_sample(device: str, words: None) -> None:
    for shape in ((1, 1), (2, 1000), (2, 17, 29), (2, 3, 5, 7), (3, 0, 4), (0, 4, 5)):
        for samples in (1, 16, 200):
            assert_same_sample(labels_of_blocks(*shape), samples, device)
    labels = labels_of_blocks(2, 20, 30)
    huge = torch.tensor([0, 7, 26005, 2**62 + 1, -1, -(2**63)])[labels]
    for view in (huge, huge.transpose(1, 2), huge[:, ::2, 1::3], labels.to(torch.uint8)):
        assert_same_sample(view, 16, device, background=None, ignore_index=2)
    offsets = torch.tensor([0, 0, 10, 10, 300, 600])
    assert_same_sample(labels[0].flatten(), 16, device)
    assert_same_sample(labels[0].flatten(), 16, device, offsets=offsets)


def assert_same_loss(embeddings: Tensor, labels: Tensor, device: str, **options: object) -> None:
    leaf = there(embeddings.detach(), device).requires_grad_()
    exact = embeddings.detach().double().requires_grad_()
    torch.manual_seed(1)
    loss = instembed.pairwise_similarity_loss(
        leaf, there(labels, device), samples=7, reduction="none", **there(options, device)
    )
    torch.manual_seed(1)
    expected = reference.pairwise_similarity_loss(exact, labels, samples=7, reduction="none", **options)
    assert_close(loss.detach().cpu(), expected.detach(), 1e-11 if embeddings.dtype == torch.float64 else 5e-6)
    loss.sum().backward()
    expected.sum().backward()
    assert leaf.grad.dtype == embeddings.dtype
    assert_close(leaf.grad.cpu(), exact.grad, TOLERANCE[embeddings.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_types_and_layouts(device: str, words: None, dtype: torch.dtype, layout: str) -> None:
    embeddings = LAYOUTS[layout]((0.4 * torch.randn(2, 9, 20, 23)).to(dtype))
    assert_same_loss(embeddings, labels_of_blocks(2, *embeddings.shape[2:]), device)


def test_loss_of_other_shapes(device: str, words: None) -> None:
    for spatial in ((1,), (130,), (3, 5, 7)):
        assert_same_loss(0.5 * torch.randn(2, 3, *spatial), labels_of_blocks(2, *spatial), device)
    points, labels = 0.5 * torch.randn(200, 6), torch.randint(0, 9, (200,)) * 2**40
    assert_same_loss(points, labels, device)
    assert_same_loss(points, labels, device, offsets=torch.tensor([0, 0, 10, 10, 90, 200]))
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4)):
        assert_same_loss(torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64), device)


def test_too_many_instances(device: str) -> None:
    labels = torch.arange(1, 401).reshape(1, 20, 20).repeat(2, 1, 1)
    labels[1] = 5
    found = instembed.sample_pixels(there(labels, device), 4, max_instances=399)
    assert (found.indices[0] == -2).all() and not found.valid[0].any() and found.valid[1, 0].all()
    leaf = torch.randn(2, 3, 20, 20, device=device, requires_grad=True)
    loss = instembed.pairwise_similarity_loss(
        leaf, there(labels, device), max_instances=399, reduction="none"
    )
    assert loss[0].isnan() and loss[1].isfinite()
    assert instembed.sample_pixels(labels[1:].to(device), 4).indices.shape == (1, 64, 4)


def test_seediness_of_what_is_out_of_range(device: str) -> None:
    """The image's loss is NaN, and nothing is read out of bounds."""
    embeddings, labels = torch.randn(3, 4, 8, 9).to(device), torch.ones(3, 8, 9, dtype=torch.int64)
    logits = torch.randn(3, 4, 2, 8, 9, device=device, requires_grad=True)
    seeds = torch.tensor([[3, 72], [-2, 5], [-1, 71]])
    losses = instembed.seediness_loss(
        logits, embeddings, there(labels, device), seeds=seeds.to(device), reduction="none"
    )
    assert losses.isnan().tolist() == [True, True, False]
    labels[0] = torch.arange(72).reshape(8, 9)
    losses = instembed.seediness_loss(
        logits, embeddings, there(labels, device), max_instances=70, reduction="none"
    )
    assert losses.isnan().tolist() == [True, False, False]


def test_too_many_instances_checked(device: str, overflow_checks: None) -> None:
    with pytest.raises(ValueError, match="max_instances=9 "):
        instembed.sample_pixels(torch.arange(40).to(device), 4, max_instances=9)
    with pytest.raises(ValueError, match="offsets"):
        wrong = torch.tensor([0, 41], device=device)
        instembed.sample_pixels(torch.arange(40).to(device), 4, offsets=wrong)


# ---------------------------------------------------------------------------------------------------------
# Seeds


def scene(*size: int, channels: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels, and random seediness (B, 4, 3, *size)."""
    generator = torch.Generator().manual_seed(7)
    labels = labels_of_blocks(2, *size, ids=5)
    seediness = torch.randn(2, 4, 3, *size, generator=generator).softmax(2)
    return trained_embeddings(labels, channels, rough=len(size) == 2).to(dtype), labels, seediness


def assert_same_seeds(
    embeddings: Tensor, labels: Tensor, seediness: Tensor, device: str, **options: object
) -> None:
    """IoU of masks, choice of seeds, and what grows from them."""
    pixels = torch.randint(-1, labels[0].numel(), (len(labels), 20))
    given = there((embeddings, labels, pixels), device)
    iou = instembed.seed_mask_iou(*given, ignore_index=3)
    expected = reference.seed_mask_iou(embeddings, labels, pixels, ignore_index=3)
    assert torch.equal(iou.cpu(), expected.to(iou.dtype))
    found = instembed.grow_seeds(given[0], there(seediness, device), num_seeds=15, **there(options, device))
    expected = reference.grow_seeds(embeddings, seediness, num_seeds=15, **options)
    for name, value in found._asdict().items():
        torch.testing.assert_close(value.cpu(), getattr(expected, name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeds_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    embeddings, labels, seediness = scene(18, 21, dtype=dtype)
    change = LAYOUTS[layout]
    labels, scores = change(labels[:, None])[:, 0], change(seediness.flatten(1, 2)).unflatten(1, (4, 3))
    assert_same_seeds(change(embeddings), labels, scores, device, min_size=3)


def test_seeds_of_other_shapes(device: str) -> None:
    for size in ((1, 1), (40,), (5, 6, 7)):
        for channels in (1, 13):
            assert_same_seeds(*scene(*size, channels=channels), device, overlap=0.2)
    embeddings, labels, seediness = scene(16, 20)
    mask = torch.rand(labels.shape) < 0.7
    assert_same_seeds(embeddings, labels, seediness, device, mask=mask, diversity=0.0)
    assert_same_seeds(embeddings, labels, seediness, device, mask=labels.int(), min_seediness=0.5)
    embeddings[0, 2, 3, 4], embeddings[1, 1, 5, 6] = float("nan"), float("inf")
    seediness[1, 0, 1, :4] = float("nan")
    assert_same_seeds(embeddings, labels, seediness, device)
    nothing = torch.zeros_like(mask)
    assert_same_seeds(embeddings, labels, seediness, device, mask=nothing)


# ---------------------------------------------------------------------------------------------------------
# What only a GPU can show


@pytest.mark.cuda
def test_no_synchronisation_and_capture() -> None:
    """All of a training step and of inference runs without making the host wait, and replays as a graph."""
    if not instembed.cuda_available():
        pytest.skip("needs a GPU")
    embeddings, labels, seediness = (x.cuda() for x in scene(60, 80))
    leaf = embeddings.requires_grad_()
    classes = torch.ones_like(labels)

    def step() -> tuple[Tensor, ...]:
        loss = instembed.pairwise_similarity_loss(leaf, labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        learnt = instembed.seediness_loss(seediness, leaf, labels, classes=classes)
        return loss.detach(), gradient, learnt, *instembed.grow_seeds(leaf, seediness, min_size=9)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured[3:], step()[3:], strict=True):
        assert torch.equal(a, b)
    assert captured[0].isfinite() and captured[2].isfinite()
