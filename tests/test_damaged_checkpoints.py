"""Inference and resuming read checkpoints that were damaged after they were written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import tiny, write_models
from safetensors.torch import save_file

from autoregressive.convert import ConvertConfig as ConvertGPT
from autoregressive.convert import convert as convert_gpt
from autoregressive.models.config import GPTConfig
from autoregressive.models.pretrained import load_gpt
from autoregressive.sampling.pipeline import ImagePipeline
from autoregressive.training.validation import check_resumable
from core.checksums import checkpoint_folders, find_damage, read_checksums
from core.config import InputError
from core.distributed.world import World
from core.training.checkpoint import Checkpointer
from core.weights import check_finite
from tokenizer import VQConfig
from tokenizer.convert import ConvertConfig as ConvertTokenizer
from tokenizer.convert import convert as convert_tokenizer
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel

SMALL = {"base_channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1, "z_channels": 4}
DAMAGES = ("flip", "truncate", "delete", "swap")


def small_tokenizer(seed: int) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(VQConfig(**SMALL, vocab_size=8, codebook_dim=4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4, each with averaged weights."""
    run = tmp_path_factory.mktemp("whole") / "run"
    vq, ema = small_tokenizer(0), small_tokenizer(1)
    world = World(0, 1, torch.device("cpu"))
    keeper = Checkpointer(run / "checkpoints", vq.config, world, 3, model=vq, ema=ema)
    for step in (2, 4):
        with torch.no_grad():
            ema.quantize.embedding.weight.fill_(step / 8)
        keeper.save(step)
        keeper.wait()
    return run


@pytest.fixture
def run(tmp_path, whole) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def damage_file(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    # Of checksums.json, what inference reads: the line of the averaged weights.
    place = data.find(b"ema.") if path.suffix == ".json" else len(data) // 2
    data[place] ^= 1
    if kind == "delete":
        path.unlink()
    elif kind == "swap":  # with the other weights of the checkpoint, which fit
        path.write_bytes(path.with_name("model.safetensors").read_bytes())
    else:
        path.write_bytes(data if kind == "flip" else data[:-3])


def step_of(vq: VQModel) -> float:
    return 8 * float(vq.quantize.embedding.weight.detach()[0, 0])


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["ema.safetensors", "config.yaml", "checksums.json"])
def test_inference_takes_the_checkpoint_before_a_damaged_one(run, caplog, kind, file):
    assert step_of(load_tokenizer(run).vq) == 4
    damage_file(run / "checkpoints" / "step_0000004" / file, kind)
    assert step_of(load_tokenizer(run).vq) == 2
    assert caplog.text.count("is damaged") == 1
    assert "step_0000004 is damaged" in caplog.text


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("file", ["ema.safetensors", "config.yaml", "checksums.json"])
def test_a_single_damaged_checkpoint_folder_is_refused_in_one_line(run, kind, file):
    folder = run / "checkpoints" / "step_0000004"
    damage_file(folder / file, kind)
    with pytest.raises(InputError, match=f"step_0000004: damaged.*{file}") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run):
    for folder in checkpoint_folders(run / "checkpoints").values():
        damage_file(folder / "ema.safetensors", "delete")
    with pytest.raises(InputError, match="none of its 2 checkpoints is intact"):
        load_tokenizer(run)


def test_the_verification_can_be_skipped(run):
    folder = run / "checkpoints" / "step_0000004"
    damage_file(folder / "ema.safetensors", "flip")
    damage_file(folder / "checksums.json", "flip")
    load_tokenizer(folder, verify_weights=False)
    with pytest.raises(InputError, match="damaged"):
        load_tokenizer(folder)


def test_the_identity_of_a_verified_file_is_its_recorded_sha256(run):
    verified = load_tokenizer(run)
    shutil.rmtree(run / "checkpoints" / "step_0000004" / "training")
    (run / "checkpoints" / "step_0000004" / "checksums.json").unlink()
    assert load_tokenizer(run / "checkpoints" / "step_0000004").sha256 == verified.sha256


