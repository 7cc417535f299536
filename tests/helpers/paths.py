"""Where the project, its recorded outputs and the optional image folders are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
# Real images beside the checkout. Tests that look at them skip where they are missing.
SHARED_DATA = ROOT.parent / "shared" / "data"
