"""Trains a small network to find people who hide each other, groups their joints, and reads poses in 3-D.

    pip install "instembed[demo]"
    python examples/group_people.py                            # about four minutes on two CPU cores
    python examples/group_people.py --seconds 20 --output quick.png

The people are stick figures with depth, drawn here: they, and boards between them, hide each other's joints.
The network gives heatmaps, tags and location maps. ``instembed.associative_embedding_loss`` trains the tags,
``instembed.group_keypoints`` makes people of the joints, and ``instembed.read_location_maps`` reads the
joints of each in metres, the hidden ones at others of the same limb. All figures printed come from this run.
"""

from __future__ import annotations

import argparse
import colorsys
import contextlib
import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

import instembed
from instembed.readout.location_maps import BODY_15

SIZE, STRIDE = 128, 2  # pixels; pixels of the image a pixel of the maps
FOCAL = 152.0  # pixels
NEAR, FAR = 2.9, 5.2  # metres from the camera
MAX_PEOPLE = 6
BATCH = 4
POOL, HELD_OUT = 2000, 64
PEAK_LR = 4e-3
PEAK_THRESHOLD = 0.15
TAG_SPREAD = 6.0  # the tag of the right border at the start; the left one's is its negative

Array = npt.NDArray[np.float32]

JOINTS = len(BODY_15.joints)
JOINT = {name: k for k, name in enumerate(BODY_15.joints)}
NECK, PELVIS = JOINT["neck"], JOINT["pelvis"]

# COCO's, and CrowdPose's for the head and the neck.
SIGMA = {"head": 0.079, "neck": 0.079, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062}
SIGMA |= {"hip": 0.107, "knee": 0.087, "ankle": 0.089, "pelvis": 0.107}
SIGMAS = np.array([SIGMA[name.split("_")[-1]] for name in BODY_15.joints])

# Body parts: two joints and the radius in metres.
PARTS = [
    ("neck", "pelvis", 0.11),
    ("right_hip", "left_hip", 0.09),
    ("right_shoulder", "left_shoulder", 0.065),
    ("neck", "head", 0.05),
    ("head", "head", 0.105),
]
for side in ("right", "left"):
    PARTS += [
        (f"{side}_shoulder", f"{side}_elbow", 0.058),
        (f"{side}_elbow", f"{side}_wrist", 0.05),
        (f"{side}_hip", f"{side}_knee", 0.078),
        (f"{side}_knee", f"{side}_ankle", 0.06),
    ]
BONES = [(NECK, JOINT["head"]), (NECK, PELVIS)]
for limb in BODY_15.limbs[1:]:  # from the extremity inward
    BONES += [*pairwise(limb), (limb[-1], NECK if "shoulder" in BODY_15.joints[limb[-1]] else PELVIS)]


# Scenes. Camera coordinates in metres: x to the right, y down, z away from the camera.


class Figure(NamedTuple):
    joints: Array  # (JOINTS, 3)
    color: Array


class Board(NamedTuple):
    """A board in front of some people and behind others."""

    center: Array  # (3,)
    half: Array  # (2,) metres
    angle: float
    color: Array


class Scene(NamedTuple):
    figures: list[Figure]
    boards: list[Board]
    light: Array  # (3,) of the background


