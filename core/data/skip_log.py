"""Lists and counts the images that could not be read."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from core.files import write_text

logger = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """An image that could not be read, and the reason in one short phrase."""

    path: str
    reason: str


class SkipLog:
    """Counts skipped images by reason, and lists each of them once in a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.seen, self.reasons = path, set(), Counter()
        if path and path.exists():  # A resumed run counts the images listed so far.
            for line in path.read_text("utf-8", "surrogateescape").splitlines():
                name, _, reason = line.partition("\t")
                self.seen.add(name)
                self.reasons[reason] += 1

    def add(self, skipped: list[Skipped]) -> None:
        """Record images. An image counts once, even if it is skipped in every epoch."""
        for item in skipped:
            if item.path in self.seen:
                continue
            self.seen.add(item.path)
            self.reasons[item.reason] += 1
            logger.warning("skipped %s: %s", item.path, item.reason)
            if self.path:
                with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(f"{item.path}\t{item.reason}\n")

    def __len__(self) -> int:
        return len(self.seen)

    def summary(self) -> str:
        """Counts by reason: "3 images skipped (2 damaged image, 1 not an image)", or ""."""
        return summarize(self.reasons)


def summarize(reasons: Counter[str]) -> str:
    """One line that counts skipped images by reason; "" if there are none."""
    count = sum(reasons.values())
    if not count:
        return ""
    by_reason = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return f"{count} image{'s' * (count > 1)} skipped ({by_reason})"


def write_skipped(path: Path, skipped: Sequence[Skipped]) -> str:
    """List skipped images in a file, one tab-separated path and reason a line -> a summary."""
    write_text(path, "".join(f"{item.path}\t{item.reason}\n" for item in skipped))
    return f"{path}: {summarize(Counter(item.reason for item in skipped))}"
