"""The old name of tokenizer.convert, for one release."""

from core.config import forward

if __name__ == "__main__":
    forward("tokenizer.convert")
