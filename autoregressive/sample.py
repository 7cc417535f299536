r"""Sample images and, with a reference, score them. Run it again to continue after a stop.

    python -m autoregressive.sample --gpt weights/t2i_512 --tokenizer weights/vq16_t2i \
        --conditions.prompts prompts.txt --out samples/prompts
    python -m autoregressive.sample --gpt runs/gpt_b --tokenizer weights/vq16 --out samples/b \
        --num_images 50000 --sampling.cfg_scale 2.0 --npz false \
        --metrics.reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node 8 -m autoregressive.sample ...
"""

from dataclasses import dataclass

from autoregressive.sampling.config import SampleRunConfig
from core.config import parse_config, parse_first, run_command


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SampleRunConfig):
    """Settings of autoregressive.sample: those of a sample run."""


parse_first(SampleConfig, __name__)

from autoregressive.sampling.run import sample
from core.distributed.world import distributed
from core.lock import writer_lock


def main() -> None:
    """Entry point."""
    config = parse_config(SampleConfig)
    with distributed(config.compute.device) as world, writer_lock(config.out, world):
        sample(config, world)


if __name__ == "__main__":
    run_command(main)