def random_color(rng: np.random.Generator) -> Array:
    hue, saturation, value = rng.uniform((0, 0.45, 0.75), (1, 0.85, 1.0)).tolist()
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def random_pose(rng: np.random.Generator) -> Array:
    """(JOINTS, 3) metres from the pelvis: somebody who turns by up to 70 degrees from the camera."""

    def towards(direction: npt.NDArray[np.float64], spread: float) -> npt.NDArray[np.float64]:
        direction = direction / np.linalg.norm(direction) + spread * rng.normal(size=3)
        return direction / np.linalg.norm(direction)

    yaw = np.radians(rng.uniform(-70, 70))
    down = np.array([0.0, 1.0, 0.0])
    left, front = np.array([np.cos(yaw), 0, np.sin(yaw)]), np.array([np.sin(yaw), 0, -np.cos(yaw)])
    up = towards(-down, 0.12)
    pose = np.zeros((JOINTS, 3))
    pose[NECK] = 0.52 * up
    pose[JOINT["head"]] = pose[NECK] + 0.25 * towards(up, 0.15)
    for side, out in (("right", -left), ("left", left)):
        shoulder, hip = pose[NECK] + 0.18 * out - 0.03 * up, 0.11 * out
        upper_arm = towards(down + 0.7 * out + 0.3 * front, 0.5)
        forearm = towards(upper_arm + 0.6 * front, 0.5)
        thigh = towards(down + 0.15 * out + 0.25 * front, 0.28)
        shin = towards(thigh + 0.8 * down - 0.3 * front, 0.22)
        elbow, knee = shoulder + 0.29 * upper_arm, hip + 0.43 * thigh
        points = shoulder, elbow, elbow + 0.26 * forearm, hip, knee, knee + 0.42 * shin
        for name, point in zip(("shoulder", "elbow", "wrist", "hip", "knee", "ankle"), points, strict=True):
            pose[JOINT[f"{side}_{name}"]] = point
    return (pose * rng.uniform(0.9, 1.1)).astype(np.float32)


def at(x: float, y: float, z: float) -> Array:
    """The point that is seen at pixel (x, y), z away."""
    return np.array([(x - SIZE / 2) * z / FOCAL, (y - SIZE / 2) * z / FOCAL, z], np.float32)


def random_scene(rng: np.random.Generator) -> Scene:
    figures, boards = [], []
    crowd = int(rng.integers(2, MAX_PEOPLE + 1))
    for slot in (np.arange(crowd) + rng.uniform(0.15, 0.85, crowd)) / crowd:  # side by side, more or less
        x, y = 0.1 + 0.8 * slot, rng.uniform(0.45, 0.55)
        place = at(x * SIZE, y * SIZE, rng.uniform(NEAR, FAR))
        figures.append(Figure(random_pose(rng) + place, random_color(rng)))
    for _ in range(rng.integers(1, 4)):
        place = at(rng.uniform(0.1, 0.9) * SIZE, rng.uniform(0.3, 0.8) * SIZE, rng.uniform(NEAR - 0.5, FAR))
        half = rng.uniform((0.05, 0.25), (0.2, 0.6)).astype(np.float32)
        boards.append(Board(place, half, rng.uniform(-0.4, 0.4), 0.6 * random_color(rng)))
    light = np.array(colorsys.hsv_to_rgb(rng.uniform(0.5, 0.75), 0.3, rng.uniform(0.3, 0.5)), np.float32)
    return Scene(figures, boards, light)


def project(points: Array) -> Array:
    """(..., 3) to pixels (..., 2), pixel centres at whole numbers."""
    return FOCAL * points[..., :2] / points[..., 2:] + (SIZE - 1) / 2


