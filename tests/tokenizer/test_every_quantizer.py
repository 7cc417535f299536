"""What every quantizer must do: shapes, gradients, round trips, exact resume, encoding.

A new quantizer takes part with one line in CASES.
"""

import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.clusters import run_in_processes
from helpers.models import small
from helpers.tokenizer_training import flags, train_here, write_images
from helpers.training import flags as gpt_flags
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from autoregressive.inference.sampling_config import ComputeConfig
from autoregressive.sampling.config import SampleRunConfig
from autoregressive.sampling.run import sample
from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from core.config import InputError, config_values, load_config, parse_config, save_config
from core.data.images import images_to_pixels
from core.data.shards import ShardReader
from core.distributed.world import World
from core.files import read_json
from core.weights import save_tensors
from tokenizer import VQConfig, VQModel
from tokenizer.convert import ConvertConfig, convert
from tokenizer.encode import EncodeConfig, encode
from tokenizer.models.vq_model import build_quantizer
from tokenizer.quantizers.config import BinarySphericalOptions, FiniteScalarOptions, VectorOptions

RAW = {"l2_normalize": False}
CASES = {
    "vq": {"quantizer": "vq", "entropy_weight": 0.1},
    "vq rotation": {"quantizer": "vq", "vq": VectorOptions(gradient="rotation")},
    "vq cvq": {"quantizer": "vq", "vq": VectorOptions(dead_codes="cvq")},
    "ibq": {"quantizer": "ibq", "entropy_weight": 0.05, **RAW},
    "fsq": {
        "quantizer": "fsq",
        "fsq": FiniteScalarOptions((4, 3, 3)),
        "vocab_size": 36,
        "codebook_dim": 3,
        **RAW,
    },
    "ifsq": {
        "quantizer": "fsq",
        "fsq": FiniteScalarOptions((3, 3, 5), "sigmoid"),
        "vocab_size": 45,
        "codebook_dim": 3,
        **RAW,
    },
    "lfq": {
        "quantizer": "lfq",
        "vocab_size": 32,
        "codebook_dim": 5,
        "entropy_weight": 0.1,
        **RAW,
    },
    "lfq of 18 bits": {
        "quantizer": "lfq",
        "vocab_size": 2**18,
        "codebook_dim": 18,
        **RAW,
    },
    "bsq": {
        "quantizer": "bsq",
        "bsq": BinarySphericalOptions(group_size=3),
        "vocab_size": 64,
        "codebook_dim": 6,
        "entropy_weight": 0.1,
        **RAW,
    },
    "simvq": {"quantizer": "simvq", **RAW},
    "latent": {"quantizer": "latent", "vocab_size": 36, "codebook_dim": 2, **RAW},
}


@pytest.fixture(params=CASES)
def fields(request) -> dict[str, typing.Any]:
    """The fields of VQConfig for one quantizer."""
    return CASES[request.param]


def test_every_quantizer_has_a_case():
    names = typing.get_args(typing.get_type_hints(VQConfig)["quantizer"])
    assert {fields["quantizer"] for fields in CASES.values()} == set(names)


def test_vectors_are_those_of_the_codes_and_gradients_are_finite(fields):
    torch.manual_seed(0)
    quantizer = build_quantizer(VQConfig(**{"vocab_size": 40, **fields}))
    z = torch.randn(2, quantizer.dim, 3, 5, requires_grad=True)
    codes, vectors, losses = quantizer(z)
    assert (codes.shape, codes.dtype) == ((2, 3, 5), torch.int64)
    assert 0 <= codes.min() <= codes.max() < quantizer.vocab_size
    assert (vectors.shape, vectors.dtype) == (z.shape, torch.float32)
    quantizer.eval()
    if fields.get("vq") != CASES["vq cvq"]["vq"]:  # which has just moved its entries
        torch.testing.assert_close(quantizer.lookup(codes), vectors, atol=1e-5, rtol=1e-5)
    ((vectors * torch.randn_like(vectors)).sum() + sum(losses.values())).backward()
    gradients = [z.grad, *(p.grad for p in quantizer.parameters() if p.requires_grad)]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    assert torch.equal(inside.codes, quantizer(z).codes)
    assert inside.vectors.dtype == torch.float32


def test_a_model_encodes_decodes_and_comes_back_from_its_folder(fields, tmp_path):
    vq = small(**fields)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        codes = vq.encode(images)
        torch.testing.assert_close(vq(images).images, vq.decode(codes), atol=1e-4, rtol=1e-4)
    assert codes.shape == (2, 4, 6)
    save_config(vq.config, tmp_path / "config.yaml")
    save_tensors(vq.state_dict(), tmp_path / "model.safetensors")
    assert load_config(VQConfig, tmp_path / "config.yaml") == vq.config
    loaded = VQModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), vq.decode(codes))
    half = loaded.for_inference(torch.device("cpu"), torch.bfloat16)
    assert half.decode(half.encode(images)).dtype == torch.bfloat16


