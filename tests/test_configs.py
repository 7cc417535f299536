"""Every YAML parses into its command's config, round-trips, and no field is dead."""

import ast
import dataclasses
import importlib
import re
import shlex

import pytest
from helpers.paths import ROOT

from core.config import load_config, parse_config, save_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.parent.name != "released"]  # a table, no command's
COMMANDS = [
    f"{path.parent.name}.{path.stem}"
    for package in ("evaluations", "language", "tokenizer", "autoregressive")
    for path in sorted((ROOT / package).glob("*.py"))
    if "parse_config(" in path.read_text()
]


def config_class(module: str) -> type:
    """The dataclass that the module's main() parses."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_config":
            return getattr(importlib.import_module(module), node.args[0].id)
    raise AssertionError(f"{module} parses no config")


def parse_command(line: str) -> object:
    """Parse the flags of a command line that a document shows."""
    words = shlex.split(line, comments=True)
    start = max(i for i, word in enumerate(words) if word == "-m") + 1
    return parse_config(config_class(words[start]), words[start + 1 :])


def header(path) -> dict[str, str]:
    lines = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
    return dict(re.match(r"([A-Z][a-z ]+): (.*)", line).groups() for line in lines[:4])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_opens_with_its_command_which_parses_and_round_trips(
    path, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    facts = header(path)
    assert list(facts) == ["What", "Command", "Hardware and hours", "Expected"]
    assert str(path.relative_to(ROOT)) in facts["Command"]
    config = parse_command(facts["Command"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(type(config), tmp_path / "config.yaml") == config


def nested(kind: type) -> set[type]:
    found = {kind}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found |= nested(field.type)
    return found


def attributes(node: ast.AST) -> set[str]:
    """Attribute names below a node; a field that only its own check reads does nothing."""
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) else set()
    return own.union(*(attributes(child) for child in ast.iter_child_nodes(node)))


def test_every_field_of_every_config_is_read_and_documented():
    kinds = set().union(*(nested(config_class(command)) for command in COMMANDS))
    read = set()
    for package in ("core", "evaluations", "language", "tokenizer", "autoregressive"):
        for path in (ROOT / package).rglob("*.py"):
            read |= attributes(ast.parse(path.read_text()))
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert field.name in read, f"{kind.__name__}.{field.name} is never read"
            bases = "".join(base.__doc__ or "" for base in kind.__mro__)
            assert re.search(rf"^\s+{field.name}: ", bases, re.M), f"{kind.__name__}.{field.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_it_is_called(command):
    module = importlib.import_module(command)
    assert f"python -m {command} " in module.__doc__
    assert callable(module.main)
