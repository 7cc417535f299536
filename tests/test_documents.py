"""Every command that a document shows exists, and its flags parse."""

import re

import pytest
from helpers.paths import ROOT
from test_configs import COMMANDS, parse_command

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMAND = re.compile(r"-m ((?:tokenizer|autoregressive|evaluations|language)\.[a-z_]+)")


def shown_commands() -> list[str]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        found += [line.strip() for line in text.splitlines() if COMMAND.search(line)]
    return [line for line in found if line.startswith(("python", "torchrun"))]


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_in_a_document_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_command(line)


def test_the_readme_shows_every_command():
    shown = set(COMMAND.findall((ROOT / "README.md").read_text()))
    assert shown >= set(COMMANDS)


def test_the_readme_links_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_every_launcher_passes_its_flags_to_a_command_that_exists():
    launchers = sorted((ROOT / "scripts").rglob("*.sh"))
    assert launchers
    for path in launchers:
        text = path.read_text()
        assert set(COMMAND.findall(text)) <= set(COMMANDS), path
        assert '"$@"' in text, path
