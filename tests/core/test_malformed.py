"""Inputs that once ended in a traceback, in a wrong result, or in the memory of the machine."""

import dataclasses
import io
import json
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.codes import write_codes, write_features
from helpers.config import Inner
from helpers.images import jpeg, write_tar
from helpers.models import tiny, write_models
from tqdm import tqdm

from autoregressive.data.codes import CodeDataset
from autoregressive.data.config import DataConfig
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.config import GPTConfig
from autoregressive.models.pretrained import load_gpt
from autoregressive.sample import SampleConfig
from autoregressive.sampling.conditions import ConditionConfig, read_prompts
from core.config import InputError, load_config, parse_config, run_command, save_config
from core.data.arrays import load_array, read_npz_array
from core.data.image_list import find_images
from core.data.image_text import CaptionError, ImageTextConfig, ImageTextPairs
from core.data.images import ImageError, check_image_size, load_image
from core.distributed.world import choose_device, distributed
from core.files import read_json, read_record
from core.weights import load_tensors
from evaluations.image_source import open_image_source
from language.captions import clean_caption
from language.features import FeatureDataset
from tokenizer import VQConfig
from tokenizer.encode import EncodeConfig, encode
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.quantizers.binary_spherical import BinarySphericalOptions

SAMPLE = ("--gpt", "x", "--tokenizer", "x", "--out", "x")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "[.nan]"])
def test_a_number_that_is_not_finite_is_refused_in_every_field(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"lr: {value}\n")
    with pytest.raises(InputError, match="lr"):
        load_config(Inner, path)
    with pytest.raises(InputError, match=r"sampling\.temperature"):
        parse_config(SampleConfig, [*SAMPLE, f"--sampling.temperature={value}"])


@pytest.mark.parametrize(
    ("flag", "advice"), [("--ou", "--out"), ("--sampling.temprature", "--sampling.temperature")]
)
def test_a_flag_is_never_abbreviated_and_the_nearest_name_is_suggested(flag, advice):
    with pytest.raises(InputError, match=f"did you mean {advice}"):
        parse_config(SampleConfig, [*SAMPLE[:4], "--out", "x", flag, "1"])


def test_yaml_that_multiplies_or_contains_itself_is_refused_at_once(tmp_path):
    bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    texts = (bomb, "lr: &a [*a]\n", "[" * 5000, "config: config.yaml\n", 'kind: "a\\0"\n', "lr: \0")
    for text in texts:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        begun = time.process_time()
        with pytest.raises(InputError, match=r"config\.yaml|kind"):
            load_config(Inner, path)
        assert time.process_time() - begun < 5


def test_a_pipe_or_device_is_refused_instead_of_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (read_json, load_array, find_images, load_tensors):
            with pytest.raises(InputError, match=r"pipe or device|no such|damaged"):
                read(path)
        with pytest.raises(InputError, match="pipe or device"):
            load_config(Inner, path)
        with pytest.raises(ImageError, match="not a file"):
            load_image(path)


def test_numbers_beyond_reason_are_refused():
    for flags in (["--sampling.seed", "-1"], ["--num_images", "1" * 30], ["--out", "a\0b"]):
        with pytest.raises(InputError, match=r"seed|num_images|out"):
            parse_config(SampleConfig, [*SAMPLE, *flags])
    with pytest.raises(ValueError, match="seed"):
        SamplingConfig(seed=-1)
    with pytest.raises(InputError, match="image_size"):
        check_image_size(65_536, 65_536)
    common = ["--tokenizer", "x", "--data", "x", "--out", "x"]
    for flag in ("--num_workers=-1", "--num_workers=100000", "--image_size=[65536,65536]"):
        with pytest.raises(InputError, match=r"num_workers|image_size"):
            parse_config(EncodeConfig, [*common, flag])


