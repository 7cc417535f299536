"""Split images with captions: most train, some unseen combinations of seen words are held out.

python -m language.hold_out --pairs.source emoji --out runs/emoji/pairs

The two folders that it writes are pairs sources for the other commands, and their pairs.jsonl is a
list of prompts for autoregressive.sample. The images stay where they are.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core.config import InputError, parse_config, parse_first, run_command, save_config
from core.data.config import ImageTextConfig


@dataclass(frozen=True)
class HoldOutConfig:
    """Which pairs to split, and how many captions to hold out.

    Args:
        pairs: A folder of images with a .txt or .json of the same name beside each; the first
            variant of the caption is used.
        out: Output folder: train/pairs.jsonl and held_out/pairs.jsonl, which name the images by
            their absolute paths.
        share: Share of the captions that are drawn to be held out, in (0, 1). Fewer are held out,
            because every word of a held-out caption must occur in a training caption.
        min_words: Captions of fewer words are never held out.
    """

    out: Path
    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    share: float = 0.06
    min_words: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share}, must be in (0, 1)")
        if self.min_words < 1:
            raise ValueError(f"min_words is {self.min_words}, must be >= 1")


parse_first(HoldOutConfig, __name__)

from core.data.image_text import CaptionError, ImageTextPairs, is_image_text
from core.files import write_text
from core.lock import writer_lock


def held_out_captions(captions: Sequence[str], share: float, min_words: int = 2) -> set[str]:
    """The captions that must not be trained on.

    A caption is drawn by the hash of its text, so the choice does not depend on the other captions
    or their order. A drawn caption goes back to training if it has fewer than min_words words, or
    a word (in any case) that no training caption would have.
    """
    words = {caption: set(caption.lower().split()) for caption in captions}
    left = Counter(word for found in words.values() for word in found)
    held_out = set()
    for caption in sorted(words, key=_place):
        if _place(caption) >= share:
            break
        found = words[caption]
        if len(caption.split()) >= min_words and all(left[word] > 1 for word in found):
            held_out.add(caption)
            left.subtract(found)
    return held_out


def _place(caption: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:6], "big") / 2**48


def hold_out(config: HoldOutConfig) -> None:
    """Write the two lists of pairs and print their sizes."""
    if config.pairs.source is not None and is_image_text(config.pairs.source):
        raise InputError(f"{config.pairs.source}: expected a folder of images with captions")
    pairs = ImageTextPairs(config.pairs)
    captions: dict[int, str] = {}
    for i in range(len(pairs)):
        try:
            captions[i] = pairs.captions(i)[0]
        except CaptionError:
            continue  # language.encode would skip and name it
    held_out = held_out_captions(list(captions.values()), config.share, config.min_words)
    if not held_out:
        raise InputError(f"{config.pairs.source}: no caption to hold out; raise share")
    for name in ("train", "held_out"):
        wanted = [i for i in captions if (captions[i] in held_out) == (name == "held_out")]
        lines = [
            json.dumps({"image_path": str(pairs.files[i].resolve()), "text": captions[i]})
            for i in wanted
        ]
        path = config.out / name / "pairs.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")
        print(f"{path}: {len(lines)} pairs")
    if missing := len(pairs) - len(captions):
        print(f"{missing} images without a usable caption are in neither")
    save_config(config, config.out / "config.yaml")


def main() -> None:
    """Entry point."""
    config = parse_config(HoldOutConfig)
    with writer_lock(config.out):
        hold_out(config)


if __name__ == "__main__":
    run_command(main)
