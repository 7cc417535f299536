"""Score a tokenizer on validation images: encode them, decode, compare.

python -m tokenizer.reconstruct --tokenizer runs/vq16 --data imagenet/val --out scores/vq16
torchrun --nproc-per-node 8 -m tokenizer.reconstruct ...
"""

from dataclasses import dataclass

from core.config import parse_config, parse_first, run_command
from tokenizer.reconstruction_config import ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(ReconstructionConfig):
    """Settings of tokenizer.reconstruct: those of a reconstruction."""


parse_first(ReconstructConfig, __name__)

from core.distributed.world import distributed
from core.lock import writer_lock
from tokenizer.reconstruction import reconstruct


def main() -> None:
    """Entry point."""
    config = parse_config(ReconstructConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        reconstruct(config, world)


if __name__ == "__main__":
    run_command(main)