class Canvas:
    """Color, depth and owner of each pixel; the nearest surface stays. Larger for pictures."""

    def __init__(self, light: Array, size: int) -> None:
        self.size, self.scale = size, size / SIZE
        rows = np.linspace(0.75, 1.25, size, dtype=np.float32)[:, None, None]
        self.color = np.broadcast_to(light * rows, (size, size, 3)).copy()
        self.depth = np.full((size, size), np.inf, np.float32)
        self.owner = np.zeros((size, size), np.int64)

    def window(self, points: Array, reach: float) -> tuple[tuple[slice, slice], Array, Array]:
        """The pixels within `reach` of points, all in pixels of SIZE: slices, x and y."""
        low = np.clip((points.min(0) - reach) * self.scale, 0, self.size).astype(int)
        high = np.clip((points.max(0) + reach) * self.scale + 2, 0, self.size).astype(int)
        x, y = (((np.arange(low[i], high[i]) + 0.5) / self.scale - 0.5).astype(np.float32) for i in (0, 1))
        return (slice(low[1], high[1]), slice(low[0], high[0])), x[None, :], y[:, None]

    def put(self, where: tuple[slice, slice], inside: Any, depth: Any, color: Any, owner: int) -> None:
        nearer = inside & (depth < self.depth[where])
        self.depth[where][nearer] = np.broadcast_to(depth, nearer.shape)[nearer]
        self.color[where][nearer] = np.broadcast_to(color, (*nearer.shape, 3))[nearer]
        self.owner[where][nearer] = owner

    def part(self, ends: Array, radius: float, color: Array, owner: int) -> None:
        """A round limb, darker towards the rim."""
        (a, b), (za, zb) = project(ends), ends[:, 2]
        where, x, y = self.window(np.stack([a, b]), FOCAL * radius / min(za, zb))
        d = b - a
        t = np.clip(((x - a[0]) * d[0] + (y - a[1]) * d[1]) / max(float(d @ d), 1e-6), 0, 1)
        z = za + t * (zb - za)
        off = np.hypot(x - a[0] - t * d[0], y - a[1] - t * d[1]) * z / (FOCAL * radius)  # 1 at the rim
        height = np.sqrt(np.maximum(1 - off**2, 0))
        self.put(where, off < 1, z - radius * height, color * (0.4 + 0.6 * height)[..., None], owner)

    def board(self, board: Board) -> None:
        center, half = project(board.center), FOCAL * board.half / board.center[2]
        where, x, y = self.window(center[None], float(np.hypot(*half)))
        cos, sin = np.cos(board.angle), np.sin(board.angle)
        u, v = (x - center[0]) * cos + (y - center[1]) * sin, (y - center[1]) * cos - (x - center[0]) * sin
        planks = 0.85 + 0.15 * np.sign(np.sin(4 * np.pi * v / half[0]))
        inside = (abs(u) < half[0]) & (abs(v) < half[1])
        self.put(where, inside, board.center[2], planks[..., None] * board.color, -1)

    def finish(self, light: Array) -> Array:
        """What is farther away fades into the background."""
        clear = np.exp(-0.35 * np.maximum(self.depth - NEAR + 0.5, 0))[..., None]
        far = np.isinf(self.depth)[..., None]
        return np.clip(np.where(far, self.color, clear * self.color + (1 - clear) * light), 0, 1)


def render(scene: Scene, size: int = SIZE) -> tuple[Array, Canvas]:
    canvas = Canvas(scene.light, size)
    for board in scene.boards:
        canvas.board(board)
    for owner, figure in enumerate(scene.figures, start=1):
        for a, b, radius in PARTS:
            ends = figure.joints[[JOINT[a], JOINT[b]]]
            right = a.startswith("right") and b.startswith("right")
            color = 0.3 * figure.color + 0.7 if right else figure.color  # or nobody could tell sides apart
            canvas.part(ends, radius, color, owner)
    return canvas.finish(scene.light), canvas


class Scenes(NamedTuple):
    """What the network is trained and measured with; people are padded to MAX_PEOPLE."""

    images: Tensor  # (N, 3, SIZE, SIZE) in 0..1
    keypoints: Tensor  # (N, P, JOINTS, 2) in pixels of the image
    visible: Tensor  # (N, P, JOINTS) bool
    poses: Tensor  # (N, P, JOINTS, 3) metres from the neck
    areas: Tensor  # (N, P) pixels, 0 for nobody

    def take(self, index: Tensor) -> Scenes:
        return Scenes(*(field[index] for field in self))