@pytest.mark.parametrize("file", ["config.yaml", "model.safetensors"])
@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
def test_a_run_resumes_although_its_newest_checkpoint_is_damaged(tmp_path, world, file, kind):
    gpt = tiny(vocab_size=50)
    keeper = Checkpointer(tmp_path / "checkpoints", gpt.config, world, 3, model=gpt)
    for step in (1, 2):
        keeper.save(step)
        keeper.wait()
    damage_file(tmp_path / "checkpoints" / "step_0000002" / file, kind)
    assert check_resumable(tmp_path, gpt.config)
    assert keeper.restore_latest()["step"] == 1
    assert load_gpt(tmp_path).gpt.config == gpt.config


def test_a_run_without_an_intact_checkpoint_does_not_begin_again(tmp_path, world):
    gpt = tiny(vocab_size=50)
    keeper = Checkpointer(tmp_path / "checkpoints", gpt.config, world, 3, model=gpt)
    keeper.save(1)
    keeper.wait()
    (tmp_path / "checkpoints" / "step_0000001" / "checksums.json").unlink()
    assert check_resumable(tmp_path, gpt.config)
    with pytest.raises(InputError, match="no checkpoint is intact"):
        keeper.restore_latest()
    assert not check_resumable(tmp_path / "new", GPTConfig())


def test_weights_that_are_not_finite_are_refused_with_the_name_of_the_tensor(tmp_path):
    gpt_folder, vq_folder = write_models(tmp_path, tiny(vocab_size=50))
    state = tiny(vocab_size=50).state_dict()
    state["layers.0.attention.wo.weight"][3, 2] = float("nan")
    save_file(state, gpt_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.attention\.wo\.weight has values that are"):
        ImagePipeline.from_pretrained(str(gpt_folder), str(vq_folder))
    check_finite({"codes": torch.zeros(2, dtype=torch.int64), "none": torch.empty(0)}, "here")


def as_an_older_version_wrote(folder: Path) -> None:
    """Replace checksums.json by one sha256 for each file."""
    files = read_checksums(folder).files
    flat = {name: sums.sha256 for name, sums in files.items()}
    (folder / "checksums.json").write_text(json.dumps(flat, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("file", ["ema.safetensors", "config.yaml", "checksums.json"])
def test_a_checkpoint_of_an_older_version_is_verified_by_its_sha256(run, file):
    folder = run / "checkpoints" / "step_0000004"
    before = load_tokenizer(folder).sha256
    as_an_older_version_wrote(folder)
    assert load_tokenizer(folder).sha256 == before
    assert find_damage(folder) == ""
    damage_file(folder / file, "flip")
    with pytest.raises(InputError, match=f"step_0000004: damaged.*{file}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.yaml"])
def test_converted_folders_are_verified_and_older_ones_without_checksums_load(
    tmp_path, capsys, kind, file
):
    gpt, vq = write_models(tmp_path, tiny(vocab_size=50))
    convert_gpt(ConvertGPT(source=str(gpt), out=tmp_path / "g"))
    convert_tokenizer(ConvertTokenizer(source=str(vq), out=tmp_path / "t"))
    capsys.readouterr()
    for folder, load in ((tmp_path / "g", load_gpt), (tmp_path / "t", load_tokenizer)):
        load(folder)
        older = Path(shutil.copytree(folder, tmp_path / f"older_{folder.name}"))
        (older / "checksums.json").unlink()
        load(older)
        damage_file(folder / file, kind)
        with pytest.raises(InputError, match=f"{folder.name}: damaged.*{file}"):
            load(folder)


@pytest.mark.parametrize("stored", ["[]", "3", '{"files": 3}', '{"files": {"a": {"x": 1}}}', "{"])
def test_a_list_of_checksums_of_another_form_is_refused(tmp_path, stored):
    (tmp_path / "checksums.json").write_text(stored)
    with pytest.raises(InputError, match=r"checksums\.json"):
        read_checksums(tmp_path)
