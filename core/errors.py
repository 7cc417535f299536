"""The error that every command reports as one line."""


class InputError(ValueError):
    """The user asked for something that cannot work.

    The message says what is wrong, where, and what to do about it. A command prints it as one line
    and exits with code 2.
    """
