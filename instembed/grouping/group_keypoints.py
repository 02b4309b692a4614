"""Grouping of keypoints into people by their tags: the read-out of associative embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype

# COCO's 17 joints from the head over shoulders and hips outwards.
_COCO_ORDER = (0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10, 13, 14, 15, 16)


class Poses(NamedTuple):
    """People found in a batch. Rows beyond an image's people, and joints that were not found, are zero."""

    keypoints: Tensor
    """(B, P, K, 2): (x, y) in pixels of the maps, pixel centres at whole numbers."""
    scores: Tensor
    """(B, P), descending."""
    tags: Tensor
    """(B, P, L): the mean of the tags of a person's peaks."""
    num_people: Tensor
    """(B,) int64."""


class PosesWithDetails(NamedTuple):
    """:class:`Poses`, and of each joint its score and how it was found."""

    keypoints: Tensor
    scores: Tensor
    tags: Tensor
    num_people: Tensor
    keypoint_scores: Tensor
    """(B, P, K): the heatmap's value at each joint; above 0 exactly where the joint was found."""
    visibility: Tensor
    """(B, P, K) uint8: 2 for a peak, 1 for a joint that only ``refine`` found, 0 for one not found."""


def default_joint_order(joints: int) -> Sequence[int]:
    return _COCO_ORDER if joints == len(_COCO_ORDER) else range(joints)


@overload
def group_keypoints(
    heatmaps: Tensor,
    tags: Tensor,
    *,
    max_people: int = ...,
    peak_threshold: float = ...,
    tag_threshold: float = ...,
    nms: int = ...,
    joint_order: Sequence[int] | None = ...,
    adjust: bool = ...,
    refine: bool = ...,
    return_details: Literal[False] = ...,
) -> Poses: ...
@overload
def group_keypoints(
    heatmaps: Tensor,
    tags: Tensor,
    *,
    max_people: int = ...,
    peak_threshold: float = ...,
    tag_threshold: float = ...,
    nms: int = ...,
    joint_order: Sequence[int] | None = ...,
    adjust: bool = ...,
    refine: bool = ...,
    return_details: Literal[True],
) -> PosesWithDetails: ...


