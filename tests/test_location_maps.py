"""The read-out of location maps against its definition, and on skeletons by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import instembed
from instembed import reference
from instembed.readout import BODY_15, COCO_17

pytestmark = pytest.mark.usefixtures("each_device")

LIMBS, ROOT = [(0,), (2, 1), (4, 3)], [1, 3]  # of five joints


def crowd(
    joints: int, images: int = 2, people: int = 20, size: tuple[int, int] = (9, 12)
) -> tuple[Tensor, ...]:
    height, width = size
    keypoints = torch.rand(images, people, joints, 2) * torch.tensor([width + 2, height + 2]) - 1.5
    keypoints[torch.rand(keypoints.shape) < 0.03] = math.nan
    valid = (torch.rand(images, people, joints) < torch.rand(images, people, 1)).long()
    return torch.randn(images, 3 * joints, height, width), keypoints, valid


@pytest.mark.parametrize(
    ("joints", "limbs", "root"),
    [
        (15, None, None),
        (17, None, None),
        (5, LIMBS, ROOT),
        (5, [], [2]),
        (5, [(0, 1), (1, 2, 3), (3, 4)], []),  # joints in two limbs, no root
        (5, [(0, 1, 2), (2, 1), (0,)], [4]),
        (1, [], [0]),
        (1, [(0,)], []),
    ],
    ids=str,
)
def test_matches_the_definition(joints: int, limbs: list | None, root: list | None) -> None:
    maps, keypoints, valid = crowd(joints)
    skeleton = {15: BODY_15, 17: COCO_17}.get(joints)
    exact = maps.cpu().double().requires_grad_()
    expected = reference.read_location_maps(
        exact,
        keypoints.cpu(),
        valid.cpu(),
        limbs=skeleton.limbs if limbs is None else limbs,
        root=skeleton.root if root is None else root,
    )
    ours = maps.clone().requires_grad_()
    found = instembed.read_location_maps(ours, keypoints, valid, limbs=limbs, root=root)
    assert found.shape == (2, 20, joints, 3)
    torch.testing.assert_close(found.cpu(), expected.float(), rtol=0, atol=0)
    weights = torch.randn_like(expected.float())
    (found.cpu() * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad.cpu(), exact.grad.float())


def test_skeletons() -> None:
    for skeleton in (BODY_15, COCO_17):
        inside = [k for limb in skeleton.limbs for k in limb]
        assert len(inside) == len(set(inside)) and set(inside) <= set(range(len(skeleton.joints)))
        for limb in skeleton.limbs:
            names = [skeleton.joints[k].split("_")[-1] for k in limb]
            assert names in (
                ["wrist", "elbow", "shoulder"], ["ankle", "knee", "hip"], ["head"],
                ["nose", "eye", "eye", "ear", "ear"],
            )  # fmt: skip
            sides = {skeleton.joints[k].split("_")[0] for k in limb} & {"left", "right"}
            assert len(sides) == 1 or limb == skeleton.limbs[0]
    assert [BODY_15.joints[k] for k in BODY_15.root] == ["neck", "pelvis"]


def test_limb_by_limb() -> None:
    """A person on a line of pixels: joint k at x = k. Maps tell at which pixel they were read."""
    joints = len(BODY_15.joints)
    at = {name: k for k, name in enumerate(BODY_15.joints)}
    maps = torch.arange(float(joints)).expand(1, 3 * joints, 1, joints)
    keypoints = torch.stack([torch.arange(float(joints)), torch.zeros(joints)], -1)[None, None]

    def read(*hidden: str) -> dict[str, int]:
        valid = torch.ones(1, 1, joints, dtype=torch.bool)
        valid[0, 0, [at[name] for name in hidden]] = False
        found = instembed.read_location_maps(maps, keypoints, valid)[0, 0]
        assert (found == found[:, :1]).all()
        return {name: int(found[k, 0]) for name, k in at.items()}

    seen = read()
    assert seen["neck"] == seen["pelvis"] == at["neck"] and seen["head"] == at["head"]
    for part in ("wrist", "elbow", "shoulder"):
        assert seen[f"left_{part}"] == at["left_wrist"]
    for part in ("ankle", "knee", "hip"):
        assert seen[f"right_{part}"] == at["right_ankle"]
    assert read("left_wrist")["left_shoulder"] == read("left_wrist")["left_wrist"] == at["left_elbow"]
    assert read("left_wrist", "left_elbow")["left_wrist"] == at["left_shoulder"]
    assert read("left_wrist", "left_elbow", "left_shoulder")["left_wrist"] == at["neck"]
    assert read("neck", "head")["head"] == at["pelvis"]
    without_root = read("neck", "pelvis", "head")
    assert without_root["head"] == without_root["neck"] == 0 and without_root["left_knee"] == at["left_ankle"]


def test_what_cannot_be_read() -> None:
    maps, keypoints, valid = crowd(15)
    maps = maps.abs() + 1
    points, readable = instembed.location_read_points(keypoints, valid, (9, 12))
    found = instembed.read_location_maps(maps.requires_grad_(), keypoints, valid)
    assert points.shape == (2, 20, 15, 2) and readable.shape == (2, 20, 15)
    assert 0 < readable.float().mean() < 1
    assert (found[readable] > 0).all() and not found[~readable].any()
    assert torch.equal(instembed.gather_at(maps, points, valid=readable).unflatten(3, (15, 3))[
        :, :, torch.arange(15), torch.arange(15)
    ], found)  # fmt: skip


def test_a_visible_root_outside_the_map_is_not_visible() -> None:
    maps, keypoints, valid = torch.ones(1, 45, 4, 4), torch.ones(1, 1, 15, 2), torch.zeros(1, 1, 15)
    valid = valid.bool()
    valid[..., [1, 14]] = True  # neck and pelvis
    keypoints[0, 0, 1] = torch.tensor([3.5, 0.0])
    points, readable = instembed.location_read_points(keypoints, valid, (4, 4))
    assert readable.all() and (points == 1).all()
    keypoints[0, 0, 14] = math.nan
    assert not instembed.read_location_maps(maps, keypoints, valid).any()


@pytest.mark.parametrize("people", [0, 1])
@pytest.mark.parametrize("images", [0, 2])
def test_few_people(people: int, images: int) -> None:
    maps, keypoints, valid = crowd(15, images, people)
    found = instembed.read_location_maps(maps.requires_grad_(), keypoints, valid)
    assert found.shape == (images, people, 15, 3)
    found.sum().backward()
    assert maps.grad.shape == maps.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_layouts(dtype: torch.dtype) -> None:
    maps, keypoints, valid = crowd(17)
    expected = instembed.read_location_maps(maps.to(dtype), keypoints, valid)
    assert expected.dtype == dtype
    last = maps.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = instembed.read_location_maps(last, keypoints, valid > 0)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    for kind in (torch.uint16, torch.int8, torch.int64):
        whole = keypoints.nan_to_num().clamp(min=0).round()
        assert torch.equal(
            instembed.read_location_maps(maps, whole.to(kind), valid.to(kind)),
            instembed.read_location_maps(maps, whole, valid),
        )


def test_gradcheck() -> None:
    maps, keypoints, valid = crowd(5, people=3, size=(3, 4))
    assert torch.autograd.gradcheck(
        lambda m: instembed.read_location_maps(m, keypoints, valid, limbs=LIMBS, root=ROOT),
        maps.double().requires_grad_(),
    )


def test_compile() -> None:
    torch._dynamo.reset()
    step = torch.compile(
        lambda m, k, v: instembed.read_location_maps(m * 2, k, v), fullgraph=True, dynamic=True
    )
    for people, size in ((4, (8, 9)), (6, (11, 7))):
        maps, keypoints, valid = crowd(15, people=people, size=size)
        found = step(maps.requires_grad_(), keypoints, valid)
        torch.testing.assert_close(found, instembed.read_location_maps(maps * 2, keypoints, valid))
        found.sum().backward()
