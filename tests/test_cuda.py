"""The CUDA kernels, on a GPU where there is one, and on the simulated device of `make simulator`.

`pytest -m cuda` takes the first and skips itself without a GPU. `--simulated-core FILE` takes the second:
the same kernels, compiled for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import instembed
from instembed import Grouping, LabelStatistics, _native, reference
from instembed._arguments import INTEGER
from tests.comparing import TOLERANCE, assert_close, there
from tests.layouts import LAYOUTS, labels_of_blocks

# ---------------------------------------------------------------------------------------------------------
# Without a GPU


def test_core_with_kernels_works_without_a_gpu() -> None:
    """Static cudart: a core built with CUDA loads where there is no driver, and sees no device there."""
    if not _native.core.cuda:
        pytest.skip("the core was built without CUDA")
    assert _native.core.cuda_device_count() >= 0
    if not torch.cuda.is_available():
        assert not instembed.cuda_available()
    embeddings = torch.randn(1, 2, 8, 8, requires_grad=True)
    instembed.discriminative_loss(embeddings, torch.ones(1, 8, 8, dtype=torch.int64)).backward()
    assert embeddings.grad is not None


def test_core_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class CpuCore:
        cuda = False
        __file__ = "_core.so"

    monkeypatch.setattr(_native, "core", CpuCore())
    assert not instembed.cuda_available()
    with pytest.raises(RuntimeError, match=r"built without CUDA .*INSTEMBED_CUDA=ON"):
        _native._cuda_core()


def test_overflow_checks_want_a_bool() -> None:
    with pytest.raises(TypeError, match="enabled"):
        instembed.set_overflow_checks(1)


# ---------------------------------------------------------------------------------------------------------
# Label statistics


def assert_same_statistics(labels: Tensor, device: str, capacity: int = 40, **options: object) -> None:
    ours = instembed.label_statistics(there(labels, device), max_instances=capacity, **options)
    expected = reference.label_statistics(labels, max_instances=capacity, **options)
    for name, a, b in zip(LabelStatistics._fields, ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
def test_label_statistics_types(device: str, dtype: torch.dtype) -> None:
    assert_same_statistics(labels_of_blocks(2, 17, 29).to(dtype), device)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 3000), (2, 7, 1), (2, 1, 70), (2, 63, 65), (2, 3, 5, 7), (3, 0, 4), (0, 4, 5)],
    ids=str,
)
def test_label_statistics_shapes(device: str, shape: tuple[int, ...]) -> None:
    assert_same_statistics(labels_of_blocks(*shape), device)
    assert_same_statistics(labels_of_blocks(*shape, size=30), device, background=None, ignore_index=2)


def test_label_statistics_of_views_and_huge_ids(device: str) -> None:
    labels = torch.tensor([0, 7, 26005, 2**62 + 1, -1, -(2**63), 2**63 - 1])[
        labels_of_blocks(3, 30, 44, ids=7)
    ]
    for view in (labels, labels.transpose(1, 2), labels[:, ::2, 1::3], labels[:, :, :1].expand(-1, -1, 50)):
        assert_same_statistics(view, device)


def test_label_statistics_overflow(device: str) -> None:
    labels = torch.arange(200).reshape(1, 10, 20).expand(2, 10, 20).clone()
    labels[1] = 1
    found = instembed.label_statistics(there(labels, device), max_instances=150)
    assert found.num_instances.tolist() == [151, 1]
    assert not found.areas[0].any() and not found.ids[0].any() and found.areas[1, 0] == 200
    default = instembed.label_statistics(there(labels, device))
    assert default.ids.shape == (2, 64)


def test_label_statistics_overflow_check(device: str, overflow_checks: None) -> None:
    labels = torch.arange(200).reshape(1, 10, 20).to(device)
    with pytest.raises(ValueError, match="max_instances=150"):
        instembed.label_statistics(labels, max_instances=150)


# ---------------------------------------------------------------------------------------------------------
# Discriminative loss


def loss_and_gradient(
    embeddings: Tensor, labels: Tensor, device: str, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = there(embeddings.detach(), device).requires_grad_()
    if isinstance(options.get("offsets"), Tensor):
        options["offsets"] = options["offsets"].to(device)
    loss = instembed.discriminative_loss(leaf, there(labels, device), reduction="none", **options)
    loss.sum().backward()
    return loss.detach().cpu(), leaf.grad.cpu()


def assert_same_loss(embeddings: Tensor, labels: Tensor, device: str, **options: object) -> None:
    loss, gradient = loss_and_gradient(embeddings, labels, device, **options)
    exact = embeddings.detach().double().requires_grad_()
    options.pop("max_instances", None)
    expected = reference.discriminative_loss(exact, labels, reduction="none", **options)
    expected.sum().backward()
    assert_close(loss, expected.detach(), 1e-11 if embeddings.dtype == torch.float64 else 5e-6)
    assert gradient.dtype == embeddings.dtype
    assert_close(gradient, exact.grad, TOLERANCE[embeddings.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_types_and_layouts(device: str, dtype: torch.dtype, layout: str) -> None:
    embeddings = LAYOUTS[layout](torch.randn(2, 8, 24, 28).to(dtype))
    labels = labels_of_blocks(2, *embeddings.shape[2:])
    assert_same_loss(embeddings, labels, device)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": 1},
        {"variance": "pixel"},
        {"background_push": 0.7, "norm": 1},
        {"background_push": 1.0, "ignore_index": 2},
        {"background": None},
        {"background": 3, "ignore_index": 0},
        {"delta_var": 1e-9, "delta_dist": 1e-9},
    ],
    ids=str,
)
def test_loss_options(device: str, options: dict) -> None:
    assert_same_loss(torch.randn(2, 5, 17, 23), labels_of_blocks(2, 17, 23), device, **options)


@pytest.mark.parametrize("channels", [1, 3, 21])
@pytest.mark.parametrize("spatial", [(1,), (1025,), (17, 1), (3, 5, 7)], ids=str)
def test_loss_sizes(device: str, channels: int, spatial: tuple[int, ...]) -> None:
    assert_same_loss(torch.randn(2, channels, *spatial), labels_of_blocks(2, *spatial), device)


def test_loss_of_points_with_offsets(device: str) -> None:
    embeddings, labels = torch.randn(500, 6), torch.randint(0, 9, (500,)) * 2**40
    offsets = torch.tensor([0, 0, 10, 10, 300, 500])
    assert_same_loss(embeddings, labels, device, offsets=offsets)
    assert_same_loss(embeddings, labels, device, offsets=offsets, background_push=1.0)
    assert_same_loss(embeddings, labels, device)


def test_loss_without_instances_is_zero(device: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 4)):
        labels = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        loss, gradient = loss_and_gradient(torch.randn(shape), labels, device, background_push=1.0)
        assert not loss.any() and not gradient.any()


def test_loss_of_too_many_instances_is_nan(device: str) -> None:
    labels = torch.arange(1, 401).reshape(1, 20, 20).repeat(2, 1, 1)
    labels[1] = 5
    loss, gradient = loss_and_gradient(torch.randn(2, 3, 20, 20), labels, device, max_instances=399)
    assert loss[0].isnan() and gradient[0].isnan().all()
    assert loss[1].isfinite() and gradient[1].isfinite().all()
    assert_same_loss(torch.randn(2, 3, 20, 20), labels, device, max_instances=400)


def test_loss_of_wrong_offsets_is_nan(device: str) -> None:
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        loss, gradient = loss_and_gradient(
            torch.randn(100, 3), torch.randint(0, 4, (100,)), device, offsets=torch.tensor(wrong)
        )
        assert loss.isnan().all() and gradient.isnan().all()


def test_loss_overflow_check(device: str, overflow_checks: None) -> None:
    embeddings, labels = torch.randn(1, 2, 100).to(device), torch.arange(100)[None].to(device)
    with pytest.raises(ValueError, match="max_instances=9 "):
        instembed.discriminative_loss(embeddings, labels, max_instances=9)
    with pytest.raises(ValueError, match="offsets"):
        instembed.discriminative_loss(
            embeddings[0].t(), labels[0], offsets=torch.tensor([0, 101], device=device)
        )


def test_bad_embeddings_show_in_their_own_image_only(device: str) -> None:
    embeddings, labels = torch.randn(2, 4, 20, 20), labels_of_blocks(2, 20, 20).clamp(min=1)
    for value in (float("nan"), float("inf")):
        embeddings[0, 2, 3, 4] = value
        loss, gradient = loss_and_gradient(embeddings, labels, device)
        assert loss[0].isnan() and loss[1].isfinite() and gradient[1].isfinite().all()


# ---------------------------------------------------------------------------------------------------------
# Mean-shift grouping


def patches(*shape: int, channels: int = 4, spread: float = 0.2, instances: int = 6) -> Tensor:
    """(B, channels, *spatial) about the centres of instances that are patches; some pixels mix two."""
    labels = labels_of_blocks(*shape, ids=instances, size=5)
    centers = 2.5 * torch.randn(instances, channels)
    mix = torch.where(torch.rand(shape) < 0.1, torch.rand(shape), torch.zeros(shape))[..., None]
    means = (1 - mix) * centers[labels] + mix * centers[torch.randint(instances, shape)]
    return (means + spread * torch.randn(*shape, channels)).movedim(-1, 1)


def assert_same_groups(
    embeddings: Tensor, device: str, bandwidth: float = 1.5, **options: object
) -> Grouping:
    ours = instembed.mean_shift(
        there(embeddings, device), bandwidth, max_instances=300, **there(options, device)
    )
    expected = reference.mean_shift(embeddings, bandwidth, max_instances=300, **options)
    for name in ("labels", "counts", "num_instances"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name)), name
    assert ours.centers.dtype == expected.centers.dtype
    assert_close(
        ours.centers.cpu(), expected.centers.double(), 1e-12 if embeddings.dtype == torch.float64 else 1e-6
    )
    return ours


SEEDINGS = pytest.mark.parametrize("seeding", ["peel", "all"])


@SEEDINGS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouping_types_and_layouts(device: str, dtype: torch.dtype, layout: str, seeding: str) -> None:
    embeddings = LAYOUTS[layout](patches(2, 14, 18, channels=8).to(dtype))
    assert_same_groups(embeddings, device, seeding=seeding)


@SEEDINGS
@pytest.mark.parametrize(
    "options",
    [
        {"min_size": 4},
        {"min_size": 4, "leftovers": "nearest"},
        {"bandwidth": 0.4},
        {"bandwidth": 9.0},
        {"max_iter": 1, "tol": 0.0},
        {"tol": 0.3},
    ],
    ids=str,
)
def test_grouping_options(device: str, options: dict, seeding: str) -> None:
    assert_same_groups(patches(2, 11, 13), device, seeding=seeding, **options)


@SEEDINGS
@pytest.mark.parametrize("kind", ["bool", "int8", "int64", "strided"])
def test_grouping_masks(device: str, kind: str, seeding: str) -> None:
    classes = torch.randint(-2, 3, (2, 12, 17))
    if kind == "bool":
        mask = classes > 0
    elif kind == "strided":
        mask = torch.stack([classes, classes], -1).flatten(2)[..., ::2]
    else:
        mask = classes.to(getattr(torch, kind)) * (2**40 if kind == "int64" else 1)
    for leftovers in ("noise", "nearest"):
        assert_same_groups(
            patches(2, 12, 17), device, mask=mask, seeding=seeding, min_size=3, leftovers=leftovers
        )


@SEEDINGS
@pytest.mark.parametrize("channels", [1, 3, 21])
@pytest.mark.parametrize("spatial", [(1,), (257,), (17, 1), (3, 5, 7)], ids=str)
def test_grouping_sizes(device: str, channels: int, spatial: tuple[int, ...], seeding: str) -> None:
    assert_same_groups(patches(2, *spatial, channels=channels, spread=0.1), device, seeding=seeding)


@pytest.mark.parametrize(
    ("seeding", "dtype", "channels"),
    [("peel", "float32", 52), ("peel", "float64", 50), ("all", "float32", 198), ("all", "float64", 166)],
)
def test_grouping_about_the_usual_shared_memory(device: str, seeding: str, dtype: str, channels: int) -> None:
    """Arrays of the launch take just under 48 KB of shared memory, and the kernel's own the rest and more."""
    points = patches(1, 40, channels=channels, spread=0.05).to(getattr(torch, dtype))
    assert_same_groups(points, device, seeding=seeding)


