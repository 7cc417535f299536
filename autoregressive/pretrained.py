"""The old name of autoregressive.convert, for one release."""

from core.config import forward

if __name__ == "__main__":
    forward("autoregressive.convert")
