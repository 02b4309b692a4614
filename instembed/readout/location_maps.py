"""3-D poses from location maps, read where a person can be seen (Mehta et al. 2018, arXiv 1712.03453)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments


class Skeleton(NamedTuple):
    """Where the joints of a skeleton are read."""

    joints: tuple[str, ...]
    limbs: tuple[tuple[int, ...], ...]
    """Joints of each limb, from its extremity inward."""
    root: tuple[int, ...]
    """The whole pose is read at the first of these that is visible."""


def _skeleton(names: str, limbs: Sequence[str], root: str) -> Skeleton:
    joints = tuple(names.split())
    indices = [tuple(joints.index(name) for name in limb.split()) for limb in limbs]
    return Skeleton(joints, tuple(indices), tuple(joints.index(name) for name in root.split()))


BODY_15 = _skeleton(
    "head neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
    "right_hip right_knee right_ankle left_hip left_knee left_ankle pelvis",
    limbs=[
        "head",
        "right_wrist right_elbow right_shoulder",
        "left_wrist left_elbow left_shoulder",
        "right_ankle right_knee right_hip",
        "left_ankle left_knee left_hip",
    ],
    root="neck pelvis",
)
"""15 joints, as MPI-INF-3DHP and MuPoTS-3D have them."""

COCO_17 = _skeleton(
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow "
    "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle",
    limbs=[
        "nose left_eye right_eye left_ear right_ear",
        "left_wrist left_elbow left_shoulder",
        "right_wrist right_elbow right_shoulder",
        "left_ankle left_knee left_hip",
        "right_ankle right_knee right_hip",
    ],
    root="left_shoulder right_shoulder left_hip right_hip",
)
"""COCO's 17 keypoints, which have no neck and no pelvis: the root are shoulders, then hips."""

SKELETONS = {15: BODY_15, 17: COCO_17}


def read_location_maps(
    maps: Tensor,
    keypoints: Tensor,
    valid: Tensor,
    *,
    limbs: Sequence[Sequence[int]] | None = None,
    root: Sequence[int] | None = None,
) -> Tensor:
    """Reads the 3-D joints of people from location maps, robust to occlusion.

    A location map holds, at the pixels of a person's joints, where another joint of that person is, relative
    to the root. So a joint that is hidden can be read at one that is not (Mehta et al. 2018): the whole pose
    is read at the root, then each limb is read again at the first of its joints that is visible, from the
    extremity inward: people overlap less there.

    Args:
        maps: (B, 3 K, H, W) x, y and z of each of K joints, joint after joint: joint k has channels ``3 k``
            to ``3 k + 2``. Any strides. float32, float64, float16 or bfloat16.
        keypoints: (B, P, K, 2), x and y in pixels of the maps, of any floating or integer dtype; maps are
            read at the nearest pixel. Has no gradient.
        valid: (B, P, K) bool or of an integer dtype, where greater than 0 means visible. A keypoint outside
            the map, or at NaN, is not visible.
        limbs: joints of each limb, from its extremity inward. A joint of several limbs is read in the last of
            these that has a visible joint. None: those of ``instembed.readout.BODY_15`` or ``COCO_17``
            for 15 or 17 joints.
        root: the whole pose is read at the first of these joints that is visible. None: as for ``limbs``;
            neck, then pelvis for 15 joints, shoulders, then hips for 17.

    Returns:
        (B, P, K, 3) of the maps' dtype, in their units. Without a visible root, limbs with a visible joint
        are read all the same. A joint that cannot be read is zero, without a gradient;
        :func:`location_read_points` tells which these are. Differentiable once with respect to the maps.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    arguments.check_floating_tensor("maps", maps)
    order = _checked_order(keypoints, valid, limbs, root)
    joints = keypoints.shape[2]
    if maps.dim() != 4 or maps.shape[0] != keypoints.shape[0] or maps.shape[1] != 3 * joints:
        raise ValueError(
            f"maps must be (B, 3 K, H, W) with B = {keypoints.shape[0]} and 3 K = {3 * joints} for keypoints "
            f"of shape {tuple(keypoints.shape)}, got shape {tuple(maps.shape)}"
        )
    arguments.check_same_device("keypoints", keypoints, "maps", maps)
    points, readable = _read_points(keypoints, valid, maps.shape[2], maps.shape[3], order)
    return torch.ops.instembed.gather_at(maps, points, readable, False, joints)


def location_read_points(
    keypoints: Tensor,
    valid: Tensor,
    size: tuple[int, int],
    *,
    limbs: Sequence[Sequence[int]] | None = None,
    root: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Where :func:`read_location_maps` reads each joint of maps of ``size`` (H, W), and which it can read.

    The other arguments, and the errors, are those of :func:`read_location_maps`. Returns the points
    (B, P, K, 2) of the keypoints' dtype (float64 for integers), and (B, P, K) bool: false where a person has
    neither a visible root nor a visible joint in the limb.
    """
    order = _checked_order(keypoints, valid, limbs, root)
    sides = arguments.check_sequence("size", size)
    if len(sides) != 2:
        raise ValueError(f"size must be (H, W), got {sides}")
    height, width = (arguments.check_integer("size", side, at_least=0) for side in sides)
    return _read_points(keypoints, valid, height, width, order)


