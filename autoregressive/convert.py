"""Convert a GPT to a folder of ours, or to one that vLLM loads.

python -m autoregressive.convert --source c2i_L_384.pt --grid [24,24] --out weights/gpt_l_384
python -m autoregressive.convert --source runs/gpt_b --format vllm --out weights/gpt_b_vllm
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoregressive.models.pretrained import load_gpt
from autoregressive.serving.export import export_vllm
from core.config import parse_config, run_command, save_config
from core.weights import (
    Weights,
    save_tensors,
)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a decoder to a folder of ours.

    Args:
        source: A released file, a folder of ours, or `owner/name[/file]` on the Hub.
        out: The folder to write.
        weights: Which weights to take; auto prefers averaged ones in our folders.
        format: folder writes config.yaml and model.safetensors; vllm writes a folder for vLLM with
            the plugin in autoregressive/serving.
        grid: Rows and columns of codes where the file does not tell; [0, 0] to infer them.
    """

    source: str
    out: Path
    weights: Weights = "auto"
    format: Literal["folder", "vllm"] = "folder"
    grid: tuple[int, int] = (0, 0)


def main() -> None:
    """Entry point."""
    config = parse_config(ConvertConfig)
    overrides = {"grid": config.grid} if config.grid != (0, 0) else {}
    gpt = load_gpt(config.source, config.weights, **overrides).gpt
    if config.format == "vllm":
        export_vllm(gpt, config.out)
    else:
        config.out.mkdir(parents=True, exist_ok=True)
        save_tensors(gpt.state_dict(), config.out / "model.safetensors")
        save_config(gpt.config, config.out / "config.yaml")
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{config.out}: {count:,} parameters, grid {gpt.config.grid}")


if __name__ == "__main__":
    run_command(main)
