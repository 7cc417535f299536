"""Every YAML parses into its command's config and round-trips; no field is unread."""

import dataclasses
import importlib
import re
import types
from dataclasses import dataclass, field

import pytest
from helpers.command_lines import COMMANDS, PACKAGES, config_class, parse_command
from helpers.field_reads import Reads, declaring_classes, field_reads, import_modules
from helpers.paths import ROOT

from core.config import load_config, save_config

RELEASED = ROOT / "configs" / "released"  # a table of models: no command reads these as its config
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent != RELEASED)


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
    """A config class and the config classes of its fields, at any depth."""
    found = {kind}
    for part in dataclasses.fields(kind):
        if dataclasses.is_dataclass(part.type):
            found |= nested(part.type)
    return found


@pytest.fixture(scope="module")
def config_classes() -> set[type]:
    return set().union(*(nested(config_class(command)) for command in COMMANDS))


@pytest.fixture(scope="module")
def reads() -> Reads:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    paths += [ROOT / f"{command.replace('.', '/')}.py" for command in COMMANDS]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return field_reads(import_modules(n.removesuffix(".__init__") for n in sorted(names)))


def test_every_config_is_frozen(config_classes):
    thawed = [kind for kind in config_classes if not kind.__dataclass_params__.frozen]
    assert thawed == []


def documentation(kind: type) -> str:
    return "".join(base.__doc__ or "" for base in kind.__mro__)


def test_every_field_of_every_config_is_documented(config_classes):
    missing = {
        f"{kind.__name__}.{part.name}"
        for kind in config_classes
        for part in dataclasses.fields(kind)
        if not re.search(
            rf"^\s+{part.name}: ", "".join(b.__doc__ or "" for b in kind.__mro__), re.M
        )
    }
    assert missing == set()


def unread_fields(kinds: set[type], reads: Reads) -> list[str]:
    return sorted(
        f"{kind.__module__}.{kind.__name__}.{part.name}"
        for kind in kinds
        for part in dataclasses.fields(kind)
        if not any((base, part.name) in reads for base in declaring_classes(kind, part.name))
    )


def test_every_field_of_every_config_is_read(config_classes, reads):
    unread = unread_fields(config_classes, reads)
    assert not unread, "\n".join(unread)


@dataclass(frozen=True)
class _Inner:
    used: int = 0
    unused: int = 0


@dataclass(frozen=True)
class _Outer:
    inner: _Inner = field(default_factory=_Inner)
    checked: int = 0

    def __post_init__(self) -> None:
        assert self.checked >= 0


class _Other:
    unused = 1


def _uses(config: _Outer, other: _Other) -> int:
    inner = config.inner
    return inner.used + other.unused


def test_a_field_is_unread_where_only_its_own_check_or_another_class_has_its_name():
    module = types.ModuleType("example")
    vars(module).update(globals())
    module.__file__ = __file__
    found = unread_fields({_Inner, _Outer}, field_reads([module]))
    assert [name.split("_")[-1] for name in found] == ["Inner.unused", "Outer.checked"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_it_is_called(command):
    module = importlib.import_module(command)
    assert f"python -m {command}" in module.__doc__
    assert callable(getattr(module, "main", None)) or command.startswith("benchmarks.")