def weights(run: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_0000004" / f"{part}.safetensors")


@pytest.mark.slow
def test_the_commands_train_resume_exactly_and_encode(fields, tmp_path, world):
    data = write_images(tmp_path / "data", count=6)
    model = tmp_path / "model.yaml"
    shape = {"base_channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1}
    config = VQConfig(**{**shape, "z_channels": 16, "vocab_size": 32, **fields})
    model.write_text(yaml.safe_dump({"model": config_values(config)}))
    for run, lengths in (("whole", (4,)), ("resumed", (2, 4))):
        for steps in lengths:
            more = ("--loss.adversarial_weight", 0, "--training.num_steps", steps)
            arguments = flags(data, tmp_path / run, "--training.ema_decay", 0.9, *more)
            train_here(["--config", model, *without_model(arguments)], world)
    for part in ("model", "ema"):
        whole, resumed = (weights(tmp_path / run, part) for run in ("whole", "resumed"))
        assert all(torch.equal(resumed[key], value) for key, value in whole.items()), part
    size = {"image_size": (16, 16), "num_workers": 0}
    encoding = EncodeConfig(
        data=data, tokenizer=str(tmp_path / "whole"), out=tmp_path / "codes", **size
    )
    encode(encoding, world)
    index = read_json(tmp_path / "codes" / "index.json")
    assert index["vocab_size"] == config.vocab_size
    assert index["codes_dtype"] == ("uint32" if config.vocab_size > 2**16 else "uint16")
    check_a_gpt_on_these_codes(tmp_path, world)


def check_a_gpt_on_these_codes(folder: Path, world: World) -> None:
    """It trains, and its images are sampled with the tokenizer."""
    stored = ShardReader(folder / "codes", "codes")[np.arange(6)]
    vq = VQModel.from_pretrained(folder / "whole")
    assert stored.shape == (6, 1, 64) and stored.max() < vq.quantize.vocab_size
    more = ("--training.num_steps", 2, "--training.batch_size", 2, "--model.dim", 8)
    more = (*more, "--loss_chunk", 64, "--report.sample_every", "null")
    lines = gpt_flags(folder / "codes", folder / "gpt", *more)
    train(parse_config(TrainConfig, [str(line) for line in lines]), world)
    models = {"gpt": str(folder / "gpt"), "tokenizer": str(folder / "whole")}
    compute = ComputeConfig(precision="fp32", device="cpu")
    sample(SampleRunConfig(**models, out=folder / "images", num_images=2, compute=compute), world)
    codes = ShardReader(folder / "images", "codes")[np.arange(2)]
    assert codes.dtype == stored.dtype
    images = np.load(folder / "images" / "samples.npz")["arr_0"]
    decoded = images_to_pixels(vq.decode(torch.from_numpy(codes.astype(np.int64))))
    assert (images == decoded.numpy()).mean() > 0.99


def run_rank(rank: int) -> None:
    """Two processes with half a batch each against one; entropies are of a process's own batch."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def backward(net: torch.nn.Module, batch: torch.Tensor) -> None:
        out = net(batch)
        (out.images.square().mean() + sum(out.losses.values())).backward()

    for name, fields in CASES.items():
        options = {**fields, "entropy_weight": 0.0}
        ours, whole = small(**options).train(), small(**options).train()
        own = images[2 * rank : 2 * rank + 2]
        backward(DistributedDataParallel(ours, broadcast_buffers=False), own)
        # Revival asks all processes, so that both run it; half of their vectors are the same.
        backward(whole, images)
        for (key, found), expected in zip(
            ours.named_parameters(), whole.named_parameters(), strict=True
        ):
            torch.testing.assert_close(
                found, expected[1], rtol=1e-3, atol=1e-5, msg=f"{name} {key}"
            )
            if found.requires_grad:
                torch.testing.assert_close(
                    found.grad, expected[1].grad, rtol=1e-3, atol=1e-5, msg=f"{name} {key}"
                )


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    run_in_processes(run_rank, 2, tmp_path)


def without_model(arguments: list[object]) -> list[object]:
    """Flags of a run, without those of its model."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [x for pair in pairs if not str(pair[0]).startswith("--model.") for x in pair]


def test_simvq_is_exported_with_a_plain_codebook(tmp_path):
    vq = small(**CASES["simvq"])
    for name, tensors in (("config.yaml", None), ("model.safetensors", vq.state_dict())):
        path = tmp_path / "ours" / name
        path.parent.mkdir(exist_ok=True)
        save_config(vq.config, path) if tensors is None else save_tensors(tensors, path)
    convert(ConvertConfig(source=str(tmp_path / "ours"), out=tmp_path / "plain"))
    plain = VQModel.from_pretrained(tmp_path / "plain")
    assert plain.config.quantizer == "vq"
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codes = vq.encode(images)
    assert torch.equal(plain.encode(images), codes)
    torch.testing.assert_close(plain.decode(codes), vq.decode(codes), atol=1e-5, rtol=1e-5)


def test_settings_that_make_no_sense_are_refused_by_name():
    for wrong, name in (
        ({"quantizer": "ibq"}, "l2_normalize"),
        ({"quantizer": "lfq", "vocab_size": 100, **RAW}, "vocab_size 100"),
        ({"quantizer": "bsq", "vocab_size": 256, **RAW}, "group_size 9"),
        ({"quantizer": "fsq", **RAW}, "fsq.levels"),
        ({**CASES["fsq"], "fsq": FiniteScalarOptions((4, 3, 3), "sigmoid")}, "odd"),
        ({**CASES["fsq"], "fsq": FiniteScalarOptions((2, 2, 9))}, "levels >= 3"),
        ({**CASES["fsq"], "entropy_weight": 0.1}, "entropy_weight"),
        ({**CASES["simvq"], "entropy_weight": 0.1}, "entropy_weight"),
        ({"quantizer": "ibq", "vq": VectorOptions(gradient="rotation"), **RAW}, "model.vq"),
        ({"fsq": FiniteScalarOptions((5, 5))}, "model.fsq"),
    ):
        with pytest.raises((InputError, ValueError), match=name):
            build_quantizer(VQConfig(**wrong))
    with pytest.raises(ValueError, match="group_size"):
        BinarySphericalOptions(group_size=0)
