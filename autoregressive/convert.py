"""Convert a GPT to the format of this project (config.yaml and model.safetensors).

python -m autoregressive.convert --source c2i_L_384.pt --grid [24,24] --out weights/gpt_l_384
"""

from dataclasses import dataclass
from pathlib import Path

from autoregressive.models.pretrained import load_gpt
from core.config import parse_config, run_command, save_config
from core.weights import Weights, save_tensors


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of autoregressive.convert.

    Args:
        source: A released file, a run or checkpoint folder, or `owner/name[/file]` on the Hub.
        out: Output folder: config.yaml and model.safetensors.
        weights: Which weights to take; auto takes the EMA weights of our runs.
        grid: Rows and columns of codes, for a released file that does not tell; null to infer.
    """

    source: str
    out: Path
    weights: Weights = "auto"
    grid: tuple[int, int] | None = None


def main() -> None:
    """Entry point."""
    config = parse_config(ConvertConfig)
    overrides = {} if config.grid is None else {"grid": config.grid}
    gpt = load_gpt(config.source, config.weights, **overrides).gpt
    config.out.mkdir(parents=True, exist_ok=True)
    save_tensors(gpt.state_dict(), config.out / "model.safetensors")
    save_config(gpt.config, config.out / "config.yaml")
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{config.out}: {count:,} parameters, grid {gpt.config.grid}")


if __name__ == "__main__":
    run_command(main)
