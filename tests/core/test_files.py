import os

import pytest

from core.errors import InputError
from core.files import atomic_path, atomic_write, fingerprint_of_files, read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), atomic_write(path, "w") as file:
        file.write("half")
        raise KeyError
    with pytest.raises(ValueError, match="nan"):
        write_json(path, float("nan"))
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_two_writers_of_one_file_use_different_temporary_files(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_path(path) as one, atomic_path(path) as two:
        assert one != two
        one.write_bytes(b"one")
        two.write_bytes(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"one"  # The outer block ends last.
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_damaged_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_json(tmp_path / "a.json")


def test_the_fingerprint_of_files_reads_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes(b"x")
    files = sorted(tmp_path.iterdir())
    before = fingerprint_of_files(files)
    (tmp_path / "1.jpg").write_bytes(b"y")
    assert fingerprint_of_files(files).content != before.content
