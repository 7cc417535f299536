"""Reads npy files and members of npz files: never more than is there, or than is expected."""

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from core.errors import InputError
from core.files import check_regular_file

# What numpy and zipfile raise for damaged files.
DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    IndexError,
    SyntaxError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """Read an npy file, or map it into memory.

    Raises InputError if it is missing, damaged, of Python objects, or shorter than its header says,
    which is found before memory for it is allocated.
    """
    check_regular_file(path)
    try:
        with Path(path).open("rb") as file:
            shape, dtype = _read_header(file)
            stored = os.fstat(file.fileno()).st_size - file.tell()
        if math.prod(shape) * dtype.itemsize > stored:
            raise ValueError(f"its header says {dtype} {shape}, its end is missing")
        empty = math.prod(shape) == 0  # nothing to map
        return np.load(path, mmap_mode="r" if mapped and not empty else None, allow_pickle=False)
    except DAMAGE as error:
        raise InputError(f"{path}: missing or damaged ({_brief(error)})") from error


def npz_names(path: Path) -> list[str]:
    """The names of the arrays in an npz; raises InputError if it is missing or damaged."""
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except DAMAGE as error:
        raise InputError(f"{path}: not an npz ({_brief(error)})") from error


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array in an npz, without reading the array."""
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            return _read_header(member)
    except DAMAGE as error:
        raise InputError(f"{path}: {name} is missing or damaged ({_brief(error)})") from error


def read_npz_array(path: Path, name: str, shape: Sequence[int], kinds: str) -> np.ndarray:
    """An array of an npz that must have this shape and one of these dtype kinds ("f", "iu").

    Shape and dtype are checked first: a compressed file cannot fill the memory.
    """
    found, dtype = npz_header(path, name)
    if found != tuple(shape) or dtype.kind not in kinds:
        raise InputError(f"{path}: {name} is {dtype} {found}, expected {tuple(shape)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file[name]
    except DAMAGE as error:
        raise InputError(f"{path}: {name} is damaged ({_brief(error)})") from error


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype at the start of an npy."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"npy version {version}")
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if any(side < 0 for side in shape):
        raise ValueError(f"its header says {shape}")
    return shape, dtype


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
