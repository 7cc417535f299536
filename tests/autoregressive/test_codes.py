import numpy as np
import pytest
import torch
from helpers.codes import write_codes

from autoregressive.data.codes import CodeDataset, drop_condition
from autoregressive.data.config import DataConfig
from core.config import InputError


def test_everything_about_the_codes_comes_from_their_index(tmp_path):
    data = CodeDataset(DataConfig((write_codes(tmp_path / "codes", grid=(2, 6)),)))
    assert (data.vocab_size, data.num_classes, data.grid, len(data)) == (32, 4, (2, 6), 40)
    codes, condition = data.batch(np.array([39, 0]), np.array([0, 1]), seed=0)
    assert codes.shape == (2, 12)
    assert codes.dtype == torch.int64
    assert condition.labels.tolist() == [3, 0]


def test_the_crop_depends_on_seed_and_position_alone(tmp_path):
    data = CodeDataset(DataConfig((write_codes(tmp_path / "codes", crops=10),)))
    rows, positions = np.arange(40), np.arange(100, 140)
    whole = data.batch(rows, positions, seed=3)[0]
    assert torch.equal(whole[7:9], data.batch(rows[7:9], positions[7:9], seed=3)[0])
    assert not torch.equal(whole, data.batch(rows, positions, seed=4)[0])


def test_two_folders_are_mixed_half_and_half(tmp_path):
    folders = tuple(write_codes(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    data = CodeDataset(DataConfig(folders))
    rows, positions = np.zeros(4000, np.int64), np.arange(4000)
    codes = data.batch(rows, positions, seed=0)[0].numpy()
    first = [(codes[:, None] == source[np.array([0])]).all(-1).any(1) for source in data.sources]
    assert (first[0] | first[1]).all()
    assert 0.45 < first[0].mean() < 0.55


def test_the_reference_layout_is_read(tmp_path):
    for name in ("codes", "labels"):
        (tmp_path / name).mkdir()
    random = np.random.default_rng(0)
    stored = random.integers(0, 100, (5, 1, 10, 16))
    for i in range(5):
        np.save(tmp_path / "codes" / f"{i}.npy", stored[i])
        np.save(tmp_path / "labels" / f"{i}.npy", np.array([i * 3]))
    config = DataConfig((tmp_path / "codes",), (tmp_path / "labels",), vocab_size=100)
    data = CodeDataset(config)
    assert (data.grid, data.num_classes, len(data)) == ((4, 4), 1000, 5)
    codes, condition = data.batch(np.array([2, 4]), np.array([0, 1]), seed=0)
    assert condition.labels.tolist() == [6, 12]
    assert (codes[0].numpy() == stored[2, 0]).all(-1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 64}, "vocab_size"),
        ({"grid": (2, 8)}, "grid"),
        ({"tokenizer_sha256": "1" * 64}, "tokenizer_sha256"),
        ({"count": 30}, "different"),
    ],
)
def test_folders_that_do_not_belong_together_are_refused(tmp_path, change, message):
    folders = write_codes(tmp_path / "a"), write_codes(tmp_path / "b", **change)
    with pytest.raises(InputError, match=message):
        CodeDataset(DataConfig(folders))


def test_codes_outside_the_vocabulary_are_refused(tmp_path):
    data = CodeDataset(DataConfig((write_codes(tmp_path / "codes", vocab_size=32),)))
    data.vocab_size = 8
    with pytest.raises(InputError, match="vocabulary"):
        data.batch(np.arange(40), np.arange(40), seed=0)


def test_an_unfinished_folder_is_refused(tmp_path):
    folder = write_codes(tmp_path / "codes")
    (folder / "index.json").unlink()
    with pytest.raises(InputError, match="run the command that was writing it again"):
        CodeDataset(DataConfig((folder,)))


def test_conditions_are_dropped_at_the_asked_rate():
    dropped = drop_condition(np.arange(20_000), 0.1, seed=0)
    assert 0.09 < dropped.float().mean() < 0.11
    assert torch.equal(dropped[500:600], drop_condition(np.arange(500, 600), 0.1, seed=0))
