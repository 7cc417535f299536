import json

import pytest
from PIL import Image

from core.config import InputError, load_config
from core.data.config import ImageTextConfig
from core.data.image_text import ImageTextPairs
from language.hold_out import HoldOutConfig, held_out_captions, hold_out

COLOURS, THINGS = ["red", "blue", "green", "dark"], ["cat", "dog", "hat", "car", "cup", "fish"]
GRID = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]


def test_every_word_of_a_held_out_caption_is_in_a_training_caption():
    captions = [*GRID, "a unique unicorn", "Red umbrella"]
    for share in (0.1, 0.5, 0.95):
        held_out = held_out_captions(captions, share)
        trained = {word for c in captions if c not in held_out for word in c.lower().split()}
        assert held_out and all(set(c.lower().split()) <= trained for c in held_out)
        assert "a unique unicorn" not in held_out


def test_the_choice_depends_on_the_captions_and_not_on_their_order_or_number():
    held_out = held_out_captions(GRID, 0.3)
    assert held_out_captions([*reversed(GRID), *GRID], 0.3) == held_out
    assert held_out_captions([*GRID, "a new one"], 0.3) == held_out


def test_short_captions_stay_in_training():
    captions = ["cat", "cat", "red cat", "dog", "red dog", "blue dog", "blue cat"]
    assert not held_out_captions(captions, 0.99) & {"cat", "dog"}
    assert held_out_captions(captions, 0.99, min_words=1) & {"cat", "dog"}


@pytest.fixture
def folder(tmp_path):
    """An image for every caption of the grid, and one without a caption."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, caption in enumerate(GRID):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption)
    Image.new("RGB", (20, 20)).save(folder / "x.png")
    return folder


def test_both_parts_are_sources_of_pairs_and_lists_of_prompts(folder, tmp_path, capsys):
    config = HoldOutConfig(tmp_path / "out", ImageTextConfig(folder), share=0.3)
    hold_out(config)
    assert "1 images without a usable caption" in capsys.readouterr().out
    found = {}
    for name in ("train", "held_out"):
        part = tmp_path / "out" / name
        pairs = ImageTextPairs(ImageTextConfig(part, captions={"long": "text"}))
        for i in range(len(pairs)):
            found[pairs.captions(i)[0]] = name
            assert pairs.load(i).getpixel((0, 0)) == (GRID.index(pairs.captions(i)[0]), 0, 0)
        lines = (part / "pairs.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == [
            pairs.captions(i)[0] for i in range(len(pairs))
        ]
    assert set(found) == set(GRID)
    assert {c for c in GRID if found[c] == "held_out"} == held_out_captions(GRID, 0.3)
    assert load_config(HoldOutConfig, tmp_path / "out" / "config.yaml") == config


def test_nothing_to_hold_out_or_another_kind_of_source_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no caption to hold out"):
        hold_out(HoldOutConfig(tmp_path / "out", ImageTextConfig(folder), min_words=9))
    assert not (tmp_path / "out").exists()
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "0.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="folder of images with captions"):
        hold_out(HoldOutConfig(tmp_path / "out", ImageTextConfig(tmp_path / "jsonl")))
    for wrong in ({"share": 0.0}, {"share": 1.0}, {"min_words": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HoldOutConfig(tmp_path / "out", **wrong)
