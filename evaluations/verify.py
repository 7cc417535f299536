"""The old name of evaluations.verify_adm, for one release."""

from core.config import forward

if __name__ == "__main__":
    forward("evaluations.verify_adm")
