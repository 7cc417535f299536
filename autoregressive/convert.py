"""Convert a GPT to a folder of ours or of vLLM, upload it, or list the released models.

python -m autoregressive.convert --source c2i_L_384.pt --grid 24 24 --out weights/gpt_l_384
python -m autoregressive.convert --source runs/gpt_b --format vllm --out weights/gpt_b_vllm
python -m autoregressive.convert --source runs/gpt_b --push_to owner/gpt_b
python -m autoregressive.convert --list true
"""

from dataclasses import dataclass
from typing import Literal

from core.config import InputError, config_text, parse_config, parse_first, run_command
from core.hub import ExportConfig


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ExportConfig):
    """Settings of autoregressive.convert.

    Args:
        source: A released model's name, a released file, a run or checkpoint folder, or
            `owner/name[/file][@revision]` on the Hub.
        format: folder: config.yaml and model.safetensors; vllm: a folder that vLLM loads with the
            plugin in autoregressive/serving.
        grid: Rows and columns of codes, for a released file that does not tell; null to infer.
        list: Print the table of released models and tokenizers, and stop.
    """

    source: str | None = None
    format: Literal["folder", "vllm"] = "folder"
    grid: tuple[int, int] | None = None
    list: bool = False

    def __post_init__(self) -> None:
        if self.push_to and self.format != "folder":
            raise ValueError("push_to uploads a folder of ours: leave format at folder")


parse_first(ConvertConfig, __name__)

from typing import Any

from autoregressive.models.pretrained import load_gpt
from autoregressive.serving.export import export_vllm
from core.model_card import ModelDescription, export_model
from core.released import released_models, released_table, unpinned_text


def convert(config: ConvertConfig) -> None:
    """Write the model to config.out, upload it, or print the table."""
    if config.list:
        models = list(released_models().values())
        print(released_table(models), unpinned_text(models), sep="\n\n")
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
    if config.format == "vllm" and gpt.config.condition == "none":
        raise InputError(f"{config.source}: unconditional; format vllm is for classes and captions")
    if config.format == "vllm" and config.out:
        export_vllm(gpt, config.out)
        print(config.out)
        return
    captioned = gpt.config.condition == "text"
    task = "text-to-image" if captioned else "unconditional-image-generation"
    text, loader = config_text(gpt.config), "autoregressive.GPT"
    facts = ModelDescription("gpt", config.source, sha256, count, text, loader, task)
    export_model(gpt, facts, config)


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
