"""The captions of the text demo: what one shape or two are, said in the many wordings of a grammar.

A caption is made from a description, and a description becomes a scene: what the caption leaves
open (a size, a place) is chosen when the scene is drawn.
"""

import itertools
import re
from collections.abc import Iterable
from random import Random
from typing import NamedTuple

from grammar import Described, Writer
from shapes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

SINGLE_PLACES = [place for place in PLACES if not place.startswith("two")]
ENDS = {"above": ("top", "bottom"), "left": ("left", "right")}
REVERSE = {"above": "below", "below": "above", "left": "right", "right": "left", "beside": "beside"}
LONGEST = 31  # words and punctuation marks; features.yaml has room for one token more
HELD_OUT_PAIRS = 60  # of the 576 pairs of a colour and a shape each, in order of place
# How often two objects, in a row or in a column, are worded by each rule.
WORDINGS = {
    "left": {"related": 5, "related beside": 2, "each placed": 3, "together": 2, "told": 1},
    "above": {"related": 7, "each placed": 3, "stacked": 1, "told": 1},
}

SWAPPED = ("related", "each placed", "told")  # rules that name the second object first, or not


class Said(NamedTuple):
    """What a caption says of one object. size None: it does not say.

    place: where the object stands; the middle where the caption does not say.
    """

    colour: str
    shape: str
    size: str | None
    place: str


class Caption(NamedTuple):
    """A caption and what it says.

    words: of the text, and its punctuation marks. things: one object, or two in the order top to
    bottom or left to right. relation: of the first to the second, above or left; None for one
    object. owners: for each word, the number of the object that it speaks of (1 or 2), or 0.
    """

    words: tuple[str, ...]
    things: tuple[Said, ...]
    relation: str | None
    owners: tuple[int, ...]

    @property
    def text(self) -> str:
        """The caption as a person would write it."""
        text = re.sub(r" ([,.;:?!])", r"\1", " ".join(self.words))
        return text.replace(" - coloured", "-coloured").replace(" - shaped", "-shaped")


def held_out_pairs() -> set[tuple[tuple[str, str], ...]]:
    """The pairs of (colour, shape) that no training image shows."""
    kinds = list(itertools.product(COLOURS, SHAPES))
    pairs = list(itertools.product(kinds, kinds))
    return set(Random(0).sample(pairs, HELD_OUT_PAIRS))


class CaptionMaker:
    """Makes random captions of one object or two.

    never: texts that are not made, those that the models are checked on. pairs: the share of
    captions of two objects.
    """

    def __init__(self, seed: int, never: Iterable[str] = (), pairs: float = 0.5) -> None:
        self.random, self.pairs = Random(seed), pairs
        self.writer = Writer(self.random)
        self.never = {plain(text) for text in never}
        self.held_out = held_out_pairs()

    def caption(self, held_out: bool = False) -> Caption:
        """A random caption; held_out: of two objects that no training image shows together."""
        while True:
            single = not held_out and self.random.random() >= self.pairs
            caption = self._single() if single else self._pair()
            kinds = tuple((thing.colour, thing.shape) for thing in caption.things)
            fits = len(caption.words) <= LONGEST and (kinds in self.held_out) == held_out
            if fits and plain(caption.text) not in self.never:
                return caption

    def scene(self, caption: Caption) -> Scene:
        """A scene that the caption describes; an unsaid size is either."""
        centres = PLACES[f"two, {caption.relation}"] if caption.relation else None
        things = []
        for number, said in enumerate(caption.things):
            centre = centres[number] if centres else PLACES[said.place][0]
            size = SIZES[said.size or self._one(list(SIZES))]
            things.append(Thing(said.colour, said.shape, size, centre))
        return Scene(caption.text, tuple(things))

    def _single(self) -> Caption:
        placed = self.random.random() < 0.5
        said = self._thing(self._one(SINGLE_PLACES) if placed else "middle")
        return self._finish("single placed" if placed else "single", (said,), None, {})

    def _pair(self) -> Caption:
        """One object first in the row or column, the other last; either may be named first."""
        direction = self._one(list(ENDS))
        things = tuple(self._thing(place) for place in ENDS[direction])
        rules = dict(WORDINGS[direction])
        if things[0].shape == things[1].shape:
            del rules["told"]
        (rule,) = self.random.choices(list(rules), list(rules.values()))
        relation = "beside" if rule == "related beside" else direction
        swapped = rule in SWAPPED and self.random.random() < 0.5
        if swapped:
            relation = REVERSE[direction]
        given = {
            "rel": f"rel {relation}",
            "its": f"its {relation}",
            "back": f"its {REVERSE[relation]}",
        }
        return self._finish(rule, things, direction, given, swapped)

    def _finish(
        self,
        rule: str,
        things: tuple[Said, ...],
        relation: str | None,
        given: dict[str, str],
        swapped: bool = False,
    ) -> Caption:
        described = [describe(number + 1, said) for number, said in enumerate(things)]
        named = zip(("one", "two"), reversed(described) if swapped else described, strict=False)
        marked = self.writer.write(rule, {**given, **dict(named)})
        marked = self.writer.write("sentence", {"said": marked})
        words, owners = zip(*marked, strict=True)
        return Caption(words, things, relation, owners)

    def _thing(self, place: str) -> Said:
        colour, shape = self._one(list(COLOURS)), self._one(SHAPES)
        return Said(colour, shape, self._one([*SIZES, *SIZES, None, None, None]), place)

    def _one(self, choices: list | tuple) -> str:
        return choices[int(self.random.random() * len(choices))]


def describe(number: int, said: Said) -> Described:
    """An object as the rules see it."""
    attributes = {"colour": f"colour {said.colour}"}
    if said.size:
        attributes["size"] = f"size {said.size}"
    words = {"noun": f"noun {said.shape}", "shapely": f"shapely {said.shape}"}
    return Described(number, attributes, {**words, "where": f"where {said.place}"})


def plain(text: str) -> str:
    """A text's words in lower case, without punctuation: what makes two texts the same."""
    return " ".join(words_of(text))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())
