"""Convert a tokenizer to a folder of ours, or upload it.

A tokenizer with simvq becomes one with a plain codebook.

python -m tokenizer.convert --source vq_ds16_c2i.pt --out weights/vq16
python -m tokenizer.convert --source runs/vq16 --push_to owner/vq16 --card.results scores/vq16
"""

from dataclasses import dataclass

from core.config import InputError, config_text, parse_config, parse_first, run_command
from core.hub import ExportConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ExportConfig):
    """Settings of tokenizer.convert.

    Args:
        source: A released model's name, a released file, a run or checkpoint folder, or
            `owner/name[/file][@revision]` on the Hub.
    """

    source: str


parse_first(ConvertConfig, __name__)

from core.model_card import ModelDescription, export_model
from tokenizer.models.pretrained import load_tokenizer


def convert(config: ConvertConfig) -> None:
    """Write the tokenizer to config.out, and upload it."""
    if not (config.out or config.push_to):
        raise InputError("give --out or --push_to")
    loaded = load_tokenizer(config.source, config.weights, verify_weights=config.verify_weights)
    vq, sha256 = loaded.vq.folded(), loaded.sha256
    count = sum(parameter.numel() for parameter in vq.parameters())
    print(f"{config.source}: {count:,} parameters, downsample {vq.config.downsample}")
    text, loader = config_text(vq.config), "tokenizer.VQModel"
    task = "image-feature-extraction"
    facts = ModelDescription("tokenizer", config.source, sha256, count, text, loader, task)
    export_model(vq, facts, config)


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
