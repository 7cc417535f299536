"""The loop from conditions to pixels and scores, shared by commands and in-training evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import Condition, ConditionLike
from autoregressive.sampling.pipeline import ImagePipeline
from core.distributed.world import World
from evaluations.evaluator import Evaluator
from evaluations.scorer import Scorer, score

CodeBatch = tuple[torch.Tensor, torch.Tensor]  # image ids (n,) int64, codes (n, h, w) int64


class SampledBatch(NamedTuple):
    """Image ids (n,) int64, codes (n, h, w) int64, pixels (n, height, width, 3) uint8."""

    ids: torch.Tensor
    codes: torch.Tensor
    pixels: torch.Tensor


def sample_batches(
    pipeline: ImagePipeline,
    conditions: Callable[[torch.Tensor], ConditionLike],
    ids: torch.Tensor,
    batch_size: int,
    sampling: SamplingConfig,
    negative: Condition | None = None,
) -> Iterator[CodeBatch]:
    """Sample images ids (n,) int64 in batches.

    conditions: image ids -> their conditions. negative: one row, used for every image.
    """
    for part in ids.split(batch_size):
        away = negative and negative.repeat(len(part))
        yield part, pipeline.sample(conditions(part), sampling, part, away)


def decode_batches(
    pipeline: ImagePipeline,
    batches: Iterable[CodeBatch],
    evaluator: Evaluator | None = None,
    resize: int | None = None,
    to_cpu: bool = True,
) -> Iterator[SampledBatch]:
    """Decode batches of codes while the next batch is sampled; the evaluator sees the pixels.

    to_cpu: copy codes and pixels to the CPU; without it nothing waits for the device.
    """
    overlap = pipeline.overlap
    for ids, codes in overlap.one_behind(batches):
        with overlap.second_stream():
            pixels = pipeline.decode(codes, resize)
            if evaluator:
                evaluator.update(pixels, ids)
            if to_cpu:
                codes, pixels = codes.cpu(), pixels.cpu()
        yield SampledBatch(ids, codes, pixels)
    overlap.join()


def score_samples(
    pipeline: ImagePipeline,
    conditions: Callable[[torch.Tensor], ConditionLike],
    count: int,
    sampling: SamplingConfig,
    scorer: Scorer,
    world: World,
    negative: Condition | None = None,
) -> dict[str, float]:
    """Sample images 0 .. count - 1 and score them -> scores by name (empty except on rank 0).

    All ranks call it. Nothing is written.
    """
    evaluator = scorer.evaluator(world)
    # Every rank samples equally many images, because sharded weights are gathered by all ranks
    # together; the scorer counts repeated images once.
    ids = torch.arange(math.ceil(count / world.size) * world.size) % count
    own = ids[world.rank :: world.size]
    batches = sample_batches(pipeline, conditions, own, scorer.batch_size, sampling, negative)
    for _ in decode_batches(pipeline, batches, evaluator, to_cpu=False):
        pass
    collected = evaluator.merge(world)
    return score(scorer, collected).values if world.is_main else {}
