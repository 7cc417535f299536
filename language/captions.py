"""Captions of web pictures, cleaned as those of the released text models were (PixArt, DeepFloyd).

What shops and crawlers leave in captions goes: addresses, markup, handles, file names, article
numbers, calls to buy. Captions in Chinese, Japanese and Korean are kept; the released models never
saw them, so `reference=True` strips them as the reference does.
"""

import html
import re
from typing import Literal
from urllib.parse import unquote_plus

import ftfy

from core.pairs import CaptionError, Pairs

# (what it matches, what it becomes), in this order; the captions are in lower case by then.
_MARKUP = (
    (r"<person>", "person"),
    (r"(?:https?://|www\.)\S+", ""),
    (r"\b[a-z0-9.-]+\.(?:com|co|ru|net|org|edu|gov|it)\b\S*", ""),
    (r"</?[a-z][^>]*>", " "),
    (r"@[\w\d]+\b", ""),
)
# Strokes, enclosed and square signs, hexagrams, and the unified ideographs with extension A.
_REFERENCE_ONLY = ((r"[\u31c0-\u4dff\u4e00-\u9fff]+", ""),)
_SIGNS = (
    (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40]+", "-"),
    (r"[\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # article numbers
    (r"\S+\.(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)\b", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (
        r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\]\[}{|\\/*]+",
        " ",
    ),
    (r"\s+\.\s+", " "),
)
_SHOPS = (
    (r"\b[a-z]{1,3}\d{3,15}(?:[a-z]{1,4})?\b|\b\d{4,}[a-z]{1,4}\d*\b", ""),  # jc6640, 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s+)?download(?:\s+free)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)(?:\s+images?)?\b", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\w*\d+\w*[x\u0445\u00d7]\w*\d+\w*\b", ""),  # sizes: 1024x768
    (r"\s*:\s*", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\s\S]+)[\"']$", r"\1"),
    (r"^['_,\-:;]+|['_,\-:+]+$|^\.\S+$", ""),
)


def _compiled(rules: tuple[tuple[str, str], ...]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), new) for pattern, new in rules]


_BEFORE, _IDEOGRAPHS, _MIDDLE, _AFTER = map(_compiled, (_MARKUP, _REFERENCE_ONLY, _SIGNS, _SHOPS))


def clean_caption(caption: str, reference: bool = False) -> str:
    """A caption in lower case, without what does not describe a picture; "" where nothing is left.

    reference: also strip Chinese characters, as the reference does before encoding.
    """
    # Only before it is in lower case can most mis-decoded text be mended; the reference does after.
    text = caption if reference else ftfy.fix_text(caption)
    text = unquote_plus(text).strip().lower()
    text = _replace(text, _BEFORE)
    if reference:
        text = _replace(text, _IDEOGRAPHS)
    text = _replace(text, _MIDDLE)
    if len(re.findall(r"[-_]", text)) > 3:
        text = re.sub(r"[-_]", " ", text)  # a-file-name-with-words
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replace(text.strip(), _AFTER).strip()


def _replace(text: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in rules:
        text = pattern.sub(new, text)
    return text


Cleaning = Literal["clean", "reference", "none"]


def all_captions(pairs: Pairs, index: int, clean: Cleaning) -> list[str]:
    """Every variant of a pair's caption, as it is encoded; raises CaptionError for empty ones."""
    captions = pairs.captions(index)
    if pairs.config.first_sentence:
        captions = [*captions, first_sentence(captions[0])]
    captions = cleaned(captions, clean)
    if not all(captions):
        raise CaptionError("empty caption")
    return captions


def cleaned(captions: list[str], clean: Cleaning) -> list[str]:
    """Captions after clean_caption, or by the reference's rules, or as they are."""
    if clean == "none":
        return captions
    return [clean_caption(caption, clean == "reference") for caption in captions]


def first_sentence(caption: str) -> str:
    """The caption up to its first full stop (of any script) that ends a sentence."""
    return re.split(r"(?<=[.!?])\s|(?<=[\u3002\uff01\uff1f])", caption.strip(), maxsplit=1)[0]
