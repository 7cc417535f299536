"""The error that every command reports as one line."""

import re

LONGEST_WORD = 400  # characters; a path is rarely longer, a damaged file may claim any
LONGEST_MESSAGE = 1200


class InputError(ValueError):
    """The user asked for something that cannot work.

    The message says what is wrong, where, and what to do about it. A command prints it as one line
    and exits with code 2. What it quotes is cut where nobody would read it.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shorten(message))


def shorten(message: str) -> str:
    """A message whose longest words, names that a file holds, have lost their middle."""
    short = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: _without_middle(word[0], 200), message)
    # Line by line: a data loader's process sends its traceback, of which the last line counts.
    return "\n".join(_without_middle(line, LONGEST_MESSAGE) for line in short.split("\n"))


def _without_middle(text: str, length: int) -> str:
    """At most `length` characters of a text: its beginning and its end."""
    if len(text) <= length:
        return text
    return f"{text[: length - 60]} ... {text[-50:]}"


# What torch says where sizes are beyond the memory, or beyond what an address can hold.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Storage size calculation overflowed",
    "Overflow when unpacking long",
    "Stride calculation overflowed",
    "numel: integer multiplication overflow",
)


def memory_problem(error: Exception) -> str:
    """One line about an error of a memory that is too small; "" for any other error."""
    said = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(text in said for text in _NO_MEMORY):
        return ""
    return f"the memory is too small: {said[:200] or 'MemoryError'}; take smaller sizes or batches"
