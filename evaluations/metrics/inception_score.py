"""The Inception Score (Salimans et al. 2016): confidence per image and variety over images."""

import numpy as np
import torch

ADM_SPLIT = 5000  # images per split, in ADM's evaluator
FIDELITY_SPLITS = 10  # torch-fidelity's number of splits, and the seed of its shuffle
SEED = 2020


def inception_scores(logits: torch.Tensor) -> dict[str, float]:
    """Logits (n, classes), ordered by image id -> the score for each way to split the images.

    inception_score: splits of 5,000 after a seeded shuffle, so that sorted classes do not matter.
    inception_score_adm: exactly as ADM, splits of 5,000 in the given order.
    inception_score_fidelity: as torch-fidelity, 10 splits after its shuffle.
    """
    shuffled = logits[np.random.RandomState(SEED).permutation(len(logits))]
    parts = [len(logits) * i // FIDELITY_SPLITS for i in range(1, FIDELITY_SPLITS)]
    scores = {
        "inception_score": inception_score(shuffled.split(ADM_SPLIT)),
        "inception_score_adm": inception_score(logits.split(ADM_SPLIT)),
    }
    if len(logits) >= FIDELITY_SPLITS:
        scores["inception_score_fidelity"] = inception_score(shuffled.tensor_split(parts))
    return scores


def inception_score(splits: tuple[torch.Tensor, ...]) -> float:
    """exp of the mean divergence between p(y | x) and p(y), averaged over splits of logits (m, c).

    (Salimans et al. 2016.)
    """
    scores = []
    for logits in splits:
        logs = logits.double().log_softmax(1)
        marginal = logs.logsumexp(0) - np.log(len(logs))
        scores.append((logs.exp() * (logs - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
