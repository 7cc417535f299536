"""Convert a GPT to a folder of this project or of vLLM, or list the released models.

python -m autoregressive.convert --source c2i_L_384.pt --grid '[24,24]' --out weights/gpt_l_384
python -m autoregressive.convert --source runs/gpt_b --format vllm --out weights/gpt_b_vllm
python -m autoregressive.convert --list true
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoregressive.models.pretrained import load_gpt
from autoregressive.serving.export import export_vllm
from core.config import InputError, parse_config, run_command, save_config
from core.lock import writer_lock
from core.released import released_models, released_table
from core.weights import Weights, save_tensors


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
        list: Print the table of released models and tokenizers, and stop.
    """

    source: str | None = None
    out: Path | None = None
    weights: Weights = "auto"
    verify_weights: bool = True
    format: Literal["folder", "vllm"] = "folder"
    grid: tuple[int, int] | None = None
    list: bool = False


def convert(config: ConvertConfig) -> None:
    """Write the model to config.out, or print the table."""
    if config.list:
        print(released_table(released_models().values()))
        return
    if not config.source or config.out is None:
        raise InputError("give --source and --out, or --list true")
    overrides: dict[str, Any] = {} if config.grid is None else {"grid": config.grid}
    gpt = load_gpt(
        config.source, config.weights, verify_weights=config.verify_weights, **overrides
    ).gpt
    if config.format == "vllm":
        export_vllm(gpt, config.out)  # makes the whole folder at once, so it needs no lock
    else:
        with writer_lock(config.out):
            save_tensors(gpt.state_dict(), config.out / "model.safetensors")
            save_config(gpt.config, config.out / "config.yaml")
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{config.out}: {count:,} parameters, grid {gpt.config.grid}")


def main() -> None:
    """Entry point."""
    convert(parse_config(ConvertConfig))


if __name__ == "__main__":
    run_command(main)
