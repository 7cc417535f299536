"""Captioned images of coloured shapes, and a checker that reads them: the text demo's world.

The checker knows the palette and the outlines, but nothing of how an image was made: it finds
patches of colour and compares each patch's outline with those of the shapes.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SIDE = 32
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 5.0, "large": 6.7}  # half the width, in pixels
# The centre of each object; of two, in the order top to bottom or left to right.
PLACES = {
    "top left": ((8, 8),),
    "top": ((16, 8),),
    "top right": ((24, 8),),
    "left": ((8, 16),),
    "middle": ((16, 16),),
    "right": ((24, 16),),
    "bottom left": ((8, 24),),
    "bottom": ((16, 24),),
    "bottom right": ((24, 24),),
    "two, above": ((16, 7.5), (16, 24.5)),
    "two, left": ((7.5, 16), (24.5, 16)),
}
BACKGROUND = (25, 25, 30)
FINE = 8  # scale of the drawing before it is reduced
PATCH = 16  # an outline is compared at this size
LEAST_AREA = 12  # pixels: smaller patches are specks


class Thing(NamedTuple):
    """One object: a colour, a shape, half its width and its centre (x, y), in pixels."""

    colour: str
    shape: str
    size: float
    centre: tuple[float, float]


class Scene(NamedTuple):
    """A caption and what it says: one object, or two."""

    caption: str
    things: tuple[Thing, ...]


def draw(scene: Scene, random: np.random.Generator) -> np.ndarray:
    """An image (SIDE, SIDE, 3) uint8 of a scene, a little off its place and colour."""
    canvas = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BACKGROUND)
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        centre = np.array(thing.centre) + random.uniform(-0.5, 0.5, 2)
        colour = np.clip(COLOURS[thing.colour] + random.integers(-8, 9, 3), 0, 255)
        size = thing.size + random.uniform(-0.4, 0.4)
        for outline in _outlines(thing.shape):
            points = [tuple(((centre + size * np.array(p)) * FINE).tolist()) for p in outline]
            brush.polygon(points, fill=tuple(int(c) for c in colour))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def _outlines(shape: str) -> list[list[tuple[float, float]]]:
    """Polygons in [-1, 1] x [-1, 1] whose union is the shape."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return [[(float(np.cos(a)), float(np.sin(a))) for a in angles]]
    if shape == "square":
        return [_box(1, 1)]
    if shape == "triangle":
        return [[(0, -1), (1, 1), (-1, 1)]]
    return [_box(1, 0.33), _box(0.33, 1)]


def _box(x: float, y: float) -> list[tuple[float, float]]:
    return [(-x, -y), (x, -y), (x, y), (-x, y)]


class Found(NamedTuple):
    """A patch that the checker sees: its colour, shape, size and centre (x, y)."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]


def find_things(pixels: np.ndarray) -> list[Found]:
    """The patches of colour in an image (SIDE, SIDE, 3) uint8, the largest first."""
    palette = np.array([BACKGROUND, *COLOURS.values()], np.float32)
    distance = np.abs(pixels[:, :, None].astype(np.float32) - palette).sum(-1)
    inside = distance.argmin(-1) > 0
    patches = np.asarray(ndimage.label(inside)[0])  # pyright: ignore[reportIndexIssue]
    found = []
    for patch in range(1, int(patches.max()) + 1):
        mask = patches == patch
        if mask.sum() < LEAST_AREA:
            continue
        # The edge mixes with the background: the colour is read in the patch's inside.
        core = ndimage.binary_erosion(mask)
        votes = distance[core if core.any() else mask][:, 1:].argmin(-1)
        colour = list(COLOURS)[np.bincount(votes).argmax()]
        y, x = (float(place.mean()) for place in np.nonzero(mask))
        shape = _nearest_shape(mask)
        half = np.sqrt(mask.sum() / _OUTLINES[shape].mean()) / 2
        size = min(SIZES, key=lambda name, half=half: abs(SIZES[name] - half))
        thing = Found(colour, shape, size, (x, y))
        found.append((int(mask.sum()), thing))
    return [thing for _, thing in sorted(found, key=lambda item: -item[0])]


def _nearest_shape(mask: np.ndarray) -> str:
    """The shape whose outline, stretched to the patch's box, overlaps it best."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    seen = Image.fromarray(box.astype(np.uint8) * 255).resize((PATCH, PATCH)).convert("L")
    patch = np.asarray(seen) > 127
    overlap = {
        shape: (patch & outline).sum() / (patch | outline).sum()
        for shape, outline in _OUTLINES.items()
    }
    return max(overlap, key=overlap.__getitem__)


def _outline_mask(shape: str) -> np.ndarray:
    places = (np.arange(PATCH) + 0.5) / PATCH * 2 - 1
    x, y = np.meshgrid(places, places)
    inside = {
        "circle": x**2 + y**2 <= 1,
        "square": np.ones_like(x, bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "cross": (np.abs(x) <= 0.36) | (np.abs(y) <= 0.36),
    }
    return inside[shape]


_OUTLINES = {shape: _outline_mask(shape) for shape in SHAPES}


class Asked(NamedTuple):
    """What a prompt asks of one object; size None: any."""

    size: str | None
    colour: str
    shape: str


class Verdict(NamedTuple):
    """How an image follows its prompt.

    right: for each object, whether one of its colour and shape is there. sizes: for each object
    that is there and has a size, whether it is right. relation: both objects are there and stand
    as asked; None where the prompt has one object. only: nothing else is there.
    """

    right: tuple[bool, ...]
    sizes: tuple[bool, ...]
    relation: bool | None
    only: bool

    @property
    def all(self) -> bool:
        """Whether nothing is wrong."""
        return all((*self.right, *self.sizes, self.relation is not False, self.only))


def check(things: Sequence[Asked], relation: str | None, pixels: np.ndarray) -> Verdict:
    """Compare an image (SIDE, SIDE, 3) uint8 with the objects of a prompt.

    relation: of the first object to the second: above, below, left, right or beside.
    """
    found = find_things(pixels)
    candidates = [
        [None, *(f for f in found if (f.colour, f.shape) == (thing.colour, thing.shape))]
        for thing in things
    ]
    # Two objects of one colour and shape can be either patch: the reading that fits best counts.
    readings = [
        _verdict(things, relation, matched, len(found))
        for matched in itertools.product(*candidates)
        if len(things) == 1 or matched[0] is None or matched[0] is not matched[1]
    ]
    return max(readings, key=lambda v: (sum(v.right), v.relation is True, sum(v.sizes)))


def _verdict(
    things: Sequence[Asked], relation: str | None, matched: Sequence[Found | None], patches: int
) -> Verdict:
    """matched: the patch of each object, or None. patches: how many there are in the image."""
    right = tuple(found is not None for found in matched)
    sizes = tuple(
        found.size == thing.size
        for thing, found in zip(things, matched, strict=True)
        if found and thing.size
    )
    stands = None
    if relation:
        first, second = matched
        stands = bool(first and second and _stands(relation, first.centre, second.centre))
    return Verdict(right, sizes, stands, patches == len(things))


def _stands(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    x, y = (a - b for a, b in zip(first, second, strict=True))
    return {
        "above": -y > abs(x),
        "below": y > abs(x),
        "left": -x > abs(y),
        "right": x > abs(y),
        "beside": abs(x) > abs(y),
    }[relation]


def describe(pixels: np.ndarray) -> str:
    """What the checker sees in an image, in words."""
    found = [f"a {f.size} {f.colour} {f.shape}" for f in find_things(pixels)]
    return " and ".join(found) or "nothing"