@SEEDINGS
def test_grouping_of_points_with_offsets(device: str, seeding: str) -> None:
    points = patches(1, 400)[0].T.contiguous()
    assert_same_groups(points, device, seeding=seeding)
    offsets = torch.tensor([0, 0, 10, 10, 240, 400])
    assert_same_groups(points, device, seeding=seeding, offsets=offsets)
    mask = torch.randint(0, 3, (400,))
    assert_same_groups(points, device, seeding=seeding, offsets=offsets, mask=mask)


@SEEDINGS
def test_grouping_of_nothing(device: str, seeding: str) -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        assert_same_groups(torch.randn(shape), device, seeding=seeding)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    found = assert_same_groups(torch.randn(2, 3, 4, 4), device, seeding=seeding, mask=mask)
    assert found.num_instances.tolist() == [0, 0]


@SEEDINGS
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_grouping_of_what_is_not_finite(device: str, dtype: torch.dtype, seeding: str) -> None:
    embeddings = patches(2, 10, 12, channels=3).to(dtype)
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), torch.finfo(dtype).max]).to(dtype)
    spoiled = torch.where(
        torch.rand(embeddings.shape) < 0.05, values[torch.randint(4, embeddings.shape)], embeddings
    )
    assert_same_groups(spoiled, device, seeding=seeding, leftovers="nearest", min_size=3)


