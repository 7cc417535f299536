"""How people word a description of one shape or two: the rules of the text demo's captions.

A rule is a list of alternatives, one a line. `(a|b c|)` chooses one of its parts; `{name}` is
replaced by a rule, by a word for what is described, or by what a rule is given as that name;
`{one.noun}` is the noun of the object given as `one`. A number and `*` before an alternative
makes it that many times as likely. Punctuation marks are words.
"""

import re
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

RULES = {
    # Words for what can be seen
    "colour red": "8* {shade} red\ncrimson\nscarlet",
    "colour green": "8* {shade} green\nlime\nemerald",
    "colour blue": "8* {shade} blue\nnavy\nazure",
    "colour yellow": "8* {shade} yellow\ngolden\ngold",
    "colour purple": "8* {shade} purple\nviolet\nlilac",
    "colour white": "8* {shade} white\nsnowy",
    "shade": "30* \nbright\ndark\nlight\ndeep\npure",
    "size small": """
        6* {very} small
        2* {very} (tiny|little)
        (mini|miniature|teeny|petite|minute|minuscule|wee|compact)
        (small small|tiny tiny|tiny little|teeny tiny|very very small)""",
    "size large": """
        4* {very} (large|big)
        (huge|giant|enormous|massive|gigantic|immense|great|oversized)
        {very} huge
        (big big|great big|very very large)""",
    "very": "12* \n(very|really|quite|rather|fairly|pretty|extremely|super|so)",
    "noun circle": "8* circle\ndisc\ndisk\nball\ndot",
    "noun square": "8* square\nbox\nblock",
    "noun triangle": "triangle",
    "noun cross": "8* cross\nplus\nplus sign",
    "shapely circle": "round\ncircular\ncircle (-|) shaped",
    "shapely square": "square\nsquare (-|) shaped",
    "shapely triangle": "triangular\ntriangle (-|) shaped",
    "shapely cross": "cross (-|) shaped\nplus (-|) shaped",
    "thing": "thing\nshape\nobject\nfigure\nform",
    # Noun phrases
    "a": "8* a\n2* the\none\nan\nsome\na single\nmy\n3* ",
    "np": "{a} {before} {noun} {after}",
    "np by shape": """
        something {values} (and|,|) {shapely}
        {a} {values} (and|,|) {shapely} {thing}
        {a} {shapely} {thing} {after all}
        {a} {values} {thing} (shaped like|in the (form|shape) of|that looks like) a {noun}
        {a} {thing} , (namely|) {a} {values} {noun}
        {a} {values} {thing} (,|:) a {noun}""",
    "both": "8* {x} {y}\n{x} , {y}\n{x} and {y}",
    "listed": "2* {x} and {y}\n{x} , {y}\n{x} , and {y}",
    "after": """
        3* (that|which) is {v}
        4* , {v}
        , (it is|which is|that is|being) {v}
        . (it|this) is {v}
        . {v}""",
    "after colour": """
        3* in {v}
        (,|) (coloured|colored|painted|drawn|filled|shaded|made|done) (in|with|) {v}
        (of|with|having) (a|the|) (colour|color) {v}
        (of|with|having) (a|the|) {v} (colour|color)
        whose (colour|color) is {v}""",
    "after size": "of {v} size\nwith a {v} size\n, {v} in size\nthat looks {v}",
    "dashed": "{colour} - coloured\n{colour} coloured\n{colour} - colored\n{colour} tinted",
    "stated": """
        4* the {noun} {be} {values}
        {a} {noun} {be} {values}
        the {thing} is {a} {values} {noun}""",
    "be": "6* is\nshould be\nmust be\nwill be\nlooks\nhas to be",
    # Places
    "where top left": "(top|upper) left {corner}\nleft (top|upper) {corner}",
    "where top right": "(top|upper) right {corner}\nright (top|upper) {corner}",
    "where bottom left": "(bottom|lower) left {corner}\nleft (bottom|lower) {corner}",
    "where bottom right": "(bottom|lower) right {corner}\nright (bottom|lower) {corner}",
    "corner": "4* \n3* corner\nhand corner\n(part|area|side|edge|quarter) {of image}",
    "where top": "4* {far} top {of image}\n(upper|top) {part} {of image}",
    "where bottom": "4* {far} bottom {of image}\n(lower|bottom) {part} {of image}",
    "where left": "4* {far} left {of image}\nleft (hand|) {part} {of image}",
    "where right": "4* {far} right {of image}\nright (hand|) {part} {of image}",
    "where middle": "(middle|centre|center) {of image}\ndead (centre|center)",
    "far": "8* \nvery\nfar",
    "part": "3* side\n2* half\n2* part\nedge\narea\nend",
    "of image": "8* \nof the (picture|image|drawing|canvas|page|frame|scene|screen)",
    "at": """
        12* {just} (in|at|on) the {where}
        {just} (near|by|toward|towards|to|along|close to) the {where}""",
    "just": "12* \n(right|just|somewhere|exactly|up|down|over|directly)",
    "has": "has\nshows\ncontains\nholds\nwith\ndisplays\nfeatures",
    # One object
    "single": "12* {one}\n{one.stated}",
    "single placed": """
        8* {one} (,|) {stand} {one.at}
        4* {one.at} (,|:|) {there is} {one}
        2* {one.where} (,|:|-|.|) {one}
        {one} (,|:|-|) {one.where}
        the {one.where} {has} {one}
        {one.a} {one.noun} {one.at} (,|. it is|that is|, which is|) {one.values}
        {one.told here}
        {one.a} {one.values} {one.thing} {one.at} , (a|namely a|) {one.noun}""",
    "stand": """
        8*
        (that|which|it|) (is|sits|stands|lies|rests|floats|appears|goes|hangs)
        (placed|located|positioned|sitting|standing|lying|resting|floating|drawn|put|seen|set)""",
    "there is": """
        2*
        3* (there is|is|there are)
        (sits|stands|lies|rests|floats|appears|put|place|draw|goes|add)
        (you|we|i|one) (can|) (see|find|have|notice)""",
    # Two objects: `one` stands to `two` as the relation says
    "related": """
        10* {one} {stand} {rel} {two}
        2* {one} , {stand} {rel} {two}
        4* {rel} {two} (,|) {there is} {one}
        {one} {be} {rel} {two}
        {one} with {two} {back}
        {two} (has|with|having) {one} {its}
        3* {two} {join} {one} {stand} {its}
        3* {two} {join} (put|add|place|draw|) {its} (,|:|) {there is} {one}
        {two} {join} (put|add|place|draw|then) {one} {its}
        the {two.noun} {be} {two.values} {join} the {one.noun} {its} {be} {one.values}
        {two} {join} {its} {one.a} {one.noun} {one.after all}""",
    "related beside": """
        6* {one} {stand} {rel} {two}
        {one} , {stand} {rel} {two}
        {one} {be} {rel} {two}
        2* {one} {join} {two} {its}
        {one} {join} {its} (,|) {there is} {two}
        {rel} {one} (,|) {there is} {two}""",
    # Two objects of different shapes, which are then spoken of by their shapes
    "told": """
        {one.a} {one.noun} {rel} {two.a} {two.noun} , {tell each}
        {one.a} {one.noun} {one.at} {join} {two.a} {two.noun} {two.at} , {tell each}
        {one} {join} {two} , the {one.noun} {be} {one.at}
        2* {one} {join} {two} , the {one.noun} {one.at}
        2* {one} {join} {two} , the {two.noun} {two.at}
        {one} {join} {two} , the {one.noun} {be} {rel} the {two.noun}
        {one} {join} {two} , the {one.noun} {one.at} {join} the {two.noun} {two.at}""",
    "tell each": "the {one.noun} {be} {one.values} {join} the {two.noun} {be} {two.values}",
    "join": "3* ,\n2* and\n2* , and\n.\n;\n, with\nwith\n:\n-\n, then\n, while\nwhile",
    "rel above": """
        6* {near} above
        2* {near} over
        2* on top of
        (on|upon|atop|onto)
        (higher|further up) than""",
    "rel below": """
        5* {near} below
        3* {near} under
        {near} (beneath|underneath)
        (lower|further down) than
        at the (foot|bottom) of""",
    "rel left": "6* {near} {to} left of\n(at|on|to) the left (hand|) (side|edge) of",
    "rel right": "6* {near} {to} right of\n(at|on|to) the right (hand|) (side|edge) of",
    "rel beside": """
        3* {near} next to
        2* {near} beside
        (near|close to|by|alongside|at the side of|by the side of|adjacent to|touching)""",
    "near": "10* \n(directly|just|right|immediately|slightly|exactly|shown|somewhere)",
    "to": "3* \n4* to the\non the\nat the",
    "its above": "2* above it\n2* above\non top (of it|)\nover it\nat its top\nupon it\non it",
    "its below": """
        2* below it
        2* below
        under it
        (beneath|underneath) (it|)
        at its (foot|bottom)""",
    "its left": "(on|to|at) (its|the) left (side|) (of it|)\n{near} left of it",
    "its right": "(on|to|at) (its|the) right (side|) (of it|)\n{near} right of it",
    "its beside": "next to it\nbeside it\nby its side\nnear it\nclose to it\nalongside",
    # Two objects, each with its own place
    "each placed": """
        5* {one} {stand} {one.at} {join} {two} {stand} {two.at}
        3* {one.at} (,|:|) {there is} {one} {join} {two.at} (,|:|) {there is} {two}
        2* {one.where} (:|,|-|is|.) {one} {join} {two.where} (:|,|-|is|.) {two}
        the {one.where} {has} {one} {join} the {two.where} {has} {two}
        the {one.where} {has} {one} {join} the {two.where} {two}
        {one.told here} {join} {two.told here}""",
    "told here": "the {noun} {at} {be} {values}",
    # Two objects in the order of reading, left to right
    "together": """
        6* {one} and {two} {in a row}
        2* {one} (,|plus|with|, and|together with|along with|accompanied by) {two} {in a row}
        {one} (then|, then|followed by|and then) {two} (to|on|) (its|the|) right
        {one} (then|, then|followed by|and then) {two}
        both {one} and {two}
        a row (of|with|:) {one} (and|,) {two}""",
    "in a row": "5* \n(,|) (side by side|next to each other|in a row|together|beside each other)",
    "stacked": """
        {one} stacked (on|above|upon|over) {two}
        a (column|stack|tower|pile) (of|with|:) {one} (and|,|, then) {two}
        {one} , then {two} {back}
        from top to bottom (:|,) {one} (and|,|, then) {two}""",
    "count": """
        16*
        (there are|) two {things} (,|:|-|.|;)
        (a pair|a couple) of {things} (,|:|-|.)""",
    "things": "things\nshapes\nobjects\nfigures\nforms\nitems",
    # Around it all
    "sentence": """
        12* {said}
        9* {before all} {said}
        3* {said} {after it}
        2* {before all} {said} {after it}""",
    "before all": """
        4* {please} (draw|paint|sketch|make|create|generate|render|show|give|design) (me|us|)
        2* (i|we) (want|need|see|have|like|imagine|am looking for|would like) (to see|to have|)
        (can|could|would|will) (you|someone) (please|) (draw|paint|make|show|create) (me|us|)
        3* {an} {image} (of|with|showing|containing|that shows|having|:)
        {image} (:|of|-)
        3* there (is|should be|must be|are|will be)
        (here is|this is|it is|that is|imagine|let us see|let there be|what about|how about)
        (just|only|simply|nothing but|maybe|title :|prompt :|task :)
        (put|place|add)
        on {dark} , (there is|draw|)
        in {an} {image} , (there is|)""",
    "please": "6* \nplease\nkindly\nnow\nok ,",
    "an": "a\nan\nthe\nthis\nmy",
    "image": """
        (picture|image|drawing|photo|painting|icon)
        (sketch|illustration|scene|logo|rendering)""",
    "dark": "black\na (dark|black|plain|grey|simple|night) (background|canvas|sky)",
    "after it": """
        5* (.|!|?)
        (,|) please (.|!|?|)
        (,|) thanks
        (,|and) nothing (else|more) (.|)
        (on|against|over|in front of) {dark}
        (in|on) (the {image}|it|this {image})
        here""",
}


