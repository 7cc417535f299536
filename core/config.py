"""Configuration is data: a frozen dataclass, filled from YAML files and then from flags.

    config = parse_config(TrainConfig)      # --config a.yaml --config b.yaml --optimizer.lr 3e-4

A list is written `--data.codes a b`, `--data.codes a --data.codes b` or `--data.codes '[a,b]'`.
Order: defaults, then each `--config` in turn, then flags. `--print_config` shows the result and
stops. This is the only file that knows jsonargparse.
"""

import argparse
import atexit
import dataclasses
import errno
import functools
import itertools
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse
import yaml
from tqdm import tqdm

from core import __version__
from core.config_checks import (
    check_config_file,
    check_nulls,
    check_values,
    join_lists,
    name_flags,
    nearest_name,
)
from core.errors import InputError, memory_problem, shorten
from core.files import write_text

Config = TypeVar("Config")


# What only the user can put right. Any other OSError (a connection reset, a stale file handle of a
# network disk, a full disk) may pass by itself, so a launcher should start the command again.
MISTAKES = (
    InputError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# Of other OSErrors: what a path alone can cause.
_MISTAKE_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


# What jsonargparse and the YAML reader raise for text that is no configuration.
_PARSE_ERRORS = (
    jsonargparse.ArgumentError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    yaml.YAMLError,
)


@functools.cache  # it takes longer to build than to use
def _parser(config_class: type) -> jsonargparse.ArgumentParser:
    command = _command(config_class)
    description = (sys.modules[command].__doc__ or "").strip()
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m {_module_name(command)}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,  # a flag that a later version adds must not change what `--ou` means
        formatter_class=_Help,
        version=__version__,
        usage="%(prog)s [--config FILE ...] [--FIELD VALUE ...]",
    )
    parser.add_argument(
        "--config", action="config", help="A YAML file; may be given several times, later ones win."
    )
    parser.add_class_arguments(config_class, as_group=False)
    return parser


# Python's notation in the "(type: ..., default: ...)" of a field's help -> that of a command line.
_PLAIN_TYPES = (
    (r"<class 'Path'>|\bPath\b", "path"),
    (r"Optional\[(.*)\](?=, default|\)$)", r"\1 | null"),
    # The choices stand beside the flag.
    (r"type: Literal\[[^\]]*\](?: \| null)?, (?=default)", ""),
    (r",? ?type: Literal\[[^\]]*\](?: \| null)?(?=\)$)", ""),
    (r"Literal\[([^\]]*)\]", lambda found: found[1].replace("'", "").replace(", ", "|")),
    (r"tuple\[([^\[\]]*)\]", lambda found: found[1].replace(", ", " ")),
    (r"tuple\[([^\[\]]*)\]", lambda found: found[1].replace(", ", " ")),  # of tuples
    (r"default: \(\)\)$", "default: none)"),
    (r"default: \((.+)\)\)$", lambda found: f"default: {re.sub(r'[(),]', '', found[1])})"),
    (r"default: .*\)$", lambda found: re.sub(r"['\"]", "", found[0])),
    (r"\bNone\b(?!.*type: )(?=.*\)$)", "null"),
    (r"default: (.*)\bTrue\b", r"default: \1true"),
    (r"default: (.*)\bFalse\b", r"default: \1false"),
)


class _Help(jsonargparse.DefaultHelpFormatter):
    """Keep a command's docstring as it is, and show types as people write them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        for pattern, plain in _PLAIN_TYPES:
            text = re.sub(pattern, plain, text)
        return text


def _command(config_class: type) -> str:
    """The module that help describes: the command that runs, or that of the configuration."""
    main = sys.modules["__main__"]
    runs = getattr(main, config_class.__name__, None) is config_class
    return "__main__" if runs else config_class.__module__


def _module_name(module: str) -> str:
    spec = sys.modules[module].__spec__
    return spec.name if spec else module


def parse_first(config_class: type, name: str) -> None:
    """Parse the command line above a command's slow imports, such as torch; `name` is __name__.

    --help, --version, --print_config and a wrong flag end the command here, in half a second.
    """
    if name == "__main__":
        _end_on_errors(lambda: parse_config(config_class))


def parse_config(config_class: type[Config], arguments: Sequence[str] | None = None) -> Config:
    """The configuration that the command line asks for.

    Raises InputError, naming the key, for an unknown key, a wrong type or a refused value.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    for path in _config_files(given):
        check_config_file(path)
    parser = _parser(config_class)
    try:
        return _build(parser, config_class, parser.parse_args(join_lists(config_class, given)))
    except InputError:
        raise
    except _PARSE_ERRORS as error:
        message = name_flags(config_class, given, _one_line(error))
        raise InputError(message + nearest_name(config_class, given, message)) from error


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that `--config` names."""
    flag = "--config"
    files = [a.removeprefix(f"{flag}=") for a in arguments if a.startswith(f"{flag}=")]
    files += [b for a, b in itertools.pairwise(arguments) if a == flag]
    return [Path(file) for file in files]


def load_config(config_class: type[Config], path: Path) -> Config:
    """The configuration saved in a YAML file, e.g. a checkpoint's `config.yaml`."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such configuration file")
    check_config_file(Path(path))
    parser = _parser(config_class)
    try:
        return _build(parser, config_class, parser.parse_path(str(path)))
    except _PARSE_ERRORS as error:
        message = _one_line(error)
        raise InputError(message if str(path) in message else f"{path}: {message}") from error


