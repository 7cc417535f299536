"""Convert a tokenizer to a folder of ours; one with simvq becomes one with a plain codebook.

python -m tokenizer.convert --source vq_ds16_c2i.pt --out weights/vq16
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import parse_config, run_command, save_config
from core.lock import writer_lock
from core.weights import (
    Weights,
    save_tensors,
)
from tokenizer.models.pretrained import load_tokenizer


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a tokenizer to a folder of ours.

    Args:
        source: A released file, a folder of ours, or `owner/name[/file]` on the Hub.
        out: The folder to write config.yaml and model.safetensors to.
        weights: Which weights to take; auto prefers averaged ones.
        verify_weights: Compare the files of our checkpoints with their checksums.
    """

    source: str
    out: Path
    weights: Weights = "auto"
    verify_weights: bool = True


def convert(config: ConvertConfig) -> None:
    """Write the folder."""
    loaded = load_tokenizer(config.source, config.weights, verify_weights=config.verify_weights)
    vq = loaded.vq.folded()
    with writer_lock(config.out):
        save_tensors(vq.state_dict(), config.out / "model.safetensors")
        save_config(vq.config, config.out / "config.yaml")
    count = sum(parameter.numel() for parameter in vq.parameters())
    print(f"{config.out}: {count:,} parameters, downsample {vq.config.downsample}")


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
