"""Grouping of keypoints against its definition, and the definition against scipy and by hand."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import instembed
from instembed import Poses, PosesWithDetails, reference
from instembed._arguments import FLOATING
from instembed._native import core
from tests.comparing import as_on_cpu

pytestmark = pytest.mark.usefixtures("each_device")

group = functools.partial(instembed.group_keypoints, return_details=True)
definition = importlib.import_module("instembed.reference.group_keypoints")


def by_definition(heatmaps: Tensor, tags: Tensor, **options: object) -> PosesWithDetails:
    return reference.group_keypoints(heatmaps.cpu(), tags.cpu(), **options)


def assert_same(ours: PosesWithDetails, expected: PosesWithDetails) -> None:
    for name, a, b in zip(PosesWithDetails._fields, as_on_cpu(ours, expected), expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), f"{name}: {a} instead of {b}"


def scene(
    images: int, joints: int, height: int, width: int, people: int, dims: int = 1, hidden: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Blobs with tags near their person's, over noise; some joints are hidden, some tags are alike."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    heatmaps = 0.05 * torch.rand(images, joints, height, width)
    tags = 2 * torch.randn(images, joints, dims, height, width)
    for b in range(images):
        person_tags = 2 * torch.randn(people, dims)
        for k in range(joints):
            for person_tag in person_tags:
                blob = torch.exp(
                    -((x - width * torch.rand(())) ** 2 + (y - height * torch.rand(())) ** 2) / 6
                )
                height_of_blob = 0.08 if torch.rand(()) < hidden else 0.3 + 0.7 * torch.rand(())
                tags[b, k, :, blob > 0.2] = person_tag[:, None] + 0.1 * torch.randn(dims, 1)
                heatmaps[b, k] = torch.maximum(heatmaps[b, k], height_of_blob * blob)
    return heatmaps, tags.flatten(1, 2)


def dots(
    points: dict[tuple[int, int, int], tuple[float, float]], joints: int, size: int = 16
) -> tuple[Tensor, ...]:
    """One image with single pixels {(joint, x, y): (score, tag)}, and tags 99 elsewhere."""
    heatmaps = torch.zeros(1, joints, size, size)
    tags = torch.full((1, joints, size, size), 99.0)
    for (k, x, y), (score, tag) in points.items():
        heatmaps[0, k, y, x] = score
        tags[0, k, y, x] = tag
    return heatmaps, tags


def test_a_case_by_hand() -> None:
    heatmaps, tags = dots(
        {
            (0, 2, 3): (0.9, 5.0),
            (0, 9, 3): (0.8, -5.0),
            (1, 3, 10): (0.5, -4.8),
            (1, 12, 12): (0.05, 5.2),  # below the threshold: found by its tag
            (1, 6, 6): (0.7, 40.0),  # a person of its own, who gets the nose with the nearest tag
        },
        joints=3,
    )
    found = group(heatmaps, tags, max_people=4)
    assert found.num_people.tolist() == [3]
    assert found.keypoints[0, :, 2].tolist() == 4 * [[0, 0]]  # nobody has the third joint
    assert not found.keypoint_scores[0, :, 2].any()
    assert found.visibility[0].tolist() == [[2, 2, 0], [2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert found.keypoints[0, :3, :2].tolist() == [[[9, 3], [3, 10]], [[2, 3], [12, 12]], [[2, 3], [6, 6]]]
    torch.testing.assert_close(found.scores, torch.tensor([[1.3, 0.9, 0.7, 0.0]]) / 3)
    torch.testing.assert_close(found.tags[0, :, 0], torch.tensor([-4.9, 5.0, 40.0, 0.0]))
    torch.testing.assert_close(found.keypoint_scores[0, 1, :2], torch.tensor([0.9, 0.05]))
    assert_same(found, by_definition(heatmaps, tags, max_people=4))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dims", [1, 3])
def test_equals_reference_for_every_dtype(dtype: torch.dtype, dims: int) -> None:
    heatmaps, tags = (maps.to(dtype) for maps in scene(2, 4, 37, 45, 5, dims))
    assert_same(group(heatmaps, tags), by_definition(heatmaps, tags))


def test_maps_of_two_types() -> None:
    heatmaps, tags = scene(1, 3, 30, 30, 4)
    for a, b in [(torch.float16, torch.float64), (torch.float64, torch.bfloat16)]:
        assert_same(
            group(heatmaps.to(a), tags.to(b)),
            by_definition(heatmaps.to(a), tags.to(b)),
        )


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 3, 1, 9), (2, 3, 9, 1), (1, 2, 8, 16), (1, 2, 9, 17), (2, 17, 33, 50), (1, 1, 70, 5)],
    ids=str,
)
@pytest.mark.parametrize("nms", [1, 3, 5, 101])
def test_equals_reference_for_every_shape(shape: tuple[int, ...], nms: int) -> None:
    heatmaps, tags = scene(*shape, people=4)
    options = {"nms": nms, "max_people": 7}
    assert_same(
        group(heatmaps, tags, **options),
        by_definition(heatmaps, tags, **options),
    )


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 2.5])
def test_options(adjust: bool, refine: bool, threshold: float) -> None:
    heatmaps, tags = scene(2, 5, 40, 40, 6)
    options = {
        "adjust": adjust,
        "refine": refine,
        "tag_threshold": threshold,
        "peak_threshold": 0.3,
        "joint_order": [4, 2, 0, 1, 3],
    }
    assert_same(
        group(heatmaps, tags, **options),
        by_definition(heatmaps, tags, **options),
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3),
        lambda t: t[:, :, ::2, 1::3],
        lambda t: t.flip(3),
        lambda t: t[:, :1].expand(-1, 4, -1, -1),
    ],
)
def test_strided_maps(view) -> None:
    heatmaps, tags = (view(maps) for maps in scene(2, 4, 40, 48, 5))
    assert_same(
        group(heatmaps, tags),
        by_definition(heatmaps.contiguous(), tags.contiguous()),
    )


@pytest.mark.cpu_only
def test_same_bits_for_any_number_of_threads(two_threads) -> None:
    heatmaps, tags = scene(3, 17, 64, 64, 12)
    both = group(heatmaps, tags)
    torch.set_num_threads(1)
    assert_same(group(heatmaps, tags), both)


# Peaks


def test_a_plateau_is_one_peak() -> None:
    heatmaps = torch.zeros(1, 1, 30, 40)
    heatmaps[0, 0, 3:20, 5:25] = 1.0
    heatmaps[0, 0, 25, 30:33] = 0.5
    found = group(heatmaps, torch.zeros_like(heatmaps), adjust=False)
    assert found.num_people.tolist() == [2]
    assert found.keypoints[0, :2, 0].tolist() == [[5, 3], [30, 25]]
    constant = group(torch.ones(1, 1, 30, 40), torch.zeros(1, 1, 30, 40))
    assert constant.num_people.tolist() == [1]
    assert constant.keypoints[0, 0, 0].tolist() == [0, 0]


def test_more_peaks_than_people() -> None:
    torch.manual_seed(1)
    heatmaps, tags = torch.rand(2, 3, 40, 40), 50 * torch.randn(2, 3, 40, 40)
    found = group(heatmaps, tags, max_people=4)
    assert found.num_people.tolist() == [4, 4]
    assert_same(found, by_definition(heatmaps, tags, max_people=4))
    top = [f.flatten().topk(1).values.item() for f in heatmaps[:, 0]]
    assert found.keypoint_scores[:, :, 0].amax(1).tolist() == top


def test_no_peak_at_all() -> None:
    for heatmaps in (
        torch.zeros(2, 3, 9, 9),
        torch.full((2, 3, 9, 9), math.nan),
        torch.full((2, 3, 9, 9), 0.1),
    ):
        found = group(heatmaps, torch.zeros_like(heatmaps), peak_threshold=0.2)
        assert found.num_people.tolist() == [0, 0]
        assert all((value == 0).all() for value in found)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    found = group(torch.zeros(shape), torch.zeros(shape), max_people=5)
    assert found.keypoints.shape == (shape[0], 5, 3, 2)
    assert not found.num_people.any()
    assert_same(found, by_definition(torch.zeros(shape), torch.zeros(shape), max_people=5))


def test_a_threshold_is_compared_exactly() -> None:
    heatmaps = torch.full((1, 1, 1, 1), 0.1)  # in float32 a little more than 0.1
    for dtype, above in [(torch.float32, 1), (torch.float64, 0)]:
        maps = heatmaps.to(dtype) if dtype == torch.float32 else torch.full((1, 1, 1, 1), 0.1, dtype=dtype)
        assert group(maps, maps, peak_threshold=0.1).num_people.tolist() == [above]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_not_finite(bad: float) -> None:
    heatmaps, tags = scene(2, 4, 40, 40, 5)
    assert group(heatmaps, tags).num_people.min() > 0
    for maps in (heatmaps, tags):
        maps[torch.rand(maps.shape) < 0.2] = bad
    found = group(heatmaps, tags)
    assert all(value.isfinite().all() for value in found)
    assert_same(found, by_definition(heatmaps, tags))


@pytest.mark.parametrize("scale", [1e-30, 1e12, 1e30])
def test_extreme_values(scale: float) -> None:
    heatmaps, tags = scene(2, 4, 30, 30, 5)
    for h, t in [(heatmaps * scale, tags), (heatmaps, tags * scale), (heatmaps.double() / scale, tags)]:
        assert_same(
            group(h, t, peak_threshold=0.1 * float(h.max())),
            by_definition(h, t, peak_threshold=0.1 * float(h.max())),
        )


def test_tags_too_far_to_tell_apart() -> None:
    """Beyond 2^30 only the heatmap counts: a hidden joint goes to the highest pixel."""
    heatmaps, tags = dots({(0, 3, 3): (0.9, 0.0), (1, 20, 20): (0.05, 1e30), (1, 30, 4): (0.09, 1e35)}, 2, 40)
    tags[0, 1][heatmaps[0, 1] == 0] = 1e20
    found = group(heatmaps, tags, max_people=2)
    assert found.keypoints[0, 0].tolist() == [[3, 3], [30, 4]]
    assert_same(found, by_definition(heatmaps, tags, max_people=2))


def test_adjust() -> None:
    heatmaps = torch.zeros(1, 1, 9, 9)
    heatmaps[0, 0, 4, 3:6] = torch.tensor([0.2, 1.0, 0.5])
    heatmaps[0, 0, 3:6, 4] = torch.tensor([0.2, 1.0, 0.2])
    found = group(heatmaps, heatmaps)
    assert found.keypoints[0, 0, 0].tolist() == [4.25, 4]
    corner = group(heatmaps[:, :, 4:, 4:], heatmaps[:, :, 4:, 4:])
    assert corner.keypoints[0, 0, 0].tolist() == [0, 0]  # where a neighbour is missing, nothing moves


# People


def test_people_with_equal_tags_do_not_overwrite_each_other() -> None:
    places = {(k, x, 8): (0.5 + 0.01 * x, 1.0) for k in range(3) for x in (2, 8, 14)}
    found = group(*dots(places, joints=3), adjust=False)
    assert found.num_people.tolist() == [3]
    assert (found.keypoint_scores[0, :3] > 0.4).all()
    for k in range(3):
        assert sorted(found.keypoints[0, :3, k, 0].tolist()) == [2, 8, 14]


@pytest.mark.cpu_only
def test_ties_of_the_cost_go_to_the_nearer_tags() -> None:
    # The person at 10 is not there for the second joint's false peak at 20: both ways to assign cost 20.
    matches = core.match_keypoints([10.0, 0.0, 20.0, 10.0], [0.5, 0.5], 1.0)
    assert matches == [1, 0]
    # Distances all round to 0: crossing over costs the same.
    assert core.match_keypoints([0.4, 0.05, 0.0, 0.45], [0.5, 0.6], 1.0) == [1, 0]


@pytest.mark.cpu_only
def test_rounding_is_half_to_even() -> None:
    # 0.5 rounds to 0 and 1.5 to 2: by distance alone the first person is nearer in both.
    assert core.match_keypoints([0.5, 0.4], [0.5], 0.01) == [0]  # a tie, and both are beyond the threshold
    assert core.match_keypoints([0.51, 0.5], [0.5], 1.0) == [1]
    assert core.match_keypoints([2.5, 1.5], [0.5], 1.0) == [0]


def random_distances(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances and scores of candidates to people, and their costs."""
    n, m = generator.integers(1, 34, 2)
    a, b = generator.normal(0, generator.choice([0.3, 3, 30]), (2, 40))
    distances = np.abs(a[:n, None] - b[None, :m])
    if generator.random() < 0.3:
        distances = np.round(distances)
    scores = generator.random(n).astype(np.float32).astype(np.float64)
    return distances, scores, np.round(distances) * 100 - scores[:, None]