def test_null_is_refused_where_a_value_is_needed(tmp_path):
    (tmp_path / "config.yaml").write_text("lr: null\n")
    with pytest.raises(InputError, match="lr is null"):
        load_config(Inner, tmp_path / "config.yaml")


@pytest.mark.parametrize("name", ["cuda", "mps", "tpu"])
def test_a_device_that_is_not_there_gets_one_line(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=f"device {name}"):
        choose_device(name)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_an_array_that_is_damaged_or_claims_more_than_its_file_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    whole, header = npy(np.arange(9)), io.BytesIO()
    shape = {"descr": "<i8", "fortran_order": False, "shape": (1 << 47,)}
    np.lib.format.write_array_header_1_0(header, shape)
    flipped = whole[:20] + b"\xff" + whole[21:]
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    for content in (b"", whole[:40], whole[:-1], flipped, header.getvalue(), objects.getvalue()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy"):
            load_array(path)
    path.write_bytes(whole)
    assert load_array(path, mapped=True).tolist() == list(range(9))


def test_an_npz_cannot_claim_more_than_is_expected(tmp_path):
    path, header = tmp_path / "a.npz", io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (32768, 32768)}  # 8 GB
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sigma.npy", header.getvalue())
        archive.writestr("arr_0.npy", npy(np.zeros((2, 4, 4, 3), np.uint8)))
        archive.writestr("arr_1.npy", header.getvalue())
    with pytest.raises(InputError, match="sigma"):
        read_npz_array(path, "sigma", (4, 4), "f")
    assert open_image_source(path, (4, 4)).labels is None
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("mu.npy", b"no array")
    with pytest.raises(InputError, match="mu"):
        read_npz_array(path, "mu", (4,), "f")


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a": ' + "1" * 5000 + "}", "[]", '{"a": -1}', ""])
def test_json_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        read_record(tmp_path / "r.json", {"a": int})


@pytest.mark.parametrize("key", ["rows", "vocab_size", "grid", "classes", "tokenizer_sha256"])
@pytest.mark.parametrize("value", [None, "x", [[]], {}, -1, [None]])
def test_every_key_of_an_index_is_checked(tmp_path, key, value):
    folder = write_codes(tmp_path / "codes", count=4)
    index = json.loads((folder / "index.json").read_text())
    if key == "tokenizer_sha256" and value == "x":
        value = 7
    (folder / "index.json").write_text(json.dumps({**index, key: value}))
    with pytest.raises(InputError, match=key):
        CodeDataset(DataConfig(codes=(folder,)))
    del index[key]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=key):
        CodeDataset(DataConfig(codes=(folder,)))


def test_labels_and_features_outside_their_range_are_refused(tmp_path):
    folder = write_codes(tmp_path / "codes", count=4)
    np.save(folder / "labels_00000.npy", np.array([0, 1, 2, 4]))
    with pytest.raises(InputError, match="label 4 of image 3"):
        CodeDataset(DataConfig(codes=(folder,)))
    features = write_features(tmp_path / "features", count=4)
    for wrong in (np.full((4, 1), 99), np.full((4, 1), -1), np.full(4, 2), np.full((4, 1), 0.5)):
        np.save(features / "lengths_00000.npy", wrong)
        with pytest.raises(InputError, match="features"):
            FeatureDataset(features)


def test_a_codebook_of_one_dimension_is_refused(tmp_path):
    path = tmp_path / "vq.pt"
    torch.save({"model": {"quantize.embedding.weight": torch.zeros(4)}}, path)
    with pytest.raises(InputError, match=r"vq\.pt"):
        load_tokenizer(path)


