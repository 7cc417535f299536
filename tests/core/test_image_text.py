import json

import pytest
from helpers.images import jpeg, write_tar
from PIL import Image

from core.config import InputError
from core.data.image_text import CaptionError, ImageTextConfig, ImageTextPairs
from core.data.images import ImageError
from core.data.open import open_images


@pytest.fixture
def shard(tmp_path):
    """A good pair, then one of each kind that is not."""
    members = {"000.jpg": jpeg(), "000.txt": b"a good one", "000.json": b'{"aesthetic": 6.5}'}
    members |= {"001.jpg": jpeg()[:400], "001.txt": b"a truncated image"}
    members |= {"002.jpg": jpeg()}
    members |= {"003.jpg": jpeg(), "003.txt": b"caf\xe9"}
    members |= {"004.jpg": jpeg(), "004.txt": b"  "}
    members |= {"005.jpg": jpeg(side=1), "005.txt": b"one pixel"}
    write_tar(tmp_path / "00000.tar", members)
    return tmp_path


def reason(call, index: int) -> str:
    try:
        call(index)
    except ImageError as error:
        return error.reason
    except CaptionError as error:
        return str(error)
    return ""


def test_each_bad_pair_of_a_tar_has_its_reason(shard):
    pairs = ImageTextPairs(ImageTextConfig(shard))
    assert len(pairs) == 6
    assert [reason(pairs.captions, i) for i in range(6)] == [
        *("", "", "no caption", "caption is not UTF-8", "empty caption", "")
    ]
    assert [reason(pairs.load, i) for i in range(6)] == [
        *("", "damaged image", "", "", "", "smaller than 16 pixels")
    ]
    assert pairs.captions(0) == ["a good one"]
    assert pairs.name(1) == "00000.tar/001"


def test_the_places_in_a_tar_are_kept_and_listed_again_when_it_changes(shard):
    first = ImageTextPairs(ImageTextConfig(shard))
    assert (shard / ".pairs" / "00000.tar.npz").is_file()
    assert ImageTextPairs(ImageTextConfig(shard)).fingerprint == first.fingerprint
    write_tar(shard / "00000.tar", {"9.jpg": jpeg(), "9.txt": b"new"})
    again = ImageTextPairs(ImageTextConfig(shard))
    assert again.source.keys == ["00000.tar/9"]
    assert again.fingerprint != first.fingerprint
    (shard / ".pairs" / "00000.tar.npz").write_bytes(b"half")
    assert len(ImageTextPairs(ImageTextConfig(shard))) == 1


def test_pairs_are_filtered_by_score_and_aspect(shard):
    config = ImageTextConfig(shard, score_field="aesthetic", min_score=5.0)
    pairs = ImageTextPairs(config)
    assert [reason(pairs.load, i) for i in (0, 2)] == ["", "no aesthetic"]
    low = ImageTextPairs(ImageTextConfig(shard, score_field="aesthetic", min_score=7.0))
    assert reason(low.captions, 0) == "aesthetic below 7.0"
    Image.new("RGB", (100, 20)).save(shard / "wide.png")
    (shard / "00000.tar").unlink()
    assert reason(ImageTextPairs(ImageTextConfig(shard, max_aspect=3)).load, 0) == "aspect beyond 3"


def test_the_references_lists_are_read_line_by_line(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(jpeg())
    lines = [
        {"image_path": "images/a.jpg", "text": ["short", "a long one"]},
        {"image_path": "images/gone.jpg", "text": ["short"]},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\nno json\n"
    (tmp_path / "part.jsonl").write_text(text)
    pairs = ImageTextPairs(
        ImageTextConfig(tmp_path, captions={"long": "text.1", "short": "text.0"})
    )
    assert pairs.captions(0) == ["a long one", "short"]
    assert pairs.load(0).size == (40, 40)
    assert [reason(pairs.captions, i) for i in (1, 2)] == ["no caption", "damaged json"]
    assert [reason(pairs.load, i) for i in (1, 2)] == ["no such file", "damaged json"]
    assert pairs.name(1) == "part/000000001"


def test_what_holds_no_pairs_is_one_line(tmp_path):
    with pytest.raises(InputError, match="contains no images"):
        ImageTextPairs(ImageTextConfig(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        ImageTextPairs(ImageTextConfig(tmp_path / "nowhere"))
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="not an uncompressed tar"):
        ImageTextPairs(ImageTextConfig(tmp_path))


def test_one_door_opens_class_folders_lists_tars_and_jsonl_folders(tmp_path, shard):
    folder = tmp_path / "classes"
    for name in ("b/1.jpg", "a/0.jpg"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(jpeg())
    (tmp_path / "list.txt").write_text("classes/a/0.jpg\n")
    (tmp_path / "lines").mkdir()
    line = json.dumps({"image_path": "../classes/a/0.jpg", "text": ["x"]})
    (tmp_path / "lines" / "part.jsonl").write_text(f"{line}\n")
    lengths = {folder: 2, tmp_path / "list.txt": 1, tmp_path / "lines": 1, shard: 6}
    for source, length in lengths.items():
        images = open_images(source)
        assert len(images) == len(images.labels) == length
        assert images.load(0).size == (40, 40)
    assert open_images(folder).classes == ("a", "b")
    assert open_images(shard).labels.tolist() == [-1] * 6


def test_a_flat_folder_has_one_fingerprint_with_and_without_captions(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "0.txt").write_text("a caption")
    pairs = ImageTextPairs(ImageTextConfig(tmp_path))
    assert open_images(tmp_path).fingerprint == pairs.fingerprint
    (tmp_path / "1.jpg").write_bytes(jpeg())
    assert open_images(tmp_path).fingerprint != pairs.fingerprint


def test_an_option_that_would_not_be_used_is_refused(tmp_path, shard):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.jpg").write_bytes(jpeg())
    with pytest.raises(InputError, match="apply to tars"):
        open_images(tmp_path / "flat", ImageTextConfig(min_side=64))
    with pytest.raises(InputError, match="not both"):
        open_images(shard, ImageTextConfig(source=shard))
