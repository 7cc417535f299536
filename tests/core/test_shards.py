import json
import os

import numpy as np
import pytest

from core.config import InputError
from core.data.shards import ShardReader, ShardWriter, write_array
from core.files import file_sha256, read_json


def write_shards(folder, world, stop_after=99, **settings):
    writer = ShardWriter(folder, 10, 4, settings, world)
    written = writer.begin()[:stop_after]
    for shard in written:
        items = list(writer.items(shard))
        writer.write(shard, {"x": np.array(items)[:, None] * 2})
    return writer, written


def test_a_killed_writer_continues_with_what_is_missing(tmp_path, world):
    assert write_shards(tmp_path, world, stop_after=1)[1] == [0]
    writer, written = write_shards(tmp_path, world)
    assert written == [1, 2]
    writer.finish({"more": 1})
    assert read_json(tmp_path / "index.json")["rows"] == [4, 4, 2]
    reader = ShardReader(tmp_path, "x")
    assert len(reader) == 10
    assert reader[np.array([9, 0, 5])].tolist() == [[18], [0], [10]]


def test_a_folder_begun_with_other_settings_is_refused(tmp_path, world):
    write_shards(tmp_path, world, vocabulary=5)
    with pytest.raises(InputError, match="other settings \\(vocabulary\\)"):
        write_shards(tmp_path, world, vocabulary=6)


def test_a_damaged_shard_is_named(tmp_path, world):
    write_shards(tmp_path, world)[0].finish({})
    (tmp_path / "x_00001.npy").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"x_00001\.npy"):
        ShardReader(tmp_path, "x")


def damage_array(path, kind):
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "flip":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    else:
        path.write_bytes(b"" if kind == "empty" else data[:-3])


@pytest.mark.parametrize("kind", ["delete", "empty", "truncate", "flip"])
def test_a_damaged_shard_with_a_marker_is_made_again_with_one_warning(
    tmp_path, world, caplog, kind
):
    write_shards(tmp_path, world)[0].finish({})
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damage_array(tmp_path / "x_00001.npy", kind)
    writer, written = write_shards(tmp_path, world)
    assert written == [1]
    assert writer.finished() == [0, 2]
    writer.finish({})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert caplog.text.count("damaged shard") == 1
    assert "x_00001.npy" in caplog.text


@pytest.mark.parametrize("kind", ["delete", "empty", "truncate"])
def test_a_shard_of_an_older_version_is_accepted_if_its_arrays_are_whole(
    tmp_path, world, caplog, kind
):
    write_shards(tmp_path, world)
    for marker in tmp_path.glob("shard_*.json"):
        facts = json.loads(marker.read_text())
        del facts["files"]
        marker.write_text(json.dumps(facts))
    assert write_shards(tmp_path, world, stop_after=0)[0].finished() == [0, 1, 2]
    damage_array(tmp_path / "x_00002.npy", kind)
    assert write_shards(tmp_path, world)[1] == [2]
    assert caplog.text.count("damaged shard") == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": 3}', b"\xff", b'{"files": {"x": 1}}'])
def test_a_shard_with_a_damaged_marker_is_made_again(tmp_path, world, content):
    write_shards(tmp_path, world)
    (tmp_path / "shard_00000.json").write_bytes(content)
    assert write_shards(tmp_path, world)[1] == [0]


def test_an_index_is_not_written_over_a_shard_that_lost_data(tmp_path, world):
    writer, _ = write_shards(tmp_path, world)
    damage_array(tmp_path / "x_00001.npy", "truncate")
    with pytest.raises(InputError, match=r"x_00001\.npy is truncated; run the same command again"):
        writer.finish({})
    assert not (tmp_path / "index.json").exists()


def test_a_file_system_that_takes_a_part_of_an_array_is_noticed(tmp_path, monkeypatch):
    stat = os.stat_result([0] * 6 + [100] + [0] * 3)
    monkeypatch.setattr(os, "fstat", lambda _: stat)
    with pytest.raises(OSError, match=r"x\.npy: only 100 of 208 bytes .* is the disk full"):
        write_array(tmp_path / "x.npy", np.arange(10))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.zeros((0, 3), np.uint16), np.arange(6).reshape(2, 3).T])
def test_an_array_is_written_as_numpy_reads_it(tmp_path, array):
    size, sha256 = write_array(tmp_path / "x.npy", array)
    found = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype
    assert (size, sha256) == ((tmp_path / "x.npy").stat().st_size, file_sha256(tmp_path / "x.npy"))


def test_settings_of_an_older_version_continue(tmp_path, world):
    ShardWriter(tmp_path, 10, 4, {"tokenizer": "file"}, world).begin()
    earlier = {"tokenizer": ["file"], "images": [None]}
    now = {"tokenizer": "weights", "images": "abc"}
    ShardWriter(tmp_path, 10, 4, now, world, earlier).begin()
    assert read_json(tmp_path / "settings.json")["tokenizer"] == "weights"
    with pytest.raises(InputError, match=r"other settings \(images\)"):
        ShardWriter(tmp_path, 10, 4, {**now, "images": "new"}, world, earlier).begin()