def save_config(config: Any, path: Path) -> None:  # noqa: ANN401 - any config dataclass
    """Write every field, defaults included, so that the file alone reproduces the run."""
    write_text(Path(path), config_text(config))


def config_text(config: Any) -> str:  # noqa: ANN401 - any config dataclass
    """The configuration as YAML."""
    return yaml.safe_dump(config_values(config), sort_keys=False)


def config_values(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any config dataclass
    """The configuration as plain values, for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:  # noqa: ANN401 - nested dataclass fields
    """Paths as strings and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _build(
    parser: jsonargparse.ArgumentParser, config_class: type[Config], parsed: jsonargparse.Namespace
) -> Config:
    parsed.pop("config", None)
    _check_groups(config_class, parsed)
    values = parsed.as_dict()
    check_nulls(config_class, values)
    check_values(values)
    try:
        return config_class(**vars(parser.instantiate(parsed)))
    except ValueError as error:
        raise InputError(_one_line(error)) from error


def _check_groups(config_class: type, parsed: jsonargparse.Namespace, prefix: str = "") -> None:
    """`optimizer: 3` or `optimizer:` in YAML parses, and fails later without naming the key."""
    for field in dataclasses.fields(config_class):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            name, group = f"{prefix}{field.name}", parsed[field.name]
            if not isinstance(group, jsonargparse.Namespace):
                raise InputError(f"{name} is {group}, expected keys of its own below it")
            _check_groups(field.type, group, f"{name}.")


def _one_line(error: Exception) -> str:
    """jsonargparse explains over several lines; a user needs the first cause and its key."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    return " ".join(lines)[:600]


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main(), with the settings of the environment that all commands share.

    A user's mistake ends it with one line and exit code 2; another OSError, which may pass by
    itself, with one line and exit code 1, on which launch.sh and slurm.sbatch start it again.
    """
    _end_on_errors(main)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave_group()


def _end_on_errors(main: Callable[[], object]) -> None:
    """Run main(); a mistake or an OSError ends the process as run_command says."""
    _set_environment()
    try:
        main()
    except InputError as error:
        fail(str(error), code=2)
    except OSError as error:
        if is_mistake(error):
            fail(str(error), code=2)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space there, then " if full else ""
        fail(f"{error}; {advice}run the same command again to continue", code=1)
    except (RuntimeError, MemoryError) as error:
        if not (problem := memory_problem(error)):
            raise
        fail(problem, code=2)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to continue", code=2)


def _leave_group() -> NoReturn:
    """End a process of several that has done its work, without the interpreter's own end.

    DTensor's caches keep the mesh, and with it gloo's threads, to the last moment, when such a
    thread can abort the process: the launcher would take a finished run for a crash.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def is_mistake(error: BaseException) -> bool:
    """Whether only the user can put this right: the command ends with one line, exit code 2."""
    number = error.errno if isinstance(error, OSError) else None
    return isinstance(error, MISTAKES) or number in _MISTAKE_NUMBERS


def _set_environment() -> None:
    """What torch reads from the environment once, at its first allocation."""
    # Large pages for large tensors on CPUs, where Linux gives them on request: a kernel that takes
    # new memory spends its time on page faults otherwise (VQ-16 encodes an image in 0.77 s instead
    # of 1.09 in float32; a decoding step took 36 or 244 ms by the allocator's mood, now 36).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def forward(name: str) -> None:
    """Run the command that an old name now stands for, and say so."""
    print(f"renamed: python -m {name}", file=sys.stderr)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one line and leave with an exit code, without waiting for other ranks."""
    name = sys.modules["__main__"].__spec__
    # tqdm's own print: a line of its own, not the end of a progress bar's.
    tqdm.write(
        f"{name.name if name else 'error'}: {shorten(' '.join(message.split()))}", file=sys.stderr
    )
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 2 and "SIGUSR2" in os.environ.get("PET_SIGNALS_TO_HANDLE", ""):
        # launch.sh has told torchrun to stop on this signal, instead of trying a mistake again.
        os.kill(os.getppid(), signal.SIGUSR2)
    # os._exit: loader workers and process groups must not turn one line into a hang.
    os._exit(code)
