"""Counts and names the images that could not be read."""

import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    path: str
    reason: str


class SkipLog:
    """Counts pictures that were skipped, by reason, and names each once in a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.seen, self.reasons = path, set(), Counter()
        if path and path.exists():  # a resumed run: what is listed is counted, and not listed again
            for line in path.read_text().splitlines():
                name, _, reason = line.partition("\t")
                self.seen.add(name)
                self.reasons[reason] += 1

    def add(self, skipped: list[Skipped]) -> None:
        """Note pictures; each is counted once, however many epochs meet it."""
        for item in skipped:
            if item.path in self.seen:
                continue
            self.seen.add(item.path)
            self.reasons[item.reason] += 1
            logger.warning("skipped %s: %s", item.path, item.reason)
            if self.path:
                with self.path.open("a") as file:
                    file.write(f"{item.path}\t{item.reason}\n")

    def __len__(self) -> int:
        return len(self.seen)

    def summary(self) -> str:
        """For people: "3 pictures skipped (2 damaged image, 1 not an image)", or nothing."""
        if not self.seen:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{len(self.seen)} picture{'s' * (len(self.seen) > 1)} skipped ({reasons})"