@pytest.mark.cpu_only
@pytest.mark.parametrize("seed", range(200))
def test_costs_equal_scipy(seed: int) -> None:
    distances, scores, costs = random_distances(np.random.default_rng(seed))
    matches = core.match_keypoints(distances.flatten().tolist(), scores.tolist(), 1.0)
    assert matches == [
        -1 if p is None else p for p in definition.match(distances.tolist(), scores.tolist(), 1.0)
    ]
    pairs = [(i, p) for i, p in enumerate(matches) if p >= 0]
    assert len(pairs) == min(costs.shape) == len({p for _, p in pairs})
    expected = costs[linear_sum_assignment(costs)].sum()
    assert sum(costs[pair] for pair in pairs) == pytest.approx(expected, rel=0, abs=1e-8)


def test_costs_equal_scipy_on_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every assignment that grouping a batch takes."""
    match, calls = definition.match, []

    def checked(distances: list[list[float]], scores: list[float], threshold: float) -> list[int | None]:
        matches = match(distances, scores, threshold)
        if scores and distances[0]:
            costs = np.round(np.array(distances)) * 100 - np.array(scores)[:, None]
            total = sum(costs[i, p] for i, p in enumerate(matches) if p is not None)
            assert total == pytest.approx(costs[linear_sum_assignment(costs)].sum(), rel=0, abs=1e-8)
            calls.append(costs.shape)
        return matches

    heatmaps, tags = scene(2, 17, 48, 48, 10)
    monkeypatch.setattr(definition, "match", checked)
    expected = by_definition(heatmaps, tags)
    assert len(calls) == 2 * 16
    assert_same(group(heatmaps, tags), expected)


@pytest.mark.cpu_only
def test_match_checks_its_arguments() -> None:
    assert core.match_keypoints([], [0.5, 0.5], 1.0) == [-1, -1]
    assert core.match_keypoints([], [], 1.0) == []
    with pytest.raises(ValueError, match="distances"):
        core.match_keypoints([1.0, 2.0, 3.0], [0.5, 0.5], 1.0)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="distances"):
            core.match_keypoints([bad], [0.5], 1.0)
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="scores from 0"):
            core.match_keypoints([1.0], [bad], 1.0)


@pytest.mark.cpu_only
def test_the_core_checks_shapes() -> None:
    maps = torch.rand(1, 2, 8, 8)
    options = (5, 0.1, 1.0, 5, [0, 1], True, True)
    good = [
        torch.zeros(1, 5, 2, 2),
        torch.zeros(1, 5),
        torch.zeros(1, 5, 1),
        torch.zeros(1).long(),
        torch.zeros(1, 5, 2),
        torch.zeros(1, 5, 2, dtype=torch.uint8),
    ]
    core.group_keypoints(maps, maps, *options, *good, threads=1)
    for index in range(len(good)):
        wrong = list(good)
        wrong[index] = wrong[index][..., :0]
        with pytest.raises(ValueError):
            core.group_keypoints(maps, maps, *options, *wrong, threads=1)
    for change in [(0, 0), (3, 4), (4, [0, 0]), (4, [0]), (4, [0, 2]), (2, math.nan)]:
        changed = list(options)
        changed[change[0]] = change[1]
        with pytest.raises(ValueError):
            core.group_keypoints(maps, maps, *changed, *good, threads=1)
    for tags in (maps[:, :1], maps[:, :, :7], maps[:, :0], maps[0], maps.int()):
        with pytest.raises((ValueError, RuntimeError)):
            core.group_keypoints(maps, tags, *options, *good, threads=1)


def test_nothing_has_a_gradient() -> None:
    heatmaps, tags = (maps.requires_grad_() for maps in scene(1, 2, 20, 20, 2))
    assert not any(value.requires_grad for value in group(heatmaps, tags))


def test_compiles_into_one_graph() -> None:
    heatmaps, tags = scene(2, 3, 24, 24, 3)
    compiled = torch.compile(group, fullgraph=True, backend="eager")
    assert_same(compiled(heatmaps, tags), by_definition(heatmaps, tags))


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 20), st.integers(0, 40)),
    dims=st.integers(1, 3),
    dtype=st.sampled_from(FLOATING),
    seed=st.integers(0, 2**16),
    levels=st.sampled_from([1, 3, 1000]),
    max_people=st.integers(1, 12),
    nms=st.sampled_from([1, 3, 5, 7]),
)
def test_random_maps(
    shape: tuple[int, ...], dims: int, dtype: torch.dtype, seed: int, levels: int, max_people: int, nms: int
) -> None:
    """Few levels make ties of everything."""
    generator = torch.Generator().manual_seed(seed)
    images, joints, *size = shape
    heatmaps = torch.randint(0, levels + 1, shape, generator=generator) / levels
    heatmaps *= torch.rand(shape, generator=generator) < 0.2
    tags = (
        torch.randint(-2 * levels, 2 * levels, (images, joints * dims, *size), generator=generator) / levels
    )
    options = {"max_people": max_people, "nms": nms}
    assert_same(
        group(heatmaps.to(dtype), tags.to(dtype), **options),
        by_definition(heatmaps.to(dtype), tags.to(dtype), **options),
    )


def test_details_on_request() -> None:
    heatmaps, tags = scene(2, 3, 24, 24, 3)
    poses, details = instembed.group_keypoints(heatmaps, tags), group(heatmaps, tags)
    assert isinstance(poses, Poses) and isinstance(details, PosesWithDetails)
    assert Poses._fields == ("keypoints", "scores", "tags", "num_people")
    for name in Poses._fields:
        assert torch.equal(getattr(poses, name), getattr(details, name)), name


@pytest.mark.parametrize("step", ["adjust", "refine", "return_details"])
def test_steps_are_true_or_false(step: str) -> None:
    maps = torch.zeros(1, 1, 4, 4)
    with pytest.raises(TypeError, match=step):
        instembed.group_keypoints(maps, maps, **{step: "no"})
