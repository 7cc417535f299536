"""Convert a GPT to a folder of ours or of vLLM, upload it, or list the released models.

python -m autoregressive.convert --source c2i_L_384.pt --grid '[24,24]' --out weights/gpt_l_384
python -m autoregressive.convert --source runs/gpt_b --format vllm --out weights/gpt_b_vllm
python -m autoregressive.convert --source runs/gpt_b --push_to owner/gpt_b
python -m autoregressive.convert --list true
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoregressive.models.pretrained import load_gpt
from autoregressive.serving.export import export_vllm
from core.config import InputError, config_text, parse_config, run_command
from core.model_card import (
    CardConfig,
    ModelDescription,
    check_results,
    check_target,
    publish_model,
    write_folder,
)
from core.released import released_models, released_table
from core.weights import Weights


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of autoregressive.convert.

    Args:
        source: A released model's name, a released file, a run or checkpoint folder, or
            `owner/name[/file][@revision]` on the Hub.
        out: Output folder.
        weights: Which weights to take; auto takes the EMA weights of our runs.
        verify_weights: Compare the files of our checkpoints with their checksums.
        format: folder: config.yaml and model.safetensors; vllm: a folder that vLLM loads with the
            plugin in autoregressive/serving.
        grid: Rows and columns of codes, for a released file that does not tell; null to infer.
        push_to: Upload the folder with a model card to `owner/name[@branch]` on the Hub; null for
            no upload.
        card: What the model card says.
        list: Print the table of released models and tokenizers, and stop.
    """

    source: str | None = None
    out: Path | None = None
    weights: Weights = "auto"
    verify_weights: bool = True
    format: Literal["folder", "vllm"] = "folder"
    grid: tuple[int, int] | None = None
    push_to: str | None = None
    card: CardConfig = field(default_factory=CardConfig)
    list: bool = False

    def __post_init__(self) -> None:
        if self.push_to and self.format != "folder":
            raise ValueError("push_to uploads a folder of ours: leave format at folder")


def convert(config: ConvertConfig) -> None:
    """Write the model to config.out, upload it, or print the table."""
    if config.list:
        print(released_table(released_models().values()))
        return
    if not config.source or not (config.out or config.push_to):
        raise InputError("give --source and --out or --push_to, or --list true")
    overrides: dict[str, Any] = {} if config.grid is None else {"grid": config.grid}
    loaded = load_gpt(
        config.source, config.weights, verify_weights=config.verify_weights, **overrides
    )
    gpt, sha256 = loaded.gpt, loaded.sha256
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{config.source}: {count:,} parameters, grid {gpt.config.grid}")
    if config.format == "vllm" and config.out:
        export_vllm(gpt, config.out)
    elif config.push_to:
        task = "text-to-image"
        if gpt.config.condition == "class":
            task = "unconditional-image-generation"
        text, loader = config_text(gpt.config), "autoregressive.GPT"
        facts = ModelDescription("gpt", config.source, sha256, count, text, loader, task)
        check_target(config.push_to)
        check_results(facts, config.card)  # before anything is written
        with tempfile.TemporaryDirectory() as temporary:
            folder = config.out or Path(temporary)
            write_folder(gpt, gpt.config, folder)
            print(publish_model(folder, config.push_to, facts, config.card))
    elif config.out:
        write_folder(gpt, gpt.config, config.out)
    if config.out:
        print(config.out)


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
