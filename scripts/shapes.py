"""Captioned images of coloured shapes, and a checker that reads them: the text demo's world.

The checker knows the palette and the outlines, but nothing of how an image was made: it finds
patches of colour and compares each patch's outline with those of the shapes.
"""

import itertools
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
SIZES = {"small": 5.0, "large": 8.0}  # half the width, in pixels
PLACES = {
    "top left": (10, 10),
    "top right": (22, 10),
    "bottom left": (10, 22),
    "bottom right": (22, 22),
    "middle": (16, 16),
}
PAIRS = {"left of": ((8, 16), (24, 16)), "above": ((16, 8), (16, 24))}
PAIR_SIZE = 6.0
PAIR_SCENES = 720  # of the 1,152 that could be said
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


def all_scenes() -> list[Scene]:
    """All single objects in several wordings, and some of all pairs, in a fixed order."""
    scenes = []
    single = itertools.product(COLOURS, SHAPES, SIZES.items(), PLACES.items())
    for colour, shape, (size, half), (place, centre) in single:
        thing = Thing(colour, shape, half, centre)
        for wording in (
            f"a {size} {colour} {shape} in the {place}",
            f"{place}: a {size} {colour} {shape}",
            f"a {colour} {shape}, {size}, {place}",
            f"in the {place} a {size} {shape}, {colour}",
        ):
            scenes.append(Scene(wording, (thing,)))
    kinds = list(itertools.product(COLOURS, SHAPES))
    pairs = list(itertools.product(kinds, kinds, PAIRS.items()))
    order = np.random.default_rng(0).permutation(len(pairs))[:PAIR_SCENES]
    for first, second, (relation, centres) in (pairs[i] for i in order):
        things = tuple(
            Thing(colour, shape, PAIR_SIZE, centre)
            for (colour, shape), centre in zip((first, second), centres, strict=True)
        )
        caption = f"a {' '.join(first)} {relation} a {' '.join(second)}"
        scenes.append(Scene(caption, things))
    return scenes


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
    """A patch that the checker sees: its colour, shape and centre (x, y)."""

    colour: str
    shape: str
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
        thing = Found(colour, _nearest_shape(mask), (x, y))
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


class Verdict(NamedTuple):
    """Whether all the scene's colours, all its shapes, and both together are right."""

    colour: bool
    shape: bool
    both: bool


def check(scene: Scene, pixels: np.ndarray) -> Verdict:
    """Is every object of the scene there, each nearest to its place, and nothing else?"""
    found = find_things(pixels)
    if len(found) != len(scene.things):
        return Verdict(False, False, False)
    matched = [
        min(found, key=lambda f, t=thing: np.hypot(*np.subtract(f.centre, t.centre)))
        for thing in scene.things
    ]
    colour = all(f.colour == t.colour for f, t in zip(matched, scene.things, strict=True))
    shape = all(f.shape == t.shape for f, t in zip(matched, scene.things, strict=True))
    return Verdict(colour, shape, colour and shape)
