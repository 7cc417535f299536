"""The captions of the text demo: what can be said about one shape or two, in many wordings.

A caption is made from a description, and a description becomes a scene: what the caption leaves
open (a size, a place) is chosen when the scene is drawn.
"""

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from shapes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

SIZE_WORDS = {
    "small": ["small"] * 3 + ["tiny", "little", "very small", "quite small", "mini"],
    "large": ["large"] * 2
    + ["big"] * 3
    + ["huge", "giant", "enormous", "very big", "really large"],
}
COLOUR_WORDS = {
    "red": ["red"] * 4 + ["crimson"],
    "green": ["green"] * 4 + ["lime"],
    "blue": ["blue"] * 4 + ["navy"],
    "yellow": ["yellow"] * 4 + ["golden"],
    "purple": ["purple"] * 4 + ["violet"],
    "white": ["white"],
}
SHAPE_WORDS = {
    "circle": ["circle"] * 5 + ["disc", "ball", "dot"],
    "square": ["square"] * 5 + ["box", "block"],
    "triangle": ["triangle"],
    "cross": ["cross"] * 5 + ["plus", "plus sign"],
}
PLACE_WORDS = {
    "top left": ["top left", "upper left", "top left corner", "upper left corner"],
    "top right": ["top right", "upper right", "top right corner", "upper right corner"],
    "bottom left": ["bottom left", "lower left", "bottom left corner", "lower left corner"],
    "bottom right": ["bottom right", "lower right", "bottom right corner", "lower right corner"],
    "top": ["top", "upper part"],
    "bottom": ["bottom", "lower part"],
    "left": ["left", "left side", "left half"],
    "right": ["right", "right side", "right half"],
    "middle": ["middle", "centre", "center", "middle of the picture"],
}
NOUN_PHRASES = [
    *["{a} {size} {colour} {shape}"] * 6,
    *["{a} {colour} {shape}"] * 5,
    "{a} {colour} {size} {shape}",
    "{a} {size} , {colour} {shape}",
    "{size} , {colour} , {shape}",
    "{a} {shape} , {colour} , {size}",
    "{a} {shape} , {size} , {colour}",
    "{a} {shape} . {colour} . {size}",
    "{a} {colour} {shape} , {size}",
    "{a} {colour} {shape} that is {size}",
    "{a} {size} {shape} that is {colour}",
    "{a} {shape} that is {colour} and {size}",
    "{a} {shape} which is {size} and {colour}",
    "{a} {shape} which is {colour}",
    "{a} {shape} . it is {colour} and {size}",
    "{a} {size} {shape} in {colour}",
    "{a} {shape} in {colour}",
    "{a} {shape} , {colour}",
    "{a} {size} {shape} , coloured {colour}",
    "{a} {colour} - coloured {shape}",
    "{a} {colour} coloured {shape}",
    "{a} {colour} {shape} of {size} size",
    "{a} {shape} of {colour} colour",
    "{a} {shape} with the colour {colour}",
    "{a} {size} {shape} painted {colour}",
    "{a} {size} {shape} filled with {colour}",
    "{a} {size} {colour} thing shaped like a {shape}",
    "{a} {size} shape , a {colour} {shape}",
]
SENTENCES = [
    *["{}"] * 8,
    *["there is {}", "{} .", "draw {}", "please draw {}", "show me {}", "i see {}", "{} , please"],
    *["a picture of {}", "an image of {}", "a drawing of {}", "a photo of {}", "an icon of {}"],
    *["i want {}", "could you draw {} ?", "can you make {} ?", "make {}", "paint {}", "give me {}"],
    *["{} on a dark background", "on black , {}", "only {} , nothing else", "just {}", "we see {}"],
    *["a picture with {}", "an image with {}", "put {}", "there should be {}", "i would like {} !"],
]
SINGLES = [
    *["{np} in the {place}", "{np} at the {place}", "{np} on the {place}", "in the {place} {np}"],
    *["{place} : {np}", "{np} , {place}", "at the {place} there is {np}", "on the {place} , {np}"],
    *["{np} near the {place}", "the {place} has {np}", "in the {place} is {np}", "{place} , {np}"],
    *["{np} is in the {place}", "{np} is at the {place}", "at the {place} sits {np}"],
]
STATED = [
    "the {shape} is {colour}",
    "the {shape} is {colour} and {size}",
    "the {size} {shape} is {colour}",
]
# {one} {rel} {two}: how `one` stands to `two`.
RELATIONS = {
    "above": ["above", "over", "on top of", "on", "higher than"],
    "below": ["below", "under", "beneath", "underneath", "lower than"],
    "left": ["left of", "to the left of", "on the left of", "on the left side of"],
    "right": ["right of", "to the right of", "on the right of", "on the right side of"],
    "beside": ["next to", "beside", "and", "near", "close to", ",", "by the side of", "with"],
}
ITS_SIDE = {
    "above": ["above it", "on top of it", "over it", "on top"],
    "below": ["below it", "under it", "underneath", "beneath it", "below"],
    "left": ["to its left", "on its left", "to the left of it", "to the left", "left of it"],
    "right": ["to its right", "on its right", "to the right of it", "to the right", "right of it"],
    "beside": ["next to it", "beside it", "close to it"],
}
WITH_RELATION = [
    *["{one} {rel} {two}"] * 8,
    *["{one} is {rel} {two}"] * 2,
    *["{rel} {two} there is {one}", "{rel} {two} is {one}", "{rel} {two} , {one}"],
    *["{one} placed {rel} {two}", "{one} stands {rel} {two}", "{one} , {rel} {two}"],
    *["two shapes , {one} {rel} {two}", "two things : {one} {rel} {two}"],
]
WITH_ITS_SIDE = [
    *[
        "{two} with {one} {its}",
        "{two} , {one} {its}",
        "{two} and {one} {its}",
        "{two} . {one} {its}",
    ],
    *["{two} , and {its} {one}", "{two} , {its} there is {one}", "{two} and put {one} {its}"],
    *["there is {two} and {its} {one}", "{two} , {its} , {one}", "{two} ; {one} is {its}"],
]
BOTH_SIDES = [  # the first of a row or column, then the other
    *["{one} on the {first} and {two} on the {last}", "{first} : {one} , {last} : {two}"],
    *["on the {first} {one} , on the {last} {two}", "{one} at the {first} , {two} at the {last}"],
    *[
        "{one} at the {first} and {two} at the {last}",
        "at the {first} {one} and at the {last} {two}",
    ],
    *["{first} : {one} . {last} : {two} .", "the {first} half has {one} , the {last} half {two}"],
    *["in the {first} part {one} , in the {last} part {two}", "{first} is {one} , {last} is {two}"],
    *["{one} is on the {first} , {two} is on the {last}"],
]
SIDE_BY_SIDE = [
    *[
        "{one} and {two} side by side",
        "two shapes : {one} and {two}",
        "two objects , {one} , {two}",
    ],
    *["{one} and {two} next to each other", "{one} , then {two}", "{one} and {two}"],
]
ENDS = {"above": ("top", "bottom"), "left": ("left", "right")}
REVERSE = {"above": "below", "left": "right"}
HELD_OUT_PAIRS = 60  # of the 576 pairs of a colour and a shape each, in order of place


