"""Score generated (or reconstructed) images against a reference file.

python -m evaluations.generation --samples samples/gpt_b_256 \
    --reference VIRTUAL_imagenet256_labeled.npz --out scores/gpt_b_256
torchrun --nproc-per-node 8 -m evaluations.generation ...
"""

import logging
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import config_values, parse_config, run_command
from core.datasets import Skipped
from core.distributed import World, distributed
from core.shards import write_json
from evaluations.detectors import note_of
from evaluations.evaluator import Collected, collect
from evaluations.inception_score import ADM_SPLIT, FIDELITY_SPLITS, SEED
from evaluations.pictures import Pictures, open_pictures
from evaluations.report import write_class_report
from evaluations.scoring import Judge, Scores, ScoringConfig, check_size, open_judge, score

logger = logging.getLogger(__name__)

FEW_SAMPLES = 10_000  # below, the distance's bias exceeds the differences that papers report


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(ScoringConfig):
    """Which samples.

    Args:
        samples: An npz with arr_0 uint8 (n, h, w, 3), a run of autoregressive.sample, or images.
    """

    samples: Path


def evaluate(judge: Judge, config: GenerationConfig, world: World) -> dict[str, float]:
    """Score the samples and write scores.json -> the scores by name."""
    pictures = open_pictures(config.samples, config.image_size)
    check_size(pictures.size, pictures.source, judge.reference)
    collected = collect(judge.detector, pictures, world, config.batch_size, config.num_workers)
    skipped = [item for rank in world.gather(pictures.skipped) for item in rank]
    if not world.is_main:
        return {}
    scores = score(judge, collected)
    config.out.mkdir(parents=True, exist_ok=True)
    result = {**scores.values, **facts(judge, pictures, collected, skipped)}
    write_json(config.out / "scores.json", {**result, "settings": config_values(config)})
    report(judge, config.out, pictures, collected, scores)
    return scores.values


def facts(
    judge: Judge, pictures: Pictures, collected: Collected, skipped: list[Skipped]
) -> dict[str, Any]:
    """What the scores depend on."""
    count = len(collected.ids)
    is_fid = judge.detector.metric == "fid"
    # Only 50,000 images make what papers call FID-50k.
    name = (
        f"{judge.distance} of {count} images" if count != 50_000 else f"{judge.distance} (FID-50k)"
    )
    git = shutil.which("git")
    commit = [git, "rev-parse", "HEAD"] if git else ["true"]
    done = subprocess.run(commit, cwd=Path(__file__).parent, capture_output=True, text=True)
    balance = None
    if pictures.labels is not None:
        sizes = np.unique(pictures.labels[collected.ids.numpy()], return_counts=True)[1]
        balance = {"classes": len(sizes), "least": int(sizes.min()), "most": int(sizes.max())}
    return {
        "n": count,
        "name": name if is_fid else f"{name} ({note_of(judge.detector)})",
        "note": note_of(judge.detector),
        "reference": judge.reference.path.name,
        "reference_sha256": judge.reference.sha256,
        "reference_images": 0 if judge.real is None else len(judge.real),
        "weights_sha256": judge.detector.weights_sha256,
        "inception_score_splits": f"{ADM_SPLIT} a split, shuffled; adm: {ADM_SPLIT}, unshuffled; "
        f"fidelity: {FIDELITY_SPLITS} splits, shuffled",
        "inception_score_seed": SEED,
        "class_balance": balance,
        "commit": done.stdout.strip(),
        "skipped": [list(item) for item in skipped],
    }


def report(
    judge: Judge, out: Path, pictures: Pictures, collected: Collected, scores: Scores
) -> None:
    """Tell the scores, the warnings, and which classes matter most."""
    if len(collected.ids) < FEW_SAMPLES:
        logger.warning("only %d samples: the distance is biased upwards", len(collected.ids))
    if scores.influence is not None and pictures.labels is not None:
        labels = pictures.labels[collected.ids.numpy()]
        write_class_report(scores.influence.numpy(), labels, pictures.classes, judge.distance, out)
        print(out / "classes.png")
    note = note_of(judge.detector)
    for name, value in scores.values.items():
        print(f"{name}{f' ({note})' if note else ''}: {value:.4f} on {len(collected.ids)} images")
    print(out / "scores.json")


def main() -> None:
    """Entry point."""
    config = parse_config(GenerationConfig)
    with distributed(config.device) as world:
        evaluate(open_judge(config, world), config, world)


if __name__ == "__main__":
    run_command(main)