def group_keypoints(
    heatmaps: Tensor,
    tags: Tensor,
    *,
    max_people: int = 30,
    peak_threshold: float = 0.1,
    tag_threshold: float = 1.0,
    nms: int = 5,
    joint_order: Sequence[int] | None = None,
    adjust: bool = True,
    refine: bool = True,
    return_details: bool = False,
) -> Poses | PosesWithDetails:
    r"""Groups the peaks of heatmaps into people by tags (Newell, Huang and Deng 2017, arXiv 1611.05424).

    1. **Peaks** of each heatmap: pixels above ``peak_threshold`` than which none is higher in the
       ``nms`` x ``nms`` window around them. Of equal pixels in a window the first in row-major order counts.
       The ``max_people`` highest of each joint are candidates (equals: the first).
    2. **People**, joint by joint in ``joint_order``: candidates are assigned to the people found so far, as
       many pairs as there can be, at the least total cost, ``round(d) * 100 - score`` for a pair whose tag
       is d away from the mean tag of the person's joints (half to even). Of assignments of equal cost the one
       with the least sum of ``min(d, tag_threshold) ** 2`` is taken. A candidate that is in no pair, or in
       one with d not below ``tag_threshold``, starts a new person.
    3. **Capacity**: any number of people take part. The ``max_people`` with the highest scores are returned,
       highest first (equals: the one that was started first).
    4. ``refine``: for a joint without a peak, the pixel of the whole map with the largest
       ``heatmap - round(d)`` (equals: the first), if the heatmap is above 0 there.
    5. ``adjust``: each joint moves by a quarter of a pixel towards the higher neighbour on each axis. It
       stays where neighbours are equal, or one is missing or not finite.

    Args:
        heatmaps: (B, K, H, W), scores from 0 on, higher where joint k is likelier. float32, float64, float16
            or bfloat16, with any strides (nothing is copied).
        tags: (B, K * L, H, W), the L dimensions of joint k in channels k * L to k * L + L - 1; for L = 1 that
            is (B, K, H, W). Any of the four types.
        max_people: capacity P of the outputs, and of candidates of each joint (paper: 30).
        peak_threshold: from 0 on (the common parsers: 0.1).
        tag_threshold: from 0 on, in units of the tags (paper: 1).
        nms: side of the window, odd; 1 makes every pixel above the threshold a peak (the common parsers: 5).
        joint_order: every joint once. None: for 17 joints COCO's from the head to the hips and then outwards
            (0-6, 11, 12, 7-10, 13-16), as in the paper's code, else 0, 1, ..., K - 1.
        adjust, refine: whether to take these steps.
        return_details: whether joints' scores and visibility come too.

    Returns:
        :class:`Poses` ``(keypoints, scores, tags, num_people)``, or :class:`PosesWithDetails` ``(keypoints,
        scores, tags, num_people, keypoint_scores, visibility)``, with floats in float32 (float64 for float64
        heatmaps). A person's score is the mean over all K joints of the heatmap
        at its peaks, where a joint without a peak counts 0: a lone joint does not outrank a whole person.
        What ``refine`` found counts nothing there, and is not part of the person's tag.

        Pixels that are NaN or infinite are no peaks and hide none; a pixel with a tag that is not finite is
        never part of a person. Tag distances, means and costs are in float64. Nothing has a gradient. The
        result does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    _check_maps("heatmaps", heatmaps)
    _check_maps("tags", tags)
    joints = heatmaps.shape[1]
    if joints < 1:
        raise ValueError(f"heatmaps must have at least one joint, got shape {tuple(heatmaps.shape)}")
    if (
        tags.shape[0] != heatmaps.shape[0]
        or tags.shape[2:] != heatmaps.shape[2:]
        or tags.shape[1] < 1
        or tags.shape[1] % joints
    ):
        raise ValueError(
            "tags must be (B, K * L, H, W) with one or more channels for each joint, for heatmaps of shape "
            f"{tuple(heatmaps.shape)}, got {tuple(tags.shape)}"
        )
    arguments.check_same_device("tags", tags, "heatmaps", heatmaps)
    arguments.check_bool("adjust", adjust)
    arguments.check_bool("refine", refine)
    arguments.check_bool("return_details", return_details)
    if arguments.check_integer("nms", nms, at_least=1) % 2 == 0:
        raise ValueError(f"nms must be odd, got {nms}")
    outputs = torch.ops.instembed.group_keypoints(
        heatmaps,
        tags,
        arguments.check_capacity("max_people", max_people),
        arguments.check_number("peak_threshold", peak_threshold, at_least=0),
        arguments.check_number("tag_threshold", tag_threshold, at_least=0),
        nms,
        _checked_order(joint_order, joints),
        adjust,
        refine,
    )
    return PosesWithDetails(*outputs) if return_details else Poses(*outputs[:4])


def _check_maps(name: str, value: object) -> None:
    tensor = arguments.check_floating_tensor(name, value)
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be (B, channels, H, W), got shape {tuple(tensor.shape)}")


def _checked_order(joint_order: object, joints: int) -> list[int]:
    if joint_order is None:
        return list(default_joint_order(joints))
    if isinstance(joint_order, range):
        joint_order = list(joint_order)
    order = list(arguments.check_indices("joint_order", joint_order, joints))
    if sorted(order) != list(range(joints)):
        raise ValueError(f"joint_order must hold each of 0..{joints - 1} once, got {order}")
    return order


# The op.

_ops.define(
    "group_keypoints(Tensor heatmaps, Tensor tags, int max_people, float peak_threshold, "
    "float tag_threshold, int nms, int[] joint_order, bool adjust, bool refine) "
    "-> (Tensor keypoints, Tensor scores, Tensor person_tags, Tensor num_people, Tensor keypoint_scores, "
    "Tensor visibility)"
)


def _new_outputs(heatmaps: Tensor, tags: Tensor, max_people: int) -> tuple[Tensor, ...]:
    images, joints = heatmaps.shape[:2]
    dtype = accumulation_dtype(heatmaps)
    keypoints = heatmaps.new_empty((images, max_people, joints, 2), dtype=dtype)
    return (
        keypoints,
        keypoints.new_empty((images, max_people)),
        keypoints.new_empty((images, max_people, tags.shape[1] // joints)),
        keypoints.new_empty(images, dtype=torch.int64),
        keypoints.new_empty((images, max_people, joints)),
        keypoints.new_empty((images, max_people, joints), dtype=torch.uint8),
    )


@_ops.cpu("group_keypoints")
def _group_keypoints_cpu(
    heatmaps: Tensor, tags: Tensor, max_people: int, *options: Any
) -> tuple[Tensor, ...]:
    outputs = _new_outputs(heatmaps, tags, max_people)
    core.group_keypoints(heatmaps.detach(), tags.detach(), max_people, *options, *outputs, threads=threads())
    return outputs


# On CUDA what is done for every pixel: candidates go to the host, which makes people of them, and people go
# back. Fetching the candidates is what a batch waits for.


@_ops.cuda("group_keypoints")
def _group_keypoints_cuda(
    heatmaps: Tensor,
    tags: Tensor,
    max_people: int,
    peak_threshold: float,
    tag_threshold: float,
    nms: int,
    joint_order: list[int],
    adjust: bool,
    refine: bool,
) -> tuple[Tensor, ...]:
    cuda_core, stream = _native.cuda_core(), _native.stream_of(heatmaps)
    heatmaps, tags = heatmaps.detach(), tags.detach()
    images, joints = heatmaps.shape[:2]
    dims = tags.shape[1] // joints
    candidates = heatmaps.new_empty((images, joints, max_people, 2 + dims), dtype=torch.float64)
    bytes_needed = cuda_core.group_keypoints_cuda_workspace(heatmaps)
    workspace = heatmaps.new_empty(bytes_needed, dtype=torch.uint8)
    cuda_core.find_candidates_cuda(
        heatmaps, tags, max_people, peak_threshold, nms, candidates, workspace, stream=stream
    )
    on_host = candidates.cpu()
    pixels = torch.empty((images, max_people, joints), dtype=torch.int64)
    people = torch.empty((images, max_people, 1 + dims), dtype=torch.float64)
    num_people = torch.empty(images, dtype=torch.int64)
    core.group_candidates(
        on_host, max_people, tag_threshold, joint_order, pixels, people, num_people, threads=threads()
    )
    pixels, people, num_people = (
        tensor.to(heatmaps.device, non_blocking=True) for tensor in (pixels, people, num_people)
    )
    keypoints, scores, person_tags, _, keypoint_scores, visibility = _new_outputs(heatmaps, tags, max_people)
    scores.copy_(people[..., 0])
    person_tags.copy_(people[..., 1:])
    cuda_core.finish_people_cuda(
        heatmaps,
        tags,
        max_people,
        adjust,
        refine,
        pixels,
        people,
        num_people,
        keypoints,
        keypoint_scores,
        visibility,
        stream=stream,
    )
    return keypoints, scores, person_tags, num_people, keypoint_scores, visibility


@_ops.fake("group_keypoints")
def _group_keypoints_fake(heatmaps: Tensor, tags: Tensor, max_people: int, *_: Any) -> tuple[Tensor, ...]:
    return _new_outputs(heatmaps, tags, max_people)


_ops.not_differentiable("group_keypoints")