def draw_scenes(count: int, rng: np.random.Generator, what: str) -> tuple[Scenes, list[Scene]]:
    images = torch.empty(count, 3, SIZE, SIZE)
    keypoints = torch.full((count, MAX_PEOPLE, JOINTS, 2), -1.0)
    visible = torch.zeros(count, MAX_PEOPLE, JOINTS, dtype=torch.bool)
    poses, areas = torch.zeros(count, MAX_PEOPLE, JOINTS, 3), torch.zeros(count, MAX_PEOPLE)
    drawn = []
    for n in trange(count, desc=what, unit="scene"):
        scene = random_scene(rng)
        while True:  # who can hardly be seen is left out
            image, canvas = render(scene)
            seen = [visible_joints(figure, p + 1, canvas) for p, figure in enumerate(scene.figures)]
            kept = [f for f, joints in zip(scene.figures, seen, strict=True) if joints.sum() >= 5]
            if len(kept) == len(scene.figures):
                break
            scene = scene._replace(figures=kept)
        images[n] = torch.from_numpy(image).permute(2, 0, 1)
        for p, figure in enumerate(scene.figures):
            keypoints[n, p] = torch.from_numpy(project(figure.joints))
            visible[n, p] = torch.from_numpy(seen[p])
            poses[n, p] = torch.from_numpy(figure.joints - figure.joints[NECK])
            areas[n, p] = float((canvas.owner == p + 1).sum())
        drawn.append(scene)
    return Scenes(images, keypoints, visible, poses, areas), drawn


def visible_joints(figure: Figure, owner: int, canvas: Canvas) -> npt.NDArray[np.bool_]:
    """Joints at whose pixel the figure itself is nearest, and not with a part well in front of the joint."""
    x, y = np.rint(project(figure.joints)).astype(int).T
    inside = (x >= 0) & (x < SIZE) & (y >= 0) & (y < SIZE)
    x, y = x.clip(0, SIZE - 1), y.clip(0, SIZE - 1)
    return inside & (canvas.owner[y, x] == owner) & (canvas.depth[y, x] > figure.joints[:, 2] - 0.2)


def augmented(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Another order of the colors, and noise. No mirror: it would make a right arm of a left one."""
    images = images[:, torch.from_numpy(rng.permutation(3))]
    return images + 0.03 * torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))


def to_maps(keypoints: Tensor) -> Tensor:
    """From pixels of the image to pixels of the maps."""
    return (keypoints + 0.5) / STRIDE - 0.5


def to_image(keypoints: Tensor) -> Tensor:
    return (keypoints + 0.5) * STRIDE - 0.5


# Network


class Maps(NamedTuple):
    heatmaps: Tensor  # (B, JOINTS, H, W) logits
    tags: Tensor  # (B, JOINTS, H, W)
    locations: Tensor  # (B, 3 JOINTS, H, W) metres from the neck


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Network(nn.Module):
    """A small U-Net. 2x2 pixels become channels at its entry, and maps have half the image's size."""

    def __init__(self, widths: tuple[int, ...] = (32, 48, 72, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3 * STRIDE**2 + 2, widths[0]), block(widths[0], widths[0]))
        self.down = nn.ModuleList(
            nn.Sequential(block(a, b, stride=2), block(b, b)) for a, b in pairwise(widths)
        )
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Sequential(block(a, a), block(a, a)) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 5 * JOINTS, 1)
        nn.init.constant_(self.head.bias[:JOINTS], -4.0)  # type: ignore[index]  # most pixels are no joint
        axis = torch.linspace(-1, 1, SIZE // STRIDE)
        self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None])
        self.grid: Tensor

    def forward(self, images: Tensor) -> Maps:
        place = self.grid.expand(len(images), -1, -1, -1)
        x = torch.cat([F.pixel_unshuffle(images - 0.4, STRIDE), place], dim=1)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(x)
        for narrow, up, skip in zip(reversed(self.narrow), reversed(self.up), reversed(skips), strict=True):
            x = up(skip + F.interpolate(narrow(x), scale_factor=2.0))
        heatmaps, tags, locations = self.head(x).split([JOINTS, JOINTS, 3 * JOINTS], dim=1)
        # A convolution cannot tell two equal figures apart, their place does: tags start from the column.
        return Maps(heatmaps, tags + TAG_SPREAD * self.grid[:, 1:], locations)


# Training


def blobs(keypoints: Tensor, visible: Tensor, size: int) -> Tensor:
    """Heatmaps (B, JOINTS, size, size) of joints (B, P, JOINTS, 2) in pixels of the maps."""
    axis = torch.arange(size)
    x, y = (torch.exp(-((axis - c[..., None]) ** 2) / (2 * 1.3**2)) for c in keypoints.unbind(-1))
    return ((y * visible[..., None])[..., :, None] * x[..., None, :]).amax(dim=1)


