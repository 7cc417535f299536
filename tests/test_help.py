"""Help of every command: complete, and printed before torch is imported."""

import json
import re
import subprocess
import sys

import pytest
from helpers.command_lines import COMMANDS, config_class
from helpers.commands import environment
from helpers.paths import ROOT

from core.config_checks import field_names

SLOW = {"torch", "torchvision", "transformers", "timm", "scipy", "matplotlib", "pandas"}
# Prints the help of each command as `python -m COMMAND --help` does, and what it has imported.
PRINT_HELP = """
import contextlib, io, json, runpy, sys

found = {}
for command in sys.argv[1:]:
    text = io.StringIO()
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 0, command
    found[command] = (text.getvalue(), sorted(set(sys.modules) & set(SLOW)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """Of each command: its help, and the slow packages that are imported when it is printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"SLOW = {sorted(SLOW)}\n{PRINT_HELP}", *COMMANDS],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_slow_package(helps, command):
    assert helps[command][1] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_command_its_docstring_and_every_field(helps, command):
    text = helps[command][0]
    assert text.startswith(f"usage: python -m {command} [--config FILE ...] [--FIELD VALUE ...]\n")
    docstring = sys.modules[config_class(command).__module__].__doc__
    module = sys.modules[command].__doc__ or docstring
    assert module.strip() in text, "the docstring, with its examples as typed"
    assert [n for n in field_names(config_class(command)) if f"--{n} " not in text] == []
    types = " ".join(re.findall(r"type: [^()]*", " ".join(text.split())))
    assert not re.search(r"<class|Path|Literal|Optional|Union|tuple|None", types)


@pytest.mark.parametrize("package", ["autoregressive", "tokenizer"])
def test_importing_a_package_does_not_import_torch(package):
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