def test_class_numbers_of_a_list_are_numbers_and_bounded(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\t01\na.jpg\t0\n")
    found = find_images(path)
    assert found.labels.tolist() == [1, 0]
    assert found.classes == ("0", "1")
    for name in ("200000000", "1" * 5000):
        path.write_text(f"a.jpg\t{name}\n")
        with pytest.raises(InputError, match="below 1,000,000"):
            find_images(path)


def test_a_bad_line_of_jsonl_skips_its_pair_by_name(tmp_path):
    good = json.dumps({"image_path": "a.jpg", "text": "a cat"})
    bad = ["{", "[" * 60_000, '{"text": ' + "1" * 5000 + "}", "\\xff", "7"]
    (tmp_path / "a.jpg").write_bytes(jpeg())
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "l.jsonl").write_text("\n".join([*bad, good.replace("a.jpg", "../a.jpg")]))
    options = ImageTextConfig(tmp_path / "x", captions={"long": "text"})
    pairs = ImageTextPairs(options)
    for i in range(len(bad)):
        with pytest.raises(CaptionError):
            pairs.captions(i)
        with pytest.raises(ImageError, match=f"l/{i:09d}"):
            pairs.load(i)
    assert pairs.captions(len(bad)) == ["a cat"]
    assert pairs.load(len(bad)).size == (40, 40)


def test_a_tar_whose_sizes_are_not_its_own_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    write_tar(path, {"0.jpg": jpeg(), "0.txt": b"a cat"})
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + b"\x7f" * 11  # the size field in base 256
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"0\.tar"):
        ImageTextPairs(ImageTextConfig(path))


def test_a_table_with_a_field_beyond_the_limit_is_named(tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt\n{'a' * 140_000}\n")
    with pytest.raises(InputError, match=r"p\.csv"):
        read_prompts(ConditionConfig(prompts=tmp_path / "p.csv"))


def test_postscript_named_jpg_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("started gs"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(ImageError, match="not an image"):
        load_image(path)


def test_the_time_of_cleaning_a_caption_is_bounded():
    for text in ("a." * 50_000, " " * 50_000, "1" * 99_999 + "_", "x" * 99_999 + ".", "<" * 99_999):
        begun = time.process_time()
        clean_caption(f"a {text}")
        assert time.process_time() - begun < 2


def test_an_image_whose_name_is_not_utf8_is_encoded_and_a_bad_one_listed(tmp_path, world):
    (tmp_path / "images").mkdir()
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "images" / name).write_bytes(jpeg())
    (tmp_path / "images" / f"x{name}").write_bytes(b"no")
    vq = save_vq(tmp_path)
    encode(encode_config(tmp_path, vq), world)
    assert json.loads((tmp_path / "codes" / "index.json").read_text())["count"] == 1
    assert b"xcaf\xe9.jpg" in (tmp_path / "codes" / "skipped.txt").read_bytes()


def test_an_encode_with_nothing_to_encode_is_an_error(tmp_path, world):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match="no image can be read"):
        encode(encode_config(tmp_path, save_vq(tmp_path)), world)
    assert not (tmp_path / "codes" / "index.json").exists()


def save_vq(folder: Path) -> Path:
    return write_models(folder, tiny())[1]


def encode_config(folder: Path, vq: Path) -> EncodeConfig:
    small = {"image_size": (8, 8), "num_workers": 0, "device": "cpu"}
    return EncodeConfig(str(vq), folder / "codes", folder / "images", **small)


def test_a_mistake_never_shares_a_line_with_a_progress_bar(monkeypatch, capsys):
    def leave(code: int) -> None:
        raise SystemExit(code)

    def main() -> None:
        bar = tqdm(range(9), mininterval=0)  # kept open, as in a thread
        bar.update(3)
        raise InputError("wrong")

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):
        run_command(main)
    last = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.endswith(": wrong") and "it/s" not in line for line in last), last


