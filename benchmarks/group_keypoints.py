"""Grouping of keypoints against the usual parser in NumPy and scipy. The floor reads the maps once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare, installed
from benchmarks.machine import Work
from benchmarks.timing import Call
from instembed import PosesWithDetails
from instembed.grouping.group_keypoints import default_joint_order

JOINTS, SIZE, PEOPLE = 17, 128, 30
IMAGES = {"crowd": 8, "crowd, 1 image": 1}


def crowd(images: int, people: int = PEOPLE, size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heatmaps and tags (images, 17, size, size) as a trained network gives them.

    A joint in five is hidden: no peak, but a trace below the threshold and the tags of its person. Two peaks
    a map are nobody's. Elsewhere heatmaps are noise, and tags vary smoothly around 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    heatmaps = uniform(images, JOINTS, size, size, low=0, high=0.02)
    coarse = torch.randn(images, JOINTS, size // 8, size // 8, generator=generator)
    tags = F.interpolate(coarse, size=(size, size), mode="bilinear")
    tags += 0.05 * torch.randn(tags.shape, generator=generator)
    for b in range(images):
        person_tags = 2.0 * torch.randperm(people, generator=generator) - people
        centers = uniform(people, 2, low=0.1 * size, high=0.9 * size)
        for k in range(JOINTS):
            places = torch.cat(
                [
                    centers + 0.08 * size * torch.randn(people, 2, generator=generator),
                    uniform(2, 2, low=0, high=size),
                ]
            )
            heights = uniform(people + 2, low=0.4, high=1.0)
            heights[:people][torch.rand(people, generator=generator) < 0.2] = 0.06
            values = torch.cat([person_tags, uniform(2, low=-people, high=people)])
            for place, height, value in zip(places, heights, values, strict=True):
                squares = (x - place[0]) ** 2 + (y - place[1]) ** 2
                blob = height * torch.exp(-squares / 8)
                mine = (squares < 36) & (blob > heatmaps[b, k])
                tags[b, k][mine] = value + 0.1 * torch.randn(int(mine.sum()), generator=generator)
                heatmaps[b, k] = torch.maximum(heatmaps[b, k], blob)
    return heatmaps, tags


Maps = np.ndarray[Any, np.dtype[np.float32]]
Table = np.ndarray[Any, np.dtype[np.float64]]


def common_parser(heatmaps: Tensor, tags: Tensor, every_joint: bool = True) -> list[Table]:
    """(people, K, 3) x, y and score for each image, with one tag dimension, as the published parsers do it.

    They look for candidates where the maps are, and do the rest in NumPy: on a GPU, copies are part of it.
    They search the maps for every joint of every person, and then keep what was missing; without
    `every_joint` only for those.
    """
    peaks = torch.where(F.max_pool2d(heatmaps, 5, 1, 2) == heatmaps, heatmaps, 0)
    scores, pixels = peaks.flatten(2).topk(PEOPLE, dim=2)
    chosen = tags.flatten(2).gather(2, pixels).cpu()
    heatmaps, tags, scores, pixels = heatmaps.cpu(), tags.cpu(), scores.cpu(), pixels.cpu()
    width = heatmaps.shape[3]
    poses = []
    for b in range(len(heatmaps)):
        table = [chosen[b].numpy(), pixels[b].numpy() % width, pixels[b].numpy() // width, scores[b].numpy()]
        people = group_by_tag(*table)
        people.sort(key=lambda person: -float(person[0][:, 2].mean()))
        kept = people[:PEOPLE]
        maps = heatmaps[b].numpy(), tags[b].numpy()
        found = [adjust_and_refine(*maps, *person, every_joint) for person in kept]
        poses.append(np.stack(found) if found else np.zeros((0, JOINTS, 3)))
    return poses


def group_by_tag(tags: Maps, x: Maps, y: Maps, scores: Maps) -> list[tuple[Table, list[float]]]:
    """People as a table (K, 3) of joints and a list of tags each."""
    from scipy.optimize import linear_sum_assignment

    people: list[tuple[Table, list[float]]] = []

    def start(k: int, joint: Table, tag: float) -> None:
        table = np.zeros((JOINTS, 3))
        table[k] = joint
        people.append((table, [tag]))

    for k in default_joint_order(JOINTS):
        mask = scores[k] > 0.1
        joints = np.stack([x[k], y[k], scores[k]], axis=1).astype(np.float64)[mask]
        candidates = tags[k].astype(np.float64)[mask]
        if not len(people):
            for joint, tag in zip(joints, candidates, strict=True):
                start(k, joint, tag)
            continue
        if not len(joints):
            continue
        means = np.array([np.mean(person[1]) for person in people])
        distance = np.abs(candidates[:, None] - means)
        # The published parsers leave ties to scipy. The last term decides them as instembed does.
        cost = np.round(distance) * 100 - joints[:, 2:] + 1e-6 * np.minimum(distance, 1) ** 2
        matches = dict(zip(*linear_sum_assignment(cost), strict=True))
        for row in range(len(joints)):
            column = matches.get(row)
            if column is not None and distance[row, column] < 1:
                people[column][0][k] = joints[row]
                people[column][1].append(candidates[row])
            else:
                start(k, joints[row], candidates[row])
    return people


def adjust_and_refine(
    heatmaps: Maps, tags: Maps, joints: Table, person_tags: list[float], every_joint: bool
) -> Table:
    mean = np.float32(np.mean(person_tags))
    result = joints.copy()
    for k in range(JOINTS):
        if joints[k, 2] > 0:
            result[k, :2] = adjusted(heatmaps[k], int(joints[k, 0]), int(joints[k, 1]))
            if not every_joint:
                continue
        rating = heatmaps[k] - np.round(np.abs(tags[k] - mean))
        y, x = np.unravel_index(np.argmax(rating), rating.shape)
        found = (*adjusted(heatmaps[k], int(x), int(y)), heatmaps[k, y, x])
        if joints[k, 2] == 0 and found[2] > 0:
            result[k] = found
    return result


def adjusted(heatmap: Maps, x: int, y: int) -> tuple[float, float]:
    dx = dy = 0.0
    if 0 < x < heatmap.shape[1] - 1:
        dx = 0.25 * float(np.sign(heatmap[y, x + 1] - heatmap[y, x - 1]))
    if 0 < y < heatmap.shape[0] - 1:
        dy = 0.25 * float(np.sign(heatmap[y + 1, x] - heatmap[y - 1, x]))
    return x + dx, y + dy


def check(ours: PosesWithDetails, theirs: list[Table]) -> None:
    assert ours.num_people.tolist() == [len(people) for people in theirs]
    for b, people in enumerate(theirs):
        found = torch.cat([ours.keypoints[b], ours.keypoint_scores[b, :, :, None]], dim=2)[: len(people)]
        assert torch.equal(found.cpu(), torch.from_numpy(people).float()), f"image {b}"


def run(workload: str, settings: Settings) -> list[Row]:
    maps = settings.place(crowd(IMAGES[workload]))
    parsers: dict[str, Callable[..., list[Table]]] = {
        "NumPy + scipy": common_parser,
        "NumPy, missing joints": functools.partial(common_parser, every_joint=False),
    }
    if not installed("scipy"):
        parsers = {}
    ours = instembed.group_keypoints(*maps, return_details=True)
    for parser in parsers.values():
        check(ours, parser(*maps))

    def calls(maps: tuple[Tensor, Tensor]) -> dict[str, Call]:
        return {
            OURS: functools.partial(instembed.group_keypoints, *maps),
            **{name: functools.partial(parser, *maps) for name, parser in parsers.items()},
            FLOOR: lambda: (maps[0].max(), maps[1].max()),
        }

    work = Work(maps[0].nbytes + maps[1].nbytes)
    return compare(("group_keypoints", workload, "forward"), calls, maps, settings, work)


def profile(workload: str, settings: Settings) -> Call:
    return functools.partial(instembed.group_keypoints, *settings.place(crowd(IMAGES[workload])))


ENTRIES = [Entry("group_keypoints", ("group_keypoints",), tuple(IMAGES), run, profile)]
