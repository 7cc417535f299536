"""Every command that a document, script, docstring or YAML header shows exists and parses."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from helpers.command_lines import COMMANDS, MODULE, PACKAGES, parse_command, shown_commands
from helpers.paths import ROOT

READMES = [
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]
    if path.parent != ROOT / "runs"
]
SOURCES = [
    p for f in (*PACKAGES, "benchmarks", "scripts") for p in sorted((ROOT / f).rglob("*.py"))
]
SHELL = [*sorted((ROOT / "scripts").rglob("*.sh")), *sorted((ROOT / "scripts").rglob("*.sbatch"))]
YAML = sorted((ROOT / "configs").rglob("*.yaml"))
TARGETS = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))


def commands_of(paths: list[Path]) -> list[object]:
    return [
        pytest.param(line, id=f"{path.relative_to(ROOT)}: {line[:60]}")
        for path in paths
        for line in shown_commands(path)
    ]


EVERY = commands_of([*READMES, *SOURCES, *SHELL, *YAML])


@pytest.mark.parametrize("line", EVERY)
def test_every_shown_command_exists_and_its_flags_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    script = next((word for word in words if word.startswith("scripts/")), None)
    assert script is None or (ROOT / script).is_file(), line
    if MODULE.search(line):
        parse_command(line)
    elif "make" in words:
        targets = [word for word in words[words.index("make") + 1 :] if "=" not in word]
        assert set(targets) <= TARGETS, line
    elif script and "..." not in words:
        text = (ROOT / script).read_text()
        commands = MODULE.findall(text)
        if len(commands) == 1:  # a launcher, which hands its flags on
            line = f"-m {commands[0]} {shlex.join(words[words.index(script) + 1 :])}"
            parse_command(line)
        else:
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), line


@pytest.mark.parametrize("line", EVERY)
def test_every_shown_command_means_the_same_in_zsh(line):
    """Outside quotes, zsh takes brackets, braces and stars for patterns and fails."""
    unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", re.sub(r" # .*", "", line))
    assert not re.search(r"[\[\]{}*?]", unquoted.replace("${", "").replace("}", ""))


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lists_in_a_readme_have_no_brackets(path):
    """People type `--data.codes a b`; brackets are only for lists of words that look like flags."""
    for line in shown_commands(path):
        assert not re.search(r"'\[[^\"']*\]'", line), line


def test_the_readmes_show_every_command():
    shown = {name for path in READMES for name in MODULE.findall(path.read_text())}
    assert set(COMMANDS) - shown == set()


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_readme_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_every_package_has_a_readme_and_the_first_one_stays_short():
    for folder in (*PACKAGES, "benchmarks"):
        headings = re.findall(r"^## .*", (ROOT / folder / "README.md").read_text(), re.M)
        assert "## What to know" in headings, folder
        assert folder == "benchmarks" or "## How to extend it" in headings, folder
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_launcher_passes_its_flags_to_a_command_that_exists():
    launchers = [path for path in SHELL if path.suffix == ".sh"]
    assert launchers
    for path in launchers:
        text = path.read_text()
        assert set(MODULE.findall(text)) <= set(COMMANDS), path
        assert '"$@"' in text, path