def test_a_message_about_a_configuration_names_the_file_or_the_flag(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text('out: "\\ud800"\n')  # half of a character: jsonargparse's loader alone refuses
    with pytest.raises(InputError, match=r"half\.yaml: not YAML"):
        parse_config(SampleConfig, ["--config", str(path)])
    with pytest.raises(InputError, match=r"--metrics"):
        parse_config(SampleConfig, [*SAMPLE, f"--metrics={'1' * 5000}"])


def test_a_name_of_60000_characters_is_cut_in_every_message(tmp_path, world):
    path = tmp_path / "list.txt"
    path.write_text("[" * 60_000 + "\n")
    vq = write_models(tmp_path, tiny())[1]
    config = EncodeConfig(
        str(vq), tmp_path / "out", path, image_size=(8, 8), num_workers=0, device="cpu"
    )
    with pytest.raises(InputError, match="no image can be read") as error:
        encode(config, world)
    assert len(str(error.value)) < 1000
    assert "list.txt" in str(error.value)
    assert len(str(InputError("many words " * 1000))) < 1500
    assert str(InputError("x: as it was")) == "x: as it was"


@pytest.mark.parametrize("size", [1 << 50, 1 << 62])
def test_a_memory_that_is_too_small_is_one_line(size):
    with pytest.raises(InputError, match="the memory is too small: ") as error, distributed("cpu"):
        torch.empty(size)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="another"), distributed("cpu"):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 10**12}, {"codebook_dim": 10**12}, {"z_channels": 10**9}]
)
def test_a_configuration_of_sizes_that_its_weights_do_not_have_takes_no_memory(tmp_path, changes):
    folder = write_models(tmp_path, tiny())[1]
    config = load_config(VQConfig, folder / "config.yaml")
    save_config(dataclasses.replace(config, **changes), folder / "config.yaml")
    with pytest.raises(InputError, match=r"model\.safetensors: weights of another architecture"):
        load_tokenizer(folder)


def test_a_grid_that_cannot_be_is_one_line_for_folders_and_released_files(tmp_path):
    folder = write_models(tmp_path, tiny())[0]
    torch.save({"model": tiny(dim=64, num_heads=1).state_dict()}, tmp_path / "gpt.pt")
    for source in (folder, tmp_path / "gpt.pt"):
        with pytest.raises(InputError, match=f"{source}: model: vocab_size and grid must be >= 1"):
            load_gpt(source, grid=(-1, -1))


def test_models_that_would_take_minutes_to_build_are_refused():
    with pytest.raises(ValueError, match="num_layers"):
        GPTConfig(num_layers=10**9)
    with pytest.raises(ValueError, match=r"group_size must be in 1 \.\. 20"):
        BinarySphericalOptions(group_size=28)
    for changes in ({"num_res_blocks": 10**9}, {"channel_multipliers": (1,) * 70}):
        with pytest.raises(ValueError, match="at most 16 channel_multipliers and 100"):
            VQConfig(**changes)


def test_python_calls_refuse_what_would_give_a_wrong_image(tmp_path):
    for name in ("cfg_scale", "temperature", "top_p", "cfg_power", "guidance"):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name} is {value}"):
                SamplingConfig(**{name: value})
    with pytest.raises(ValueError, match="seed is 9223372036854775808"):
        SamplingConfig(seed=2**63)
    vq = load_tokenizer(write_models(tmp_path, tiny())[1]).vq
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    for wrong, message in (
        (codes - 1, r"codes -1 \.\. -1: the codebook has 50 entries"),
        (codes + 50, r"codes 50 \.\. 50"),
        (codes[0], r"codes \(4, 4\) torch.int64: expected"),
        (codes.float(), "float32: expected"),
    ):
        with pytest.raises(InputError, match=message):
            vq.decode(wrong)
    codes, label = codes.flatten(1), torch.tensor([1])
    for wrong, message in (
        (torch.zeros(1, 17, dtype=torch.int64), "N at most 16"),
        (codes.float(), "float32: expected"),
        (codes[0], r"codes \(16,\)"),
        (codes.repeat(2, 1), "1 conditions for codes of 2 images"),
    ):
        with pytest.raises(InputError, match=message):
            tiny()(wrong, label)
