"""The project's commands, and the command lines that its documents show."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

from core.config import parse_config
from helpers.paths import ROOT

PACKAGES = ("core", "evaluations", "language", "tokenizer", "autoregressive")
COMMANDS = [
    f"{path.parent.name}.{path.stem}"
    for package in (*PACKAGES[1:], "benchmarks")
    for path in sorted((ROOT / package).glob("*.py"))
    if "parse_config(" in path.read_text()
]
# `-m tokenizer.train`, `scripts/launch.sh tokenizer.train`, `scripts/slurm.sbatch tokenizer.train`
MODULE = re.compile(
    r"(?:-m|launch\.sh\"?|slurm\.sbatch) "
    r"((?:tokenizer|autoregressive|evaluations|language|benchmarks)\.\w+)"
)
START = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|make|sbatch|scripts/\S+)(?: |$)")


# The fewest values with which each command's configuration can be built.
MODELS = {"gpt": "x", "tokenizer": "x", "out": "x"}
MINIMAL: dict[str, dict[str, object]] = {
    "autoregressive.convert": {},
    "autoregressive.inpaint": {**MODELS, "images": "x", "keep_rows": 1},
    "autoregressive.reproduce": {},
    "autoregressive.sample": MODELS,
    "autoregressive.serve": {"gpt": "x", "tokenizer": "x"},
    "autoregressive.train": {"data": {"codes": ["x"]}, "out": "x"},
    "autoregressive.tune_guidance": MODELS,
    "evaluations.clip_score": {"samples": "x", "clip_weights": "x", "out": "x"},
    "evaluations.reference": {"images": "x", "out": "x.npz"},
    "evaluations.score": {"samples": "x", "out": "x"},
    "evaluations.sweep": {"runs": ["x"], "out": "x"},
    "evaluations.verify_adm": {"samples": "x", "out": "x"},
    "language.encode": {"out": "x"},
    "language.hold_out": {"out": "x"},
    "tokenizer.convert": {"source": "x", "out": "x"},
    "tokenizer.encode": {"tokenizer": "x", "data": "x", "out": "x"},
    "tokenizer.reconstruct": {"tokenizer": "x", "data": "x", "out": "x"},
    "tokenizer.train": {"data": "x", "out": "x"},
}


def config_class(module: str) -> type[Any]:
    """The dataclass that a command's main() parses."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_config":
            return getattr(importlib.import_module(module), node.args[0].id)
    raise AssertionError(f"{module} parses no config")


def shown_commands(path: Path) -> list[str]:
    """The command lines in a document, docstring or comment, each on one line."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    if path.suffix in (".sh", ".sbatch", ".yaml"):  # what follows the comments is not for a reader
        lines = [line.removeprefix("#") for line in lines if line.startswith("# ")]
    shown = (line.strip().removeprefix("Command: ") for line in lines)
    return [re.sub(r"\s+", " ", line) for line in shown if START.match(line)]


def parse_command(line: str) -> object:
    """Parse the flags of a command line; "..." at its end stands for more of them.

    Raises AssertionError if its module is no command, InputError if a flag does not exist.
    """
    found = MODULE.search(line)
    assert found, f"no command in: {line}"
    assert found[1] in COMMANDS, f"no such command: {found[1]}"
    words = shlex.split(line[found.end() :], comments=True)
    kind = config_class(found[1])
    return None if "..." in words else parse_config(kind, words)
