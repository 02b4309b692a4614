"""The discriminative loss against its float64 reference, and everything autograd asks of an op."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import instembed
from instembed import reference
from tests.comparing import assert_close, assert_compiles, on_cpu
from tests.layouts import layouts

pytestmark = pytest.mark.usefixtures("each_device")

# Relative to the largest value, which is how errors of sums behave.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

OPTIONS = [
    {},
    {"norm": 1},
    {"variance": "pixel"},
    {"background_push": 0.7},
    {"background_push": 0.7, "norm": 1, "delta_dist": 3.0},
    {"background": None},
    {"background": 3, "ignore_index": 0},
    {"ignore_index": 2, "background_push": 1.0},
    {"delta_var": 1e-9, "delta_dist": 1e-9},
    {"alpha": 2.0, "beta": 0.5, "gamma": 0.1, "delta_var": 0.1, "delta_dist": 4.0},
]


def blocks(shape: tuple[int, ...], instances: int, size: int = 5) -> Tensor:
    """Labels with runs of `size` pixels along every axis."""
    coarse = torch.randint(0, instances + 1, [-(-n // size) for n in shape])
    for axis in range(len(shape)):
        coarse = coarse.repeat_interleave(size, axis)
    return coarse[tuple(slice(n) for n in shape)]


def batch_of_blocks(batch: int, shape: tuple[int, ...], instances: int, size: int = 5) -> Tensor:
    return torch.stack([blocks(shape, instances, size) for _ in range(batch)])


def assert_matches_reference(
    embeddings: Tensor, labels: Tensor, max_instances: int | None = None, **options: object
) -> None:
    ours = embeddings.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    exact = embeddings.detach().cpu().double().requires_grad_()
    loss = instembed.discriminative_loss(
        ours, labels, reduction="none", max_instances=max_instances, **options
    )
    expected = reference.discriminative_loss(exact, labels.cpu(), reduction="none", **on_cpu(options))
    assert loss.shape == expected.shape
    weights = torch.randn_like(expected)
    (loss.double() * weights.to(loss.device)).sum().backward()
    (expected * weights).sum().backward()
    assert_close(loss.cpu(), expected, 1e-12 if embeddings.dtype == torch.float64 else 3e-6)
    assert ours.grad is not None and ours.grad.dtype == embeddings.dtype
    assert_close(ours.grad.cpu(), exact.grad, TOLERANCE[embeddings.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 8, 16, 21])
def test_types_and_channels(dtype: torch.dtype, channels: int) -> None:
    embeddings = torch.randn(2, channels, 37, 43).to(dtype)
    assert_matches_reference(embeddings, batch_of_blocks(2, (37, 43), 4), background_push=0.5)
    assert_matches_reference(embeddings, torch.randint(0, 9, (2, 37, 43)), background_push=0.5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 7])
def test_options(options: dict, size: int) -> None:
    embeddings = torch.randn(3, 5, 33, 65)
    assert_matches_reference(embeddings, batch_of_blocks(3, (33, 65), 5, size), **options)


@pytest.mark.parametrize(
    "spatial", [(1,), (1025,), (1, 1), (17, 1), (63, 65), (128, 128), (3, 5, 7), (16, 16, 16)]
)
def test_spatial_sizes(spatial: tuple[int, ...]) -> None:
    embeddings = torch.randn(2, 4, *spatial)
    assert_matches_reference(embeddings, batch_of_blocks(2, spatial, 3), background=None)
    assert_matches_reference(embeddings, batch_of_blocks(2, spatial, 3, size=20))


def test_large_image_uses_several_bands(two_threads: None) -> None:
    embeddings = torch.randn(1, 6, 300, 301)
    assert_matches_reference(embeddings, batch_of_blocks(1, (300, 301), 30, size=13))
    assert_matches_reference(embeddings, torch.randint(0, 50, (1, 300, 301)))


@pytest.mark.parametrize("name", layouts(6, 34, 38))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_layouts(name: str, dtype: torch.dtype) -> None:
    embeddings = layouts(6, 34, 38)[name]
    embeddings = embeddings if dtype == torch.float32 else embeddings.to(dtype)
    for size in (1, 6):
        labels = batch_of_blocks(2, (34, 38), 4, size)
        leaf = embeddings.detach().requires_grad_()
        exact = embeddings.detach().cpu().double().contiguous().requires_grad_()
        instembed.discriminative_loss(leaf, labels, background_push=1.0).backward()
        reference.discriminative_loss(exact, labels.cpu(), background_push=1.0).backward()
        assert_close(leaf.grad.cpu(), exact.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    embeddings = torch.randn(2, 16, 20, 24).contiguous(memory_format=memory_format).requires_grad_()
    instembed.discriminative_loss(embeddings, batch_of_blocks(2, (20, 24), 3)).backward()
    assert embeddings.grad.is_contiguous(memory_format=memory_format)


def test_channels_last_3d() -> None:
    embeddings = torch.randn(2, 8, 6, 10, 12).contiguous(memory_format=torch.channels_last_3d)
    assert_matches_reference(embeddings, batch_of_blocks(2, (6, 10, 12), 4))


def test_noncontiguous_labels() -> None:
    embeddings = torch.randn(2, 4, 30, 40)
    labels = batch_of_blocks(2, (60, 40), 4)[:, ::2]
    assert_matches_reference(embeddings, labels)
    assert_matches_reference(embeddings, batch_of_blocks(2, (40, 30), 4).transpose(1, 2))
    assert_matches_reference(embeddings, blocks((30, 40), 4).expand(2, 30, 40))


@pytest.mark.parametrize("dtype", instembed._arguments.INTEGER, ids=str)
def test_label_types(dtype: torch.dtype) -> None:
    labels = batch_of_blocks(2, (30, 31), 5)
    embeddings = torch.randn(2, 4, 30, 31)
    ours = instembed.discriminative_loss(embeddings, labels.to(dtype), ignore_index=2)
    torch.testing.assert_close(ours, instembed.discriminative_loss(embeddings, labels, ignore_index=2))


def test_arbitrary_ids() -> None:
    ids = torch.tensor([0, 2**62, -(2**63), 2**63 - 1, 26005, -7, 2**24 - 1, 2**32])
    labels = ids[batch_of_blocks(2, (40, 45), 7)]
    assert_matches_reference(torch.randn(2, 4, 40, 45), labels)
    assert_matches_reference(torch.randn(2, 4, 40, 45), labels, background=-(2**63), ignore_index=2**62)


def test_ids_that_collide_in_their_low_bits() -> None:
    labels = torch.arange(1000).reshape(1, 20, 50) * 2**40
    assert_matches_reference(torch.randn(1, 4, 20, 50), labels, background=None, max_instances=1000)


def test_ids_are_per_image() -> None:
    embeddings = torch.randn(3, 4, 20, 20)
    labels = batch_of_blocks(3, (20, 20), 3)
    shifted = torch.where(labels > 0, labels + torch.tensor([0, 10, 2**40]).view(3, 1, 1), 0)
    assert torch.equal(
        instembed.discriminative_loss(embeddings, labels), instembed.discriminative_loss(embeddings, shifted)
    )


@pytest.mark.parametrize("instances", [300, 1500, 40000, 70000])
def test_many_instances(instances: int) -> None:
    """More than the saved state has room for: the backward pass finds them again."""
    embeddings = torch.randn(1, 2, 280, 300)
    labels = torch.randint(1, instances + 1, (1, 280, 300))
    # The distance term of the reference needs instances^2 memory, so the others stand for it there.
    if instances <= 1500:
        return assert_matches_reference(embeddings, labels, max_instances=instances)
    leaf = embeddings.clone().requires_grad_()
    variance, _, regularization = instembed.discriminative_terms(leaf, labels, max_instances=instances)
    (variance + regularization).sum().backward()
    inverse = torch.unique(labels.cpu(), return_inverse=True)[1].flatten()
    exact = embeddings.cpu().double().requires_grad_()
    points = exact.flatten(2)[0].t()
    counts = torch.bincount(inverse)
    sums = exact.new_zeros(len(counts), 2).index_add(0, inverse, points)
    means = sums / counts[:, None]
    square = (points - means[inverse]).square().sum(1)
    hinge = torch.where(square == 0, 0.0, (square + (square == 0)).sqrt() - 0.5).clamp(min=0).square()
    expected = (hinge / counts[inverse]).sum() / len(counts)
    (expected + means.norm(dim=1).mean()).backward()
    torch.testing.assert_close(variance[0].cpu().double(), expected, rtol=1e-5, atol=0)
    assert_close(leaf.grad.cpu(), exact.grad, 1e-5)


def test_points_with_offsets() -> None:
    embeddings = torch.randn(1500, 5)
    labels = torch.randint(0, 9, (1500,))
    offsets = torch.tensor([0, 0, 10, 10, 700, 1500])
    assert_matches_reference(embeddings, labels, offsets=offsets)
    assert_matches_reference(embeddings, labels)
    assert_matches_reference(embeddings, labels.sort().values, offsets=offsets.int(), background_push=1.0)
    losses = instembed.discriminative_loss(embeddings, labels, offsets=offsets, reduction="none")
    assert losses.shape == (5,) and losses[0] == 0 and losses[2] == 0
    alone = instembed.discriminative_loss(embeddings[10:700], labels[10:700])
    torch.testing.assert_close(losses[3], alone, rtol=1e-6, atol=0)


def test_points_from_a_wider_array() -> None:
    assert_matches_reference(torch.randn(700, 9)[:, 1:6], torch.randint(0, 5, (700,)))
    assert_matches_reference(torch.randn(5, 700).t(), torch.randint(0, 5, (700,)))


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4), (0, 3), (5, 3)],
    ids=["batch", "pixels", "background", "no points", "points"],
)
def test_nothing_to_do_is_zero(shape: tuple[int, ...]) -> None:
    embeddings = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:1] if len(shape) == 2 else shape[:1] + shape[2:], dtype=torch.int64)
    for reduction in ("mean", "sum"):
        loss = instembed.discriminative_loss(embeddings, labels, background_push=1.0, reduction=reduction)
        assert loss.item() == 0 and loss.requires_grad
        (gradient,) = torch.autograd.grad(loss, embeddings)
        assert gradient.shape == shape and not gradient.any()


def test_everything_ignored() -> None:
    embeddings = torch.randn(2, 3, 8, 8, requires_grad=True)
    labels = torch.full((2, 8, 8), 255)
    loss = instembed.discriminative_loss(embeddings, labels, ignore_index=255, background_push=1.0)
    loss.backward()
    assert loss.item() == 0 and not embeddings.grad.any()


def test_one_instance_has_no_distance() -> None:
    terms = instembed.discriminative_terms(torch.randn(2, 4, 9, 9), torch.ones(2, 9, 9, dtype=torch.uint8))
    assert (terms.distance == 0).all() and (terms.variance > 0).all() and (terms.regularization > 0).all()


def test_terms_by_hand() -> None:
    """Two instances on a line: means 0 and 2, pixels 1 from their means."""
    embeddings = torch.tensor([[[-1.0, 1.0, 1.0, 3.0, 50.0]]])
    labels = torch.tensor([[7, 7, 9, 9, 0]])
    variance, distance, regularization = instembed.discriminative_terms(embeddings, labels)
    assert variance.item() == pytest.approx(0.25)  # (1 - 0.5)^2
    assert distance.item() == pytest.approx(1.0)  # (3 - 2)^2
    assert regularization.item() == pytest.approx(1.0)  # (0 + 2) / 2
    loss = instembed.discriminative_loss(embeddings, labels, alpha=1, beta=10, gamma=100)
    assert loss.item() == pytest.approx(0.25 + 10 + 100)


def test_pixel_variance_weighs_pixels() -> None:
    embeddings = torch.tensor([[[-1.0, 1.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]]])
    labels = torch.tensor([[1, 1, 2, 2, 2, 2, 2, 2]])
    assert instembed.discriminative_terms(embeddings, labels).variance.item() == pytest.approx(0.125)
    pooled = instembed.discriminative_terms(embeddings, labels, variance="pixel")
    assert pooled.variance.item() == pytest.approx(0.0625)


def test_identical_embeddings_have_finite_gradients() -> None:
    embeddings = torch.zeros(1, 4, 8, 8, requires_grad=True)
    instembed.discriminative_loss(embeddings, blocks((8, 8), 3)[None], background_push=1.0).backward()
    assert embeddings.grad.isfinite().all()
    assert_matches_reference(torch.zeros(1, 4, 8, 8), blocks((8, 8), 3)[None], background_push=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 6])
def test_bad_embeddings_show_in_their_own_image_only(value: float, size: int) -> None:
    embeddings = torch.randn(2, 4, 20, 20)
    labels = batch_of_blocks(2, (20, 20), 3, size).clamp(min=1)
    embeddings[0, 2, 3, 4] = value
    losses = instembed.discriminative_loss(embeddings, labels, reduction="none")
    assert losses[0].isnan() and losses[1].isfinite()
    labels[0, 3, 4] = 99
    losses = instembed.discriminative_loss(embeddings, labels, reduction="none", ignore_index=99)
    assert losses.isfinite().all()


def test_large_values_do_not_overflow() -> None:
    embeddings = 1e15 * torch.randn(1, 4, 30, 30)
    labels = batch_of_blocks(1, (30, 30), 3)
    assert_matches_reference(embeddings, labels, gamma=0.0)


def test_half_embeddings_accumulate_in_float32() -> None:
    """A sum of 65536 ones is exact in float32 and overflows float16."""
    embeddings = torch.ones(1, 1, 256, 256, dtype=torch.float16)
    terms = instembed.discriminative_terms(embeddings, torch.ones(1, 256, 256, dtype=torch.int32))
    assert terms.regularization.dtype == torch.float32
    assert terms.regularization.item() == 1.0 and terms.variance.item() == 0.0


@pytest.mark.cpu_only
@pytest.mark.parametrize("workload", ["runs", "random", "points"])
def test_same_bits_on_any_number_of_threads(workload: str) -> None:
    if workload == "points":
        embeddings, labels = torch.randn(50000, 8), torch.randint(0, 300, (50000,))
    else:
        embeddings = torch.randn(2, 8, 200, 300)
        labels = batch_of_blocks(2, (200, 300), 30, 9 if workload == "runs" else 1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = embeddings.clone().requires_grad_()
            loss = instembed.discriminative_loss(leaf, labels, background_push=0.1)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"background_push": 1.0, "delta_dist": 2.0}, {"variance": "pixel"}], ids=str
)
def test_gradcheck(norm: int, options: dict) -> None:
    embeddings = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    for labels in (torch.randint(0, 4, (2, 5, 7)), batch_of_blocks(2, (5, 7), 3, 3)):
        assert torch.autograd.gradcheck(
            lambda e, labels=labels: instembed.discriminative_loss(
                e, labels, norm=norm, gamma=0.5, reduction="none", **options
            ),
            embeddings,
        )


def test_gradient_of_each_term() -> None:
    labels = batch_of_blocks(2, (20, 20), 4)
    for name in instembed.DiscriminativeTerms._fields:
        ours = torch.randn(2, 4, 20, 20, dtype=torch.float64, requires_grad=True)
        exact = ours.detach().cpu().clone().requires_grad_()
        getattr(instembed.discriminative_terms(ours, labels), name).sum().backward()
        column = instembed.DiscriminativeTerms._fields.index(name)
        reference.discriminative_terms(exact, labels.cpu())[:, column].sum().backward()
        assert_close(ours.grad.cpu(), exact.grad, 1e-12)


def test_double_backward_says_so() -> None:
    embeddings = torch.randn(1, 3, 6, 6, requires_grad=True)
    loss = instembed.discriminative_loss(embeddings, blocks((6, 6), 2)[None])
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("layout", ["planar", "points"])
def test_compile_fullgraph(layout: str) -> None:
    offsets = None
    if layout == "planar":
        embeddings, labels = torch.randn(2, 4, 16, 18), batch_of_blocks(2, (16, 18), 3)
    else:
        embeddings, labels = torch.randn(90, 4), torch.randint(0, 5, (90,))
        offsets = torch.tensor([0, 40, 90])

    def step(e: Tensor) -> Tensor:
        return instembed.discriminative_loss(e * 2, labels, offsets=offsets, background_push=0.5) * 3

    assert_compiles(step, embeddings)


def test_compile_with_inductor_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda e, n: instembed.discriminative_loss(e.tanh(), n), fullgraph=True, dynamic=True
    )
    for size in (12, 17):
        embeddings = torch.randn(2, 4, size, size, requires_grad=True)
        labels = batch_of_blocks(2, (size, size), 3)
        loss = step(embeddings, labels)
        loss.backward()
        torch.testing.assert_close(loss, instembed.discriminative_loss(embeddings.tanh(), labels))


def test_autocast(each_device: str) -> None:
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    image, labels = torch.randn(2, 3, 20, 20), batch_of_blocks(2, (20, 20), 3)
    with torch.autocast(each_device, dtype=torch.bfloat16):
        embeddings = conv(image)
        assert embeddings.dtype == torch.bfloat16
        loss = instembed.discriminative_loss(embeddings, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert conv.weight.grad.isfinite().all() and conv.weight.grad.any()


def test_module() -> None:
    loss = instembed.DiscriminativeLoss(delta_var=0.1, gamma=0.1, background=None, reduction="sum")
    embeddings, labels = torch.randn(2, 4, 10, 10), batch_of_blocks(2, (10, 10), 3)
    expected = instembed.discriminative_loss(
        embeddings, labels, delta_var=0.1, gamma=0.1, background=None, reduction="sum"
    )
    for module in (loss, copy.deepcopy(loss), torch.nn.Sequential(loss)[0]):
        assert torch.equal(module(embeddings, labels), expected)
    assert "delta_var=0.1" in repr(loss) and not list(loss.parameters()) and not loss.state_dict()
    points = instembed.DiscriminativeLoss()(torch.randn(9, 2), torch.arange(9), torch.tensor([0, 4, 9]))
    assert points.shape == ()
    with pytest.raises(ValueError, match="delta_var"):
        instembed.DiscriminativeLoss(delta_var=-1)


def test_checkpointing_and_frozen_inputs() -> None:
    embeddings, labels = torch.randn(2, 4, 10, 10, requires_grad=True), batch_of_blocks(2, (10, 10), 3)
    plain = torch.autograd.grad(instembed.discriminative_loss(embeddings, labels), embeddings)[0]
    loss = checkpoint(instembed.discriminative_loss, embeddings, labels, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, embeddings)[0], plain)
    assert not instembed.discriminative_loss(embeddings.detach(), labels).requires_grad
    with torch.no_grad():
        assert not instembed.discriminative_loss(embeddings, labels).requires_grad
    with torch.inference_mode():
        instembed.discriminative_loss(torch.randn(2, 4, 10, 10), labels)


def test_inputs_are_left_alone() -> None:
    embeddings, labels = torch.randn(2, 4, 33, 33, requires_grad=True), batch_of_blocks(2, (33, 33), 3)
    before = embeddings.detach().clone(), labels.clone()
    instembed.discriminative_loss(embeddings, labels).backward()
    assert torch.equal(embeddings, before[0]) and torch.equal(labels, before[1])


def test_reference_can_be_differentiated_twice() -> None:
    embeddings = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    labels = blocks((4, 4), 2, 2)[None]
    assert torch.autograd.gradgradcheck(lambda e: reference.discriminative_loss(e, labels), embeddings)


def test_a_gradient_step_lowers_the_loss() -> None:
    embeddings, labels = torch.randn(1, 3, 12, 12), blocks((12, 12), 3, 4)[None]
    leaf = embeddings.clone().requires_grad_()
    loss = instembed.discriminative_loss(leaf, labels)
    loss.backward()
    assert instembed.discriminative_loss(embeddings - leaf.grad, labels) < loss