def _read_points(
    keypoints: Tensor, valid: Tensor, height: int, width: int, order: list[list[int]]
) -> tuple[Tensor, Tensor]:
    places = keypoints.detach()
    if not places.is_floating_point():
        places = places.double()
    x, y = places.unbind(-1)
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    table = _index_table(order, places.device)
    choices = ((valid.double() > 0) & inside)[..., table]  # (B, P, K, M): can the joint be read there?
    first = choices.to(torch.uint8).argmax(-1, keepdim=True)
    joint = table.expand(choices.shape).gather(-1, first)  # (B, P, K, 1)
    return places.gather(2, joint.expand(-1, -1, -1, 2)), choices.any(-1)


def _index_table(rows: list[list[int]], device: torch.device) -> Tensor:
    """(K, M); on a GPU without a copy from the host, which would wait for it."""
    if device.type == "cpu":
        return torch.tensor(rows)
    table = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64, device=device)
    for row, indices in zip(table.unbind(), rows, strict=True):
        for place, index in zip(row.unbind(), indices, strict=True):
            place.fill_(index)
    return table


def _checked_order(
    keypoints: Tensor, valid: Tensor, limbs: Sequence[Sequence[int]] | None, root: Sequence[int] | None
) -> list[list[int]]:
    """For each joint, the joints where it may be read, the best first, in rows of one length."""
    arguments.check_number_tensor("keypoints", keypoints)
    if keypoints.dim() != 4 or keypoints.shape[3] != 2 or keypoints.shape[2] < 1:
        raise ValueError(
            f"keypoints must be (B, P, K, 2) with at least one joint, got shape {tuple(keypoints.shape)}"
        )
    arguments.check_valid(valid, "keypoints", keypoints)
    joints = keypoints.shape[2]
    for name, value in (("limbs", limbs), ("root", root)):
        if value is None and joints not in SKELETONS:
            raise ValueError(f"{name} must be given for {joints} joints: there are defaults for 15 and 17")
    if limbs is None:
        limbs = SKELETONS[joints].limbs
    if root is None:
        root = SKELETONS[joints].root
    for limb in arguments.check_sequence("limbs", limbs):
        arguments.check_indices("limbs", limb, joints)
    arguments.check_indices("root", root, joints)
    order = []
    for k in range(joints):
        order.append([joint for limb in reversed(limbs) if k in limb for joint in limb] + list(root))
        if not order[k]:
            raise ValueError(f"root must have a joint, for joint {k} is in none of the limbs")
    longest = max(len(row) for row in order)
    return [row + row[-1:] * (longest - len(row)) for row in order]  # to choose again changes nothing