@SEEDINGS
def test_grouping_at_the_bandwidth_itself(device: str, seeding: str) -> None:
    for dtype in (torch.float32, torch.float64):
        embeddings = torch.randint(-3, 4, (2, 2, 9, 14)).to(dtype)
        for bandwidth in (1.0, 2.0, 5.0):
            assert_same_groups(embeddings, device, bandwidth, seeding=seeding)


@pytest.mark.parametrize("options", [{}, {"max_iter": 1}, {"tol": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouping_of_clusters_apart_and_not(device: str, dtype: torch.dtype, options: dict) -> None:
    """The certificate holds for the first, third and last kind; sums are exact."""
    kinds = (
        [-0.125, 0.125],
        [-1.25, 0, 1.25],
        [-0.75, 0.75, 9, 9],
        [-0.75, 0.75, 2.25],
        [-0.625, 0.625, 2],
        [0],
    )
    points = torch.tensor([[x, 0, 20.0 * k] for k, kind in enumerate(kinds) for x in kind], dtype=dtype)
    points = points[torch.randint(len(points), (150,))]
    assert_same_groups(points, device, seeding="all", **options)
    mask = torch.randint(0, 3, (150,))
    offsets = torch.tensor([0, 60, 60, 150])
    assert_same_groups(points, device, seeding="all", mask=mask, offsets=offsets, min_size=2, **options)


@SEEDINGS
def test_grouping_of_too_many_instances(device: str, seeding: str) -> None:
    embeddings = 9.0 * torch.arange(40).reshape(1, 1, 40).repeat(2, 2, 1)
    embeddings[1] = 0
    found = instembed.mean_shift(there(embeddings, device), 1.5, seeding=seeding, max_instances=39)
    assert found.num_instances.tolist() == [40, 1]
    assert not found.labels[0].any() and not found.counts[0].any() and not found.centers[0].any()
    assert (found.labels[1] == 1).all() and found.counts[1, 0] == 40
    default = instembed.mean_shift(there(embeddings, device), 1.5, seeding=seeding)
    assert default.num_instances.tolist() == [40, 1] and default.counts.shape == (2, 64)


@SEEDINGS
def test_grouping_overflow_check(device: str, overflow_checks: None, seeding: str) -> None:
    embeddings = 9.0 * torch.arange(40).reshape(40, 1)
    with pytest.raises(ValueError, match="max_instances=39"):
        instembed.mean_shift(there(embeddings, device), 1.5, seeding=seeding, max_instances=39)
    with pytest.raises(ValueError, match="offsets"):
        wrong = torch.tensor([0, 41], device=device)
        instembed.mean_shift(there(embeddings, device), 1.5, seeding=seeding, offsets=wrong)


@SEEDINGS
def test_grouping_by_wrong_offsets_finds_nothing(device: str, seeding: str) -> None:
    for wrong in ([0, 90, 40, 100], [0, 50, 99, 200], [1, 50, 60, 100], [0, -5, 60, 100]):
        offsets = torch.tensor(wrong, device=device)
        found = instembed.mean_shift(torch.randn(100, 3).to(device), 1.5, seeding=seeding, offsets=offsets)
        assert found.num_instances.tolist() == [-1] * 3 and not found.labels.any()


# ---------------------------------------------------------------------------------------------------------
# What only a GPU can show

gpu = pytest.mark.cuda


Step = Callable[[], tuple[Tensor, ...]]


def loss_step() -> tuple[Step, list[Tensor]]:
    labels = labels_of_blocks(2, 200, 300, ids=30, size=9).cuda()
    embeddings = torch.randn(2, 16, 200, 300, device="cuda", requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = instembed.discriminative_loss(embeddings, labels)
        (gradient,) = torch.autograd.grad(loss, embeddings)
        return loss.detach(), gradient, instembed.label_statistics(labels).boxes

    return step, [embeddings, labels]


def grouping_step(seeding: str, *size: int) -> tuple[Step, list[Tensor]]:
    points = patches(2, *size, channels=8, instances=20).cuda()
    classes = labels_of_blocks(2, *size, ids=3, size=30).cuda()
    options = {"seeding": seeding, "min_size": 5, "leftovers": "nearest", "max_instances": 500}
    return lambda: instembed.mean_shift(points, 1.5, mask=classes, **options), [points, classes]


def pooling_step() -> tuple[Step, list[Tensor]]:
    features = torch.randn(2, 70, 200, 300, device="cuda", requires_grad=True)
    labels = labels_of_blocks(2, 200, 300, ids=30, size=9).cuda()

    def step() -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for reduce in ("mean", "sum", "max"):
            pooled, _ = instembed.instance_pool(features, labels, reduce=reduce)
            results += [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), features)]
        return tuple(results)

    return step, [features, labels]


def points_step() -> tuple[Step, list[Tensor]]:
    maps = torch.randn(2, 34, 60, 80, device="cuda", requires_grad=True)
    points = (60 * torch.rand(2, 20, 17, 2)).cuda()
    visible = torch.ones(2, 20, 17, dtype=torch.bool, device="cuda")

    def step() -> tuple[Tensor, ...]:
        instembed.read_location_maps(maps.new_zeros(2, 51, 60, 80), points, visible)
        values = instembed.gather_at(maps, points, mode="bilinear")
        loss = instembed.associative_embedding_loss(maps, points, visible)
        gradients = [torch.autograd.grad(result, maps)[0] for result in (values.square().sum(), loss)]
        return values.detach(), loss.detach(), *gradients

    return step, [maps, points]


STEPS: dict[str, Callable[[], tuple[Step, list[Tensor]]]] = {
    "loss": loss_step,
    "peel": lambda: grouping_step("peel", 200, 300),
    "all": lambda: grouping_step("all", 40, 60),
    "pooling": pooling_step,
    "points": points_step,
}


@pytest.fixture(params=STEPS)
def workload(request: pytest.FixtureRequest) -> tuple[Step, list[Tensor]]:
    """What to run, and the tensors that it reads."""
    if not instembed.cuda_available():
        pytest.skip("needs a GPU")
    return STEPS[request.param]()


def assert_same_step(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@gpu
def test_same_bits_in_every_run(workload: tuple[Step, list[Tensor]]) -> None:
    step, _ = workload
    expected = step()
    for _ in range(20):
        assert_same_step(step(), expected)


@gpu
def test_no_synchronisation(workload: tuple[Step, list[Tensor]]) -> None:
    step, _ = workload
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_other_streams(workload: tuple[Step, list[Tensor]]) -> None:
    step, _ = workload
    expected = step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(step())
    torch.cuda.synchronize()
    for result in results:
        assert_same_step(result, expected)


@gpu
def test_graph_capture_and_replay(workload: tuple[Step, list[Tensor]]) -> None:
    step, inputs = workload
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].copy_(inputs[0].flip(0) + 0.5)
        inputs[1].copy_(inputs[1].flip(1))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_step(captured, step())


def test_ops_refuse_tensors_on_two_devices(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs two devices")
    embeddings = torch.randn(1, 3, 4, 5, device=device)
    labels, seeds = (
        torch.ones(1, 4, 5, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int64, device=device),
    )
    with pytest.raises(ValueError, match="one device, got cpu and cuda:0"):
        torch.ops.instembed.seed_mask_iou(embeddings, labels, seeds, [0.5], 0, None)