def reading_rules() -> Tensor:
    """(JOINTS, JOINTS) bool: at which joints location maps say where which joints are: those of the limb,
    and at a root all."""
    rules = torch.eye(JOINTS, dtype=torch.bool)
    for limb in BODY_15.limbs:
        for joint in limb:
            rules[joint, list(limb)] = True
    rules[list(BODY_15.root)] = True
    return rules


RULES = reading_rules()


def losses(maps: Maps, scenes: Scenes) -> dict[str, Tensor]:
    keypoints = to_maps(scenes.keypoints)
    target = blobs(keypoints, scenes.visible, maps.heatmaps.shape[-1])
    each = F.binary_cross_entropy_with_logits(maps.heatmaps, target, reduction="none")
    # A joint that is found will be a pixel off at times: tags and locations are trained around it.
    around = keypoints + torch.randint(-1, 2, keypoints.shape)
    read = instembed.gather_at(maps.locations, around, valid=scenes.visible).unflatten(3, (JOINTS, 3))
    inside = (around > -0.5).all(3) & (around < maps.heatmaps.shape[-1] - 0.5).all(3)
    used = ((scenes.visible & inside)[..., None] & RULES)[..., None]  # at the joint, of the other joint
    off = F.smooth_l1_loss(read, scenes.poses[:, :, None].expand_as(read), reduction="none", beta=0.1)
    return {
        "heatmaps": 150 * (each * (1 + 4 * target)).mean(),
        "tags": instembed.associative_embedding_loss(maps.tags, around, scenes.visible),
        "locations": 60 * (off * used).sum() / (3 * used.sum()).clamp(min=1),
    }


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s, {postfix}"


def train(network: Network, scenes: Scenes, seconds: float, rng: np.random.Generator) -> int:
    """Trains by the clock and returns the number of steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=1e-2)
    network.train()
    start, progress, steps = perf_counter(), 0.0, 0
    with tqdm(total=round(seconds), desc="training", unit="s", bar_format=BAR) as bar:
        while progress < 1:
            for group in optimizer.param_groups:  # up over the first 5 %, then a cosine down to zero
                group["lr"] = PEAK_LR * min(progress / 0.05 + 0.05, 0.5 + 0.5 * np.cos(np.pi * progress))
            picked = torch.from_numpy(rng.choice(len(scenes.images), BATCH, replace=False))
            batch = scenes.take(picked)
            parts = losses(network(augmented(batch.images, rng)), batch)
            optimizer.zero_grad()
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            steps += 1
            progress = (perf_counter() - start) / seconds
            bar.n = min(round(progress * seconds), round(seconds))
            bar.set_postfix_str(", ".join(f"{name} {part.item():.2f}" for name, part in parts.items()))
    return steps


# People


class People(NamedTuple):
    """Of a batch of images, padded; what stands beside ``Poses``."""

    keypoints: Tensor  # (B, P, JOINTS, 2) in pixels of the image
    scores: Tensor  # (B, P)
    number: Tensor  # (B,)
    keypoint_scores: Tensor  # (B, P, JOINTS)
    seen: Tensor  # (B, P, JOINTS) bool: a peak, not a guess
    poses: Tensor  # (B, P, JOINTS, 3) metres from the neck


@torch.inference_mode()
def predict(network: Network, images: Tensor) -> Maps:
    network.eval()
    parts = zip(*(network(chunk) for chunk in images.split(16)), strict=True)
    maps = Maps(*(torch.cat(part).contiguous() for part in parts))
    return maps._replace(heatmaps=maps.heatmaps.sigmoid())


def find_people(maps: Maps) -> People:
    poses = instembed.group_keypoints(
        maps.heatmaps, maps.tags, peak_threshold=PEAK_THRESHOLD, return_details=True
    )
    seen = poses.visibility == 2
    return People(
        to_image(poses.keypoints),
        poses.scores,
        poses.num_people,
        poses.keypoint_scores,
        seen,
        instembed.read_location_maps(maps.locations, poses.keypoints, seen),
    )


# Scores


def coco_scores(people: People, truth: Scenes) -> dict[str, float]:
    """Average precision over object keypoint similarity, by pycocotools. Only visible joints count."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for n in range(len(truth.images)):
        for points, visible, area in zip(truth.keypoints[n], truth.visible[n], truth.areas[n], strict=True):
            if area == 0:
                continue
            low, high = points[visible].amin(0), points[visible].amax(0)
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": n,
                "category_id": 1,
                "iscrowd": 0,
            }
            annotation |= {"iscrowd": 0, "area": float(area), "bbox": [*low.tolist(), *(high - low).tolist()]}
            flags = 2.0 * visible[:, None]
            annotation["keypoints"] = torch.cat([points * visible[:, None], flags], 1).flatten().tolist()
            annotations.append(annotation | {"num_keypoints": int(visible.sum())})
        for p in range(int(people.number[n])):
            joints = torch.cat([people.keypoints[n, p], people.keypoint_scores[n, p, :, None]], dim=1)
            result = {"image_id": n, "category_id": 1, "score": float(people.scores[n, p])}
            results.append(result | {"keypoints": joints.flatten().tolist()})
    with contextlib.redirect_stdout(io.StringIO()):  # it talks a lot
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n, "width": SIZE, "height": SIZE} for n in range(len(truth.images))],
            "categories": [{"id": 1, "name": "person", "keypoints": list(BODY_15.joints)}],
            "annotations": annotations,
        }
        coco.createIndex()
        if not results:
            return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
        evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = SIGMAS
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3].tolist(), strict=True))


