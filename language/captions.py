"""Caption cleaning by the rules of DeepFloyd IF and PixArt, used to train the released weights.

    clean_caption("A&nbsp;DOG @bob https://x.com/1 #12 (free download)")   # "a dog"

The rules remove what does not describe an image (markup, addresses, file names, long numbers,
advertising, repeated punctuation) and convert to lower case. The published rules also delete
Chinese characters; ours keep them.
"""

import html
import html.parser
import re
import urllib.parse
from collections.abc import Iterable

import ftfy

from core.data.config import Cleaning
from core.data.image_text import CaptionError, ImageTextPairs

_SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# CJK strokes, Katakana extensions, enclosed and compatibility forms, ideographs.
_IDEOGRAPHS = ((r"[\u31c0-\u4dbf\u4dc0-\u9fff]+", ""),)

# Each rule is a pattern and its replacement. The rules are applied in this order.
_BEFORE_MARKUP = (
    (r"<person>", "person"),
    (
        r"\b(?:(?:https?|www):(?:/{1,3}|[a-z0-9%])"
        r"|[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))",
        "",
    ),
)
_AFTER_MARKUP = (
    (r"@\w+\b", ""),  # nicknames
)
_BEFORE_REPAIR = (
    # One dash, one double quote, one single quote.
    (
        r"[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
        r"\ufe31\ufe32\ufe58\ufe63\uff0d]+",
        "-",
    ),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),  # an article number
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_SUFFIXES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_AFTER_REPAIR = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_SUFFIXES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),  # sizes, also with a Cyrillic x
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


# A caption is cut here before it is cleaned: several times what 120 tokens can hold. Some of the
# published rules take time that grows with the square of the length.
MAX_CHARACTERS = 4096


def clean_caption(text: str, reference: bool = False) -> str:
    """Remove everything that does not describe the image, in lower case; may return "".

    Of a longer text only the first MAX_CHARACTERS are used.

    reference: also delete Chinese characters and the characters around them, as the published
        code does (it keeps Kana and Hangul), and strip spaces before the last rules, as it does.
    """
    text = text[:MAX_CHARACTERS]
    if not reference:
        text = ftfy.fix_text(text)  # the rules repair encodings only after lower(): mostly too late
    # Twice, as in the published code: the first pass can produce text that a rule matches.
    return _clean(_clean(text, reference), reference)


def _clean(text: str, reference: bool) -> str:
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = _replace(text, _BEFORE_MARKUP)
    text = _replace(_without_markup(text), _AFTER_MARKUP)
    text = _replace(text, (*(_IDEOGRAPHS if reference else ()), *_BEFORE_REPAIR))
    if len(re.findall(r"[-_]", text)) > 3:  # words-joined-like-this
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if reference:  # "[.NET] logo" stays ".net logo"; with the space in front it is ". net logo"
        text = text.strip()
    return _replace(text, _AFTER_REPAIR).strip()


def _replace(text: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(html.parser.HTMLParser):
    """Collects the text between tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []

    def handle_data(self, data: str) -> None:
        """Keep text, except inside script and style elements."""
        if self.cdata_elem is None:
            self.found.append(data)


def _without_markup(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.found)


def all_captions(pairs: ImageTextPairs, index: int, clean: Cleaning) -> list[str]:
    """Every variant of an image's caption, cleaned; raises CaptionError if one is empty."""
    captions = pairs.captions(index)
    if pairs.config.first_sentence:
        captions = [*captions, first_sentence(captions[0])]
    captions = clean_captions(captions, clean)
    if not all(captions):
        raise CaptionError("empty caption")
    return captions


def clean_captions(captions: list[str], clean: Cleaning) -> list[str]:
    """Captions cleaned by clean_caption, by the reference's rules, or unchanged."""
    if clean == "none":
        return captions
    return [clean_caption(caption, clean == "reference") for caption in captions]


def first_sentence(caption: str) -> str:
    """The caption up to its first full stop (of any script) that ends a sentence.

    A full stop inside a word ends none, unlike in the published code: "version 1.5 of it" is whole.
    """
    return re.split(r"(?<=[.!?])\s|(?<=[\u3002\uff01\uff1f])", caption.strip(), maxsplit=1)[0]
