"""Every field of every command gets wrong values: a new field is attacked by itself."""

import shutil
from pathlib import Path

import pytest
import yaml
from helpers.command_lines import COMMANDS as ALL_COMMANDS
from helpers.command_lines import MINIMAL, config_class
from helpers.fuzz import COUNTS, WRONG_VALUES, check_line, examples, time_limit
from hypothesis import given
from hypothesis import strategies as st

from core.config import InputError, config_values, parse_config
from core.config_checks import check_values, field_names

COMMANDS = [name for name in ALL_COMMANDS if not name.startswith("benchmarks.")]


def write_base(module: str, folder: Path) -> Path:
    """Write a command's base configuration; a new command needs a line in MINIMAL."""
    (folder / "base.yaml").write_text(yaml.safe_dump(MINIMAL[module]))
    return folder / "base.yaml"


@pytest.mark.parametrize("module", COMMANDS)
@examples(quick=10)
@given(data=st.data())
def test_a_wrong_value_of_any_field_is_accepted_or_refused_in_one_line(
    module, data, tmp_path_factory
):
    kind = config_class(module)
    names = sorted(field_names(kind))
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    folder = tmp_path_factory.mktemp("config")
    try:
        flags = ["--config", str(write_base(module, folder))]
        for i, name in enumerate(chosen):
            value = data.draw(WRONG_VALUES)
            if data.draw(st.booleans()):
                flags.append(f"--{name}={value}")
            else:
                *groups, last = name.split(".")
                text = "".join(f"{'  ' * d}{group}:\n" for d, group in enumerate(groups))
                text += f"{'  ' * len(groups)}{last}: {value}\n"
                path = folder / f"{i}.yaml"
                path.write_text(text, "utf-8", "surrogatepass")
                flags += ["--config", str(path)]
        try:
            with time_limit():
                config = parse_config(kind, flags)
        except InputError as error:
            COUNTS["refused"] += 1
            assert "\n" not in check_line(str(error))
            words = [part for name in names for part in name.split(".")]
            assert any(word in str(error) for word in (*words, ".yaml")), str(error)
        else:
            COUNTS["accepted"] += 1
            check_values(config_values(config))  # every number is finite
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("module", COMMANDS)
def test_the_values_that_are_attacked_are_accepted_before(module, tmp_path):
    parse_config(config_class(module), ["--config", str(write_base(module, tmp_path))])