def match_people(people: People, truth: Scenes, n: int) -> list[tuple[int, int]]:
    """Pairs of a found person and a true one of image n whose keypoint similarity is at least 0.5."""
    number = int(people.number[n])
    squares = (people.keypoints[n, :number, None] - truth.keypoints[n]).square().sum(3)
    scale = 2 * truth.areas[n, :, None].clamp(min=1) * torch.from_numpy((2 * SIGMAS) ** 2).float()
    visible = truth.visible[n]
    similar = (torch.exp(-squares / scale) * visible).sum(2) / visible.sum(1).clamp(min=1)
    pairs = []
    for p in range(number):  # by descending score
        best = int(similar[p].argmax())
        if similar[p, best] >= 0.5:
            pairs.append((p, best))
            similar[:, best] = 0
    return pairs


class DepthScores(NamedTuple):
    """Mean distance to the true joints in millimetres, root at the neck: of visible and of hidden joints."""

    read: tuple[float, float]  # by read_location_maps
    own_pixel: tuple[float, float]  # at the joint's own, true pixel
    mean_pose: tuple[float, float]  # of the training set: what not looking gives
    joints: tuple[int, int]


def depth_scores(people: People, maps: Maps, truth: Scenes, mean_pose: Tensor) -> DepthScores:
    """Over the joints in the image of people who were found."""
    own = instembed.gather_at(maps.locations, to_maps(truth.keypoints)).unflatten(3, (JOINTS, 3))
    own = own.diagonal(dim1=2, dim2=3).movedim(-1, 2)  # of each joint the location of itself
    off: dict[str, list[Tensor]] = {"read": [], "own_pixel": [], "mean_pose": []}
    hidden = []
    for n in range(len(truth.images)):
        for p, t in match_people(people, truth, n):
            points, exact = truth.keypoints[n, t], truth.poses[n, t]
            counted = (points > 0).all(1) & (points < SIZE - 1).all(1) & (torch.arange(JOINTS) != NECK)
            found = {"read": people.poses[n, p], "own_pixel": own[n, t], "mean_pose": mean_pose}
            for name, pose in found.items():
                off[name].append(1000 * (pose - exact).norm(dim=1)[counted])
            hidden.append(~truth.visible[n, t, counted])
    if not hidden:
        nothing = (float("nan"), float("nan"))
        return DepthScores(nothing, nothing, nothing, joints=(0, 0))
    gone = torch.cat(hidden)
    means = {}
    for name, values in off.items():
        joined = torch.cat(values)
        means[name] = (joined[~gone].mean().item(), joined[gone].mean().item())
    number = int(gone.sum())
    return DepthScores(**means, joints=(len(gone) - number, number))


