"""The old name of evaluations.score, for one release."""

from core.config import forward

if __name__ == "__main__":
    forward("evaluations.score")
