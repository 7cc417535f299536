"""Every file that a command reads is damaged in every way, and cheap fields get wrong values."""

import shutil
from pathlib import Path

import pytest
from helpers.command_lines import config_class
from helpers.fuzz import CHEAP_VALUES, DAMAGES, check_output, damaged, examples, refused
from hypothesis import given
from hypothesis import strategies as st

from core.config_checks import field_names

CPU = "--device cpu --num_workers 0"
COMPUTE = "--compute.device cpu --compute.precision fp32"
MODELS = f"--gpt gpt --tokenizer vq {COMPUTE}"
PROXY = "--metrics.extractor proxy --num_workers 0 --image_size [8,8] --device cpu"
TRAIN = (
    "--training.num_steps 1 --training.batch_size 4 --training.device cpu --report.save_every 1 "
    "--training.precision fp32"
)
GPT = f"{TRAIN} --model.num_layers 1 --model.num_heads 2 --model.dim 16"
VQ = (
    f"{TRAIN} --num_workers 0 --image_size [8,8] --model.base_channels 32 "
    "--model.channel_multipliers [1,1] --model.num_res_blocks 1 --model.vocab_size 16 "
    "--loss.perceptual_weight 0 --model.z_channels 32 --discriminator.base_channels 8 "
    "--discriminator.num_layers 1"
)
ENCODE = f"--tokenizer vq --image_size [8,8] {CPU} --shard_size 2"

# name: (module, flags, the inputs that it reads). Words of the flags that name an input are paths.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "encode": ("tokenizer.encode", f"{ENCODE} --data images", ("images", "vq")),
    "encode list": ("tokenizer.encode", f"{ENCODE} --data list.txt", ("list.txt",)),
    "encode tar": ("tokenizer.encode", f"{ENCODE} --data tars", ("tars",)),
    "encode jsonl": ("tokenizer.encode", f"{ENCODE} --data jsonl", ("jsonl",)),
    "reconstruct": (
        "tokenizer.reconstruct",
        f"--tokenizer vq --data images --image_size [12,12] {CPU}",
        ("images", "vq"),
    ),
    "convert vq": ("tokenizer.convert", "--source vq", ("vq",)),
    "convert pt": ("autoregressive.convert", "--source gpt.pt --grid [4,4]", ("gpt.pt",)),
    "sample": ("autoregressive.sample", f"{MODELS} --num_images 3", ("gpt", "vq")),
    "inpaint": (
        "autoregressive.inpaint",
        f"{MODELS} --images images --keep_rows 2",
        ("images", "gpt"),
    ),
    "train": ("autoregressive.train", f"{GPT} --data.codes [codes]", ("codes",)),
    "train text": (
        "autoregressive.train",
        f"{GPT} --data.codes [codes] --data.features features",
        ("features", "codes"),
    ),
    "train tokenizer": ("tokenizer.train", f"{VQ} --data images", ("images",)),
    "captions": (
        "language.encode",
        "--t5 t5 --device cpu --pairs.source jsonl --pairs.captions {long: text.1}",
        ("jsonl", "t5"),
    ),
    "hold out": ("language.hold_out", "--pairs.source captioned --share 0.5", ("captioned",)),
    "reference": ("evaluations.reference", f"{PROXY} --images samples.npz", ("samples.npz",)),
    "score": (
        "evaluations.score",
        f"{PROXY} --samples samples.npz --metrics.reference ref.npz",
        ("samples.npz", "ref.npz", "ref.json"),
    ),
    "sweep": (
        "evaluations.sweep",
        f"{PROXY} --runs [run] --metrics.reference ref.npz",
        ("run/index.json", "run/samples.npz", "ref.npz"),
    ),
    "tune": (
        "autoregressive.tune_guidance",
        f"{MODELS} --metrics.extractor proxy --metrics.reference ref.npz --num_images 3 "
        "--scales [1.5]",
        ("ref.npz", "gpt"),
    ),
}


def command_line(case: str, site: Path, out: Path) -> tuple[str, list[str]]:
    module, flags, _ = CASES[case]
    inputs = {path.name for path in site.iterdir()}
    words = []
    for word in flags.replace("{long: ", "{long:_").split():
        bare = word.strip("[]")
        word = word.replace(bare, str(site / bare)) if bare in inputs else word
        words.append(word.replace("{long:_", "{long: "))
    return module, [*words, "--out", str(out)]


def files_of(case: str, site: Path) -> list[Path]:
    found = []
    for name in CASES[case][2]:
        path = site / name
        below = path.rglob("*") if path.is_dir() else [path]
        found += [p for p in below if p.is_file() and ".pairs" not in p.parts]
    return sorted(found)


def output(tmp_path_factory: pytest.TempPathFactory, case: str) -> Path:
    return tmp_path_factory.mktemp("out") / ("o.npz" if case == "reference" else "out")


@pytest.mark.parametrize("case", CASES)
def test_the_inputs_that_are_attacked_are_accepted_before(case, site, tmp_path_factory):
    out = output(tmp_path_factory, case)
    module, flags = command_line(case, site, out)
    assert not refused(module, *flags)
    check_output(out)


@pytest.mark.parametrize("case", CASES)
@examples(quick=4)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(case, data, site, tmp_path_factory):
    files = files_of(case, site)
    path = data.draw(st.sampled_from(files))
    kind, place = data.draw(st.sampled_from(DAMAGES)), data.draw(st.floats(0, 1, exclude_max=True))
    other = data.draw(st.sampled_from(files))
    out = output(tmp_path_factory, case)
    module, flags = command_line(case, site, out)
    try:
        with damaged(path, kind, place, other):
            message = refused(module, *flags)
        check_output(out)
        if message:
            named = (path.name, path.parent.name, path.stem, "--", "data", "metrics", str(site))
            assert any(word in message for word in named), message
    finally:
        shutil.rmtree(out.parent)


@pytest.mark.parametrize("case", CASES)
@examples(quick=4)
@given(data=st.data())
def test_a_wrong_field_that_parses_runs_or_is_refused_in_one_line(
    case, data, site, tmp_path_factory
):
    out = output(tmp_path_factory, case)
    module, flags = command_line(case, site, out)
    # Not where the outputs go or which network to download.
    kept = ("out", "t5", "extractor", "dinov2_weights", "text_encoder", "compile", "rfid", "lpips")
    kept += ("perceptual_weight", "num_steps", "list", "strategy")
    names = [name for name in field_names(config_class(module)) if name.split(".")[-1] not in kept]
    name, value = data.draw(st.sampled_from(sorted(names))), data.draw(CHEAP_VALUES)
    try:
        refused(module, *flags, f"--{name}={value}")
        check_output(out)
    finally:
        shutil.rmtree(out.parent)