def median_ms(maps: Maps, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats):
        start = perf_counter()
        instembed.group_keypoints(maps.heatmaps, maps.tags, peak_threshold=PEAK_THRESHOLD)
        times.append(perf_counter() - start)
    return 1e3 * float(np.median(times)) / len(maps.tags)


def report(people: People, maps: Maps, truth: Scenes, mean_pose: Tensor) -> None:
    there = int((truth.areas > 0).sum())
    inside = ((truth.keypoints > 0) & (truth.keypoints < SIZE - 1)).all(3) & (truth.areas > 0)[..., None]
    hidden = float((inside & ~truth.visible).sum() / inside.sum())
    print(f"\n{len(truth.images)} held-out scenes, {there} people, {100 * hidden:.0f} % of joints hidden")
    scores = coco_scores(people, truth)
    print("keypoints (OKS, pycocotools)   " + "   ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    depth = depth_scores(people, maps, truth, mean_pose)
    count = f"{depth.joints[0]} visible", f"{depth.joints[1]} hidden"
    print(f"\n{'mean error in 3-D, mm':40}{count[0]:>14}{count[1]:>14}")
    rows = {"read_location_maps": depth.read, "at the joint's own pixel": depth.own_pixel}
    for name, row in (rows | {"mean pose, without looking": depth.mean_pose}).items():
        print(f"{name:40}{row[0]:14.0f}{row[1]:14.0f}")
    print(f"\ngroup_keypoints: {median_ms(maps):.2f} ms an image, {torch.get_num_threads()} threads")


# Picture

INK, DIM, PAPER = "#f2f2ee", "#9aa0a8", "#15171c"
COLORS = ["#ff5d5d", "#4cc9f0", "#ffd166", "#80ed99", "#c77dff", "#ff9f45", "#f472b6", "#a3b8ff"]


def place(keypoints: Tensor, seen: Tensor, pose: Tensor) -> Tensor:
    """Where the neck is (3,), in metres: a pose and the pixels at which its joints are seen fix it.

    Least squares over X and Z in (x + X) / (z + Z) = given, for x and y of each joint.
    """
    rays = (keypoints[seen] - (SIZE - 1) / 2) / FOCAL
    rows = torch.zeros(len(rays), 2, 3)
    rows[:, 0, 0] = rows[:, 1, 1] = 1
    rows[:, :, 2] = -rays
    right = rays * pose[seen, 2:] - pose[seen, :2]
    return torch.linalg.lstsq(rows.flatten(0, 1), right.flatten()[:, None]).solution[:, 0]


def draw(path: Path, scenes: list[Scene], people: People, truth: Scenes, shown: list[int]) -> None:
    """Above, images with the people that were found; below, their poses in 3-D beside the true ones."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    columns = len(shown)
    figure = plt.figure(figsize=(3.6 * columns, 7.4), dpi=130, facecolor=PAPER)
    for column, n in enumerate(shown):
        image, _ = render(scenes[n], 4 * SIZE)
        flat = figure.add_axes((column / columns + 0.006, 0.445, 1 / columns - 0.012, 0.475))
        flat.imshow(image, extent=(-0.5, SIZE - 0.5, SIZE - 0.5, -0.5), interpolation="bilinear")
        flat.set(xlim=(-0.5, SIZE - 0.5), ylim=(SIZE - 0.5, -0.5))
        flat.axis("off")
        deep = figure.add_axes((column / columns - 0.02, -0.03, 1 / columns + 0.04, 0.52), projection="3d")
        style_space(deep)
        for person in scenes[n].figures:
            draw_bones(deep.plot, space(person.joints), None, color=DIM, alpha=0.5, linewidth=1)
        necks = dict(match_people(people, truth, n))
        for p in range(int(people.number[n])):
            seen, pose, points = people.seen[n, p], people.poses[n, p], people.keypoints[n, p].clone()
            if seen.sum() < 6:  # fragments
                continue
            color = COLORS[p % len(COLORS)]
            guessed = pose + place(points, seen, pose)
            points[~seen] = torch.from_numpy(project(guessed.numpy()))[~seen]
            draw_bones(flat.plot, points.numpy(), seen, color=color, linewidth=2.2)
            dots: dict[str, Any] = {"s": 12, "linewidths": 0.8, "zorder": 3}
            flat.scatter(*points[seen].t().numpy(), color=color, edgecolors=PAPER, **dots)
            flat.scatter(*points[~seen].t().numpy(), facecolors=PAPER, edgecolors=color, **dots)
            if p in necks:
                neck = scenes[n].figures[necks[p]].joints[NECK]
                draw_bones(deep.plot, space(pose.numpy() + neck), seen, color=color, linewidth=2)
    texts = [
        (0.008, 0.957, "left", INK, 13, "People who hide each other, by associative embedding"),
        (0.992, 0.957, "right", DIM, 10, "dotted: hidden, read from the location maps at other joints"),
        (0.008, 0.022, "left", DIM, 10, "the poses in 3-D, at the true necks; grey: the true poses"),
    ]
    for x, y, side, color, size, text in texts:
        figure.text(x, y, text, ha=side, va="center", color=color, fontsize=size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor=PAPER)
    plt.close(figure)


def draw_bones(plot: Callable[..., Any], joints: Array, seen: Tensor | None, **style: Any) -> None:
    """Joints (JOINTS, axes). A bone with a joint that was not seen is dotted."""
    for a, b in BONES:
        dotted = seen is not None and not (seen[a] and seen[b])
        line = {"linestyle": (0, (1, 1.5))} if dotted else {"solid_capstyle": "round"}
        plot(*joints[[a, b]].T, **style, **line)


def space(points: Array) -> Array:
    """Camera coordinates as matplotlib's: depth to the back, up is up."""
    return points[:, [0, 2, 1]] * np.array([1, 1, -1], np.float32)


def style_space(axes: Any) -> None:
    axes.set(xlim=(-1.7, 1.7), ylim=(NEAR - 0.3, FAR + 0.3), zlim=(-1.15, 1.15))
    axes.set_box_aspect((3.4, FAR - NEAR + 0.6, 2.3), zoom=1.2)
    axes.view_init(elev=24, azim=-58)
    axes.patch.set_alpha(0)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0.03))
        axis.line.set_color((1, 1, 1, 0.1))
        axis._axinfo["grid"]["color"] = (1, 1, 1, 0.06)
        axis.set_ticklabels([])
        axis.set_tick_params(length=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=210.0, help="training time (default: 210)")
    parser.add_argument("--output", type=Path, default=Path("outputs/group_people.png"), help="the picture")
    parser.add_argument("--scenes", type=int, default=POOL, help=f"scenes to train on (default: {POOL})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = perf_counter()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    scenes, _ = draw_scenes(max(options.scenes, BATCH), rng, "drawing scenes")
    truth, drawn = draw_scenes(HELD_OUT, rng, "held-out scenes")

    network = Network()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    steps = train(network, scenes, options.seconds, rng)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{steps} steps of {BATCH} scenes, {parameters / 1000:.0f}k parameters")

    maps = predict(network, truth.images)
    people = find_people(maps)
    report(people, maps, truth, scenes.poses[scenes.areas > 0].mean(0))
    # The pictures are chosen by the scenes alone: five people, and the most joints hidden.
    hidden = ((truth.areas > 0)[..., None] & ~truth.visible).sum((1, 2))
    shown = torch.argsort(hidden * ((truth.areas > 0).sum(1) == 5), descending=True)[:4].tolist()
    draw(options.output, drawn, people, truth, shown)
    print(f"\nwrote {options.output}; {perf_counter() - begin:.0f} s in total")


if __name__ == "__main__":
    main()
