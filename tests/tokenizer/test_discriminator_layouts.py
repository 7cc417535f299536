"""Every released discriminator loads strictly, from files fabricated on the spot."""

from pathlib import Path

import pytest
import torch
from helpers.models import SMALL
from safetensors.torch import save_file

from core.errors import InputError
from tokenizer.losses.objective import LossConfig
from tokenizer.models.config import VQConfig
from tokenizer.models.discriminator import DiscriminatorConfig, build_discriminator
from tokenizer.models.released_layouts import read_discriminator
from tokenizer.training.config import TrainConfig
from tokenizer.training.models import build_models

NETWORKS = {
    "patchgan": DiscriminatorConfig(base_channels=8),
    "stylegan": DiscriminatorConfig("stylegan", max_channels=8),
    "stylegan_reference": DiscriminatorConfig("stylegan_reference", max_channels=8),
}
FILES = ("LlamaGen training", "Warmup-VQ", "checkpoint of ours")


def write(kind: str, state: dict, folder: Path) -> Path:
    if kind == "checkpoint of ours":
        save_file(state, folder / "discriminator.safetensors")
        return folder / "discriminator.safetensors"
    models = ("vq", "vq_ema") if kind == "Warmup-VQ" else ("model", "ema")
    weights = {name: {"conv_in.weight": torch.zeros(1)} for name in models}
    torch.save({**weights, "discriminator": state, "steps": 7}, folder / "released.pt")
    return folder / "released.pt"


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_discriminator_loads_strictly_and_what_does_not_fit_is_named(
    tmp_path, world, network, kind
):
    torch.manual_seed(3)
    net = build_discriminator(NETWORKS[network], (16, 16))
    state = net.state_dict()

    def start(stored: dict) -> dict[str, torch.Tensor]:
        config = TrainConfig(
            tmp_path / "run",
            tmp_path,
            image_size=(16, 16),
            model=VQConfig(**SMALL, vocab_size=40),
            loss=LossConfig(perceptual_weight=0),
            discriminator=NETWORKS[network],
            init_discriminator=str(write(kind, stored, tmp_path)),
        )
        return build_models(config, world).discriminator.state_dict()

    found = start(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    key = next(key for key in state if key.endswith("bias"))
    for wrong, message in (
        ({name: value for name, value in state.items() if name != key}, f"{key} is missing"),
        ({**state, "more.weight": torch.zeros(1)}, "more.weight is not part of the model"),
        ({**state, key: torch.zeros(3, 3)}, f"{key} is (3, 3)"),
    ):
        with pytest.raises(InputError) as refused:
            start(wrong)
        assert message in str(refused.value)


def test_a_file_without_a_discriminator_is_refused_by_name(tmp_path):
    torch.save({"model": {"conv_in.weight": torch.zeros(1)}}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match=r"vq\.pt: has no discriminator weights"):
        read_discriminator(tmp_path / "vq.pt")
