"""The old name of autoregressive.tune_guidance, for one release."""

from core.config import forward

if __name__ == "__main__":
    forward("autoregressive.tune_guidance")
