"""Convert a GPT to a folder of ours, or list the released models that load by name.

python -m autoregressive.convert --source c2i_L_384.pt --grid [24,24] --out weights/gpt_l_384
python -m autoregressive.convert --list true
"""

from dataclasses import dataclass
from pathlib import Path

from autoregressive.models.pretrained import load_gpt
from core.config import InputError, parse_config, run_command, save_config
from core.released import released_models, released_table
from core.weights import (
    Weights,
    save_tensors,
)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a GPT to a folder of ours.

    Args:
        source: A released model's name, a released file, a folder of ours, or
            `owner/name[/file][@revision]` on the Hub.
        out: The folder to write config.yaml and model.safetensors to.
        weights: Which weights to take; auto prefers averaged ones in our folders.
        grid: Rows and columns of codes where the file does not tell; [0, 0] to infer them.
        list: Print the table of released models, tokenizers included, and stop.
    """

    source: str = ""
    out: Path | None = None
    weights: Weights = "auto"
    grid: tuple[int, int] = (0, 0)
    list: bool = False


def main() -> None:
    """Entry point."""
    config = parse_config(ConvertConfig)
    if config.list:
        print(released_table(released_models().values()))
        return
    if not config.source or config.out is None:
        raise InputError("give --source and --out, or --list true")
    grid = {} if config.grid == (0, 0) else {"grid": config.grid}
    gpt = load_gpt(config.source, config.weights, None, **grid).gpt
    config.out.mkdir(parents=True, exist_ok=True)
    save_tensors(gpt.state_dict(), config.out / "model.safetensors")
    save_config(gpt.config, config.out / "config.yaml")
    count = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"{config.out}: {count:,} parameters, grid {gpt.config.grid}")


if __name__ == "__main__":
    run_command(main)
