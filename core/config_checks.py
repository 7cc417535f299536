"""What no configuration may hold, whatever its class: refused before the class is built."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from core.errors import InputError
from core.files import check_regular_file

MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 10_000  # with every YAML alias written out
MAX_DEPTH = 50
LARGEST_INTEGER = 2**63 - 1


def check_config_file(path: Path) -> None:
    """Raise InputError for a file that cannot be a configuration, before it is parsed.

    Refused are pipes and devices, files above 1 MiB, aliases that multiply (a "YAML bomb") or
    contain themselves, and files that name other configuration files.
    """
    check_text(str(path), "config")
    check_regular_file(path)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, not a configuration")
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        count = 0
        for count, _ in enumerate(_nodes(root), 1):
            if count > MAX_CONFIG_VALUES:
                raise InputError(f"{path}: aliases that write out to too many values")
        # Unknown tags, numbers of thousands of digits, and what only jsonargparse's loader refuses.
        yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except InputError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: not YAML ({reason})") from error
    if isinstance(root, yaml.MappingNode) and any(key.value == "config" for key, _ in root.value):
        raise InputError(f"{path}: a configuration file cannot include another; give both as flags")


def _nodes(node: yaml.Node | None, depth: int = 0) -> Iterator[yaml.Node]:
    """Every value of a YAML document, aliases written out."""
    if node is None:
        return
    if depth > MAX_DEPTH:
        raise RecursionError("nested too deeply, or an alias contains itself")
    yield node
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for item in pair:
                yield from _nodes(item, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item, depth + 1)


def check_values(values: Any, name: str = "") -> None:  # noqa: ANN401 - parsed values, nested
    """Raise InputError, naming the key, for NaN, infinity, an integer beyond 64 bits, or a NUL."""
    if isinstance(values, dict):
        for key, value in values.items():
            check_text(str(key), name)
            check_values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            check_values(value, name)
    elif isinstance(values, float) and not math.isfinite(values):
        raise InputError(f"{name} is {values}, expected a finite number (unset is null)")
    elif isinstance(values, int) and abs(values) > LARGEST_INTEGER:
        raise InputError(f"{name}: an integer beyond 64 bits")
    elif isinstance(values, str | os.PathLike):
        check_text(str(values), name)


def check_text(text: str, name: str) -> None:
    """Raise InputError for text that no path and no prompt can hold."""
    if "\0" in text:
        raise InputError(f"{name}: contains a NUL character")


def field_names(config_class: type) -> list[str]:
    """The names of all fields, nested ones with dots."""
    return [name for name, _ in _fields(config_class)]


def _fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and type of every field, groups included."""
    types = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, name = types[field.name], f"{prefix}{field.name}"
        yield name, kind
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{name}.")


def check_nulls(config_class: type, values: Mapping[str, Any]) -> None:
    """Raise InputError for null in a field that must have a value; jsonargparse lets it pass."""
    for name, kind in _fields(config_class):
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and type(None) not in get_args(kind):
            raise InputError(f"{name} is null, expected a value")


def name_flags(config_class: type, arguments: Sequence[str], message: str) -> str:
    """The message, after the flags and files that were given where it names no field by itself."""
    if "unrecognized arguments: --" in message:
        return message
    if any(name in message for name in field_names(config_class)):
        return message
    given = [argument.partition("=")[0] for argument in arguments]
    return f"{' '.join(given)[:200]}: {message}" if given else message


def join_lists(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with lists in brackets: `--x a b` and `--x a --x b` become `--x ["a", "b"]`.

    Brackets need quotes in zsh. A list that is already in brackets stays as it is.
    """
    lists = {f"--{name}": kind for name, kind in _fields(config_class) if _is_list(kind)}
    joined: list[str] = []
    places: dict[str, int] = {}  # of each flag's list in `joined`
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        joined.append(flag)
        if flag not in lists:
            continue
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
            joined.append(values[0])
        elif flag in places:
            joined.pop()
            start = joined[places[flag]].removesuffix("]")
            joined[places[flag]] = f"{start}, {_list_text(values, lists[flag])}]"
        elif values:
            places[flag] = len(joined)
            joined.append(f"[{_list_text(values, lists[flag])}]")
    return joined


def _is_list(kind: Any) -> bool:  # noqa: ANN401 - any annotation
    return get_origin(kind) is tuple or any(get_origin(part) is tuple for part in get_args(kind))


def _list_text(values: Sequence[str], kind: Any) -> str:  # noqa: ANN401 - any annotation
    """Values as the inside of a list in YAML: numbers as they are, text in quotes."""
    numbers = not {int, float, bool}.isdisjoint((*get_args(kind), *_parts(kind)))
    return ", ".join(value if numbers else json.dumps(value) for value in values)


def _parts(kind: Any) -> list[Any]:  # noqa: ANN401 - any annotation
    """The arguments of the arguments of a type: int for tuple[int, int] | None."""
    return [part for outer in get_args(kind) for part in get_args(outer)]


def nearest_name(config_class: type, arguments: Sequence[str], message: str) -> str:
    """Advice for a message about an unknown flag: the field with the most similar name, or ""."""
    names = field_names(config_class)
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and argument.partition("=")[0] in message:
            longer = [other for other in names if other.startswith(name)]
            similar = longer[:1] or difflib.get_close_matches(name, names, 1)
            if name not in names and similar:
                return f"; did you mean --{similar[0]}?"
    return ""