class Slot(NamedTuple):
    """A name in braces."""

    name: str


class Choice(NamedTuple):
    """Alternatives, each a sequence of words, slots and choices, and the sums of their weights."""

    options: list[list]
    weights: list[int]


class Described(NamedTuple):
    """One object as the rules see it.

    number: marks its words. attributes: the rules of its colour and, where it is said, its size.
    words: the rules of its noun and so on, by slot.
    """

    number: int
    attributes: dict[str, str]
    words: dict[str, str]


Marked = list[tuple[str, int]]  # words, each with the number of the object that it speaks of, or 0
Given = Mapping[str, str | Described | Marked]


def parse(rule: str) -> Choice:
    """The text of a rule as a tree."""
    options, weights, total = [], [], 0
    for line in rule.strip("\n").split("\n"):
        weight, _, text = line.rpartition("*")
        total += int(weight or 1)
        weights.append(total)
        options.append(_sequence(re.findall(r"\{[^}]*\}|[()|]|[^\s(){}|]+", text)))
    return Choice(options, weights)


def _sequence(parts: list[str]) -> list:
    """Take parts until the choice that they are in goes on or ends."""
    found = []
    while parts and parts[0] not in ")|":
        part = parts.pop(0)
        if part == "(":
            options = [_sequence(parts)]
            while parts.pop(0) == "|":
                options.append(_sequence(parts))
            found.append(Choice(options, list(range(1, len(options) + 1))))
        else:
            found.append(Slot(part[1:-1]) if part.startswith("{") else part)
    return found