class Said(NamedTuple):
    """What a caption says of one object; size, place None: it does not say."""

    colour: str
    shape: str
    size: str | None
    place: str | None


class Caption(NamedTuple):
    """A caption and what it says.

    things: one object, or two in the order top to bottom or left to right. relation: of the first
    to the second, above or left; None for one object. owners: for each word and punctuation mark,
    the number of the object that it speaks of (1 or 2), or 0.
    """

    text: str
    things: tuple[Said, ...]
    relation: str | None
    owners: tuple[int, ...]


def held_out_pairs() -> set[tuple[tuple[str, str], ...]]:
    """The pairs of (colour, shape) that no training image shows."""
    kinds = list(itertools.product(COLOURS, SHAPES))
    pairs = list(itertools.product(kinds, kinds))
    chosen = np.random.default_rng(0).permutation(len(pairs))[:HELD_OUT_PAIRS]
    return {pairs[i] for i in chosen}


class CaptionMaker:
    """Makes random captions, half of one object and half of two.

    never: texts that are not made, those that the models are judged on.
    """

    def __init__(self, seed: int, never: Iterable[str] = ()) -> None:
        self.random, self.never = np.random.default_rng(seed), frozenset(never)
        self.held_out = held_out_pairs()

    def caption(self, held_out: bool = False) -> Caption:
        """A random caption; held_out: of two objects that no training image shows together."""
        while True:
            single = not held_out and self.random.random() < 0.5
            caption = self._single() if single else self._pair()
            kinds = tuple((thing.colour, thing.shape) for thing in caption.things)
            if (kinds in self.held_out) == held_out and caption.text not in self.never:
                return caption

    def scene(self, caption: Caption) -> Scene:
        """A scene that the caption describes; an unsaid size is either, an unsaid place middle."""
        centres = PLACES[f"two, {caption.relation}"] if caption.relation else None
        things = []
        for number, said in enumerate(caption.things):
            centre = centres[number] if centres else PLACES[said.place or "middle"][0]
            size = SIZES[said.size or self._one(list(SIZES))]
            things.append(Thing(said.colour, said.shape, size, centre))
        return Scene(caption.text, tuple(things))

    def _single(self) -> Caption:
        text, said = self._thing(1)
        if self.random.random() < 0.5:
            return self._finish(text, (said,), None)
        place = self._one(list(PLACE_WORDS))
        wording = self._one(SINGLES).format(np=text, place=self._one(PLACE_WORDS[place]))
        return self._finish(wording, (said._replace(place=place),), None)

    def _pair(self) -> Caption:
        """One object first in the row or column, the other last; either may be named first."""
        (first, first_said), (last, last_said) = self._thing(1), self._thing(2)
        direction = self._one(list(ENDS))
        kind = self.random.random()
        if kind < 0.15 and direction == "left":
            wording = self._one(SIDE_BY_SIDE).format(one=first, two=last)
        elif kind < 0.35:
            ends = dict(zip(("first", "last"), ENDS[direction], strict=True))
            wording = self._one(BOTH_SIDES).format(one=first, two=last, **ends)
        else:
            relation, one, two = direction, first, last
            if self.random.random() < 0.5:
                relation, one, two = REVERSE[direction], last, first
            elif direction == "left" and self.random.random() < 0.4:
                relation = "beside"
            if kind < 0.55 and relation != "beside":
                side = self._one(ITS_SIDE[relation])
                wording = self._one(WITH_ITS_SIDE).format(one=one, two=two, its=side)
            elif kind < 0.6 and relation == "beside":
                side = self._one(ITS_SIDE[relation])
                wording = self._one(WITH_ITS_SIDE).format(one=last, two=first, its=side)
            else:
                words = self._one(RELATIONS[relation])
                wording = self._one(WITH_RELATION).format(one=one, two=two, rel=words)
        return self._finish(wording, (first_said, last_said), direction)

    def _finish(self, text: str, things: tuple[Said, ...], relation: str | None) -> Caption:
        words = [word.rpartition("~") for word in self._one(SENTENCES).format(text).split()]
        owners = tuple(int(owner or 0) for owner, _, _ in words)
        text = re.sub(r" ([,.;:?!])", r"\1", " ".join(word for _, _, word in words))
        return Caption(text.replace(" - ", "-"), things, relation, owners)

    def _thing(self, number: int) -> tuple[str, Said]:
        """An object in words, each with the object's number before it: 1~red 1~circle."""
        colour, shape, size = (self._one(list(x)) for x in (COLOURS, SHAPES, SIZES))
        article = self._one(["a"] * 6 + ["the", "the", "one", "", ""])
        wording = self._one(NOUN_PHRASES if self.random.random() < 0.93 else STATED)
        text = wording.format(
            a=article,
            colour=self._one(COLOUR_WORDS[colour]),
            shape=self._one(SHAPE_WORDS[shape]),
            size=self._one(SIZE_WORDS[size]),
        )
        marked = " ".join(f"{number}~{word}" for word in text.split())
        return marked, Said(colour, shape, size if "{size}" in wording else None, None)

    def _one(self, choices: list) -> str:
        return choices[self.random.integers(len(choices))]
