"""Convert a tokenizer to a folder of ours, or upload it.

A tokenizer with simvq becomes one with a plain codebook.

python -m tokenizer.convert --source vq_ds16_c2i.pt --out weights/vq16
python -m tokenizer.convert --source runs/vq16 --push_to owner/vq16 --card.results '[scores/vq16]'
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from core.config import InputError, config_text, parse_config, run_command
from core.model_card import (
    CardConfig,
    ModelDescription,
    check_results,
    check_target,
    publish_model,
    write_folder,
)
from core.weights import Weights
from tokenizer.models.pretrained import load_tokenizer


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a tokenizer to a folder of ours.

    Args:
        source: A released model's name, a released file, a run or checkpoint folder, or
            `owner/name[/file][@revision]` on the Hub.
        out: The folder to write config.yaml and model.safetensors to; null where push_to is given
            and no folder is wanted.
        weights: Which weights to take; auto prefers averaged ones.
        verify_weights: Compare the files of our checkpoints with their checksums.
        push_to: Upload the folder with a model card to `owner/name[@branch]` on the Hub; null for
            no upload.
        card: What the model card says.
    """

    source: str
    out: Path | None = None
    weights: Weights = "auto"
    verify_weights: bool = True
    push_to: str | None = None
    card: CardConfig = field(default_factory=CardConfig)


def convert(config: ConvertConfig) -> None:
    """Write the tokenizer to config.out, and upload it."""
    if not (config.out or config.push_to):
        raise InputError("give --out or --push_to")
    loaded = load_tokenizer(config.source, config.weights, verify_weights=config.verify_weights)
    vq, sha256 = loaded.vq.folded(), loaded.sha256
    count = sum(parameter.numel() for parameter in vq.parameters())
    print(f"{config.source}: {count:,} parameters, downsample {vq.config.downsample}")
    text, task = config_text(vq.config), "image-feature-extraction"
    facts = ModelDescription(
        "tokenizer", config.source, sha256, count, text, "tokenizer.VQModel", task
    )
    if config.push_to:  # before anything is written
        check_target(config.push_to)
        check_results(facts, config.card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.out or Path(temporary)
        write_folder(vq, vq.config, folder)
        if config.push_to:
            print(publish_model(folder, config.push_to, facts, config.card))
    if config.out:
        print(config.out)


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