_TREES = {name: parse(rule) for name, rule in RULES.items()}


def grammar_words() -> list[str]:
    """All words and punctuation marks of the rules, sorted."""
    words = re.findall(r"[^\s(){}|*\d]+", re.sub(r"\{[^}]*\}", " ", "\n".join(RULES.values())))
    return sorted(set(words))


class Writer:
    """Writes random texts by the rules."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def write(self, rule: str, given: Given, thing: Described | None = None) -> Marked:
        """A text of a rule. thing: the object that it speaks of, if of one."""
        return self._choose(_TREES[rule], given, thing)

    def _choose(self, choice: Choice, given: Given, thing: Described | None) -> Marked:
        options = choice.options
        if len(options) == 1:
            chosen = options[0]
        else:
            (chosen,) = self.random.choices(options, cum_weights=choice.weights)
        text = []
        for part in chosen:
            if isinstance(part, str):
                text.append((part, thing.number if thing else 0))
            elif isinstance(part, Slot):
                text += self._fill(part.name, given, thing)
            else:
                text += self._choose(part, given, thing)
        return text

    def _fill(self, slot: str, given: Given, thing: Described | None) -> Marked:
        name, _, rest = slot.partition(".")
        value = given.get(name)
        if isinstance(value, list):
            return value
        if isinstance(value, Described):
            return self._fill(rest or "phrase", {}, value)
        rule = value or name
        if thing:
            if rule == "phrase":
                return self._phrase(thing)
            if rule == "values":
                manner = "both" if self.random.random() < 0.5 else "listed"
                return self._several(list(thing.attributes), manner, thing)
            if rule == "after all":
                return self._after(list(thing.attributes), thing)
            rule = thing.attributes.get(rule) or thing.words.get(rule, rule)
        return self.write(rule, given, thing)

    def _phrase(self, thing: Described) -> Marked:
        """A noun phrase: some attributes before the noun, the others after it."""
        if self.random.random() < 0.08:
            return self.write("np by shape", {}, thing)
        before = [name for name in thing.attributes if self.random.random() < 0.75]
        after = [name for name in thing.attributes if name not in before]
        if before == ["colour"] and self.random.random() < 0.08:
            first = self.write("dashed", {}, thing)
        else:
            first = self._several(before, "both", thing)
        return self.write("np", {"before": first, "after": self._after(after, thing)}, thing)

    def _several(self, names: list[str], manner: str, thing: Described) -> Marked:
        """Attributes as words; of two, the size comes first more often than not."""
        if len(names) < 2:
            return [word for name in names for word in self._fill(name, {}, thing)]
        x, y = ("size", "colour") if self.random.random() < 0.75 else ("colour", "size")
        return self.write(manner, {"x": thing.attributes[x], "y": thing.attributes[y]}, thing)

    def _after(self, names: list[str], thing: Described) -> Marked:
        """Attributes that follow their noun."""
        if not names:
            return []
        own = len(names) == 1 and self.random.random() < 0.5
        value = self._several(names, "listed", thing)
        return self.write(f"after {names[0]}" if own else "after", {"v": value}, thing)
