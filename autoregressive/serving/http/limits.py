"""What the HTTP server refuses. Needs none of the libraries that the server needs."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What clients may ask for, and how much of it at a time.

    Args:
        images: Images of one request.
        queue: Images of all requests that wait or run; a request beyond it gets 429.
        body_bytes: Size of a request's body.
        seconds: Time of one request, waiting included.
    """

    images: int = 10
    queue: int = 256
    body_bytes: int = 65536
    seconds: float = 600.0

    def __post_init__(self) -> None:
        if min(self.images, self.queue, self.body_bytes) < 1 or self.seconds <= 0:
            raise ValueError("every one of limits must be positive")
