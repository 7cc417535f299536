"""The Inception Score: how sure the network is of each image, and how varied the images are."""

import numpy as np


def inception_score(logits: np.ndarray, split_size: int, seed: int) -> float:
    """exp of the mean divergence between p(y | x) and p(y), averaged over splits.

    logits: (n, classes). split_size: images per split (ADM: 5,000). The images are shuffled by
    `seed` first, for class-ordered samples would score far too low. (Salimans et al. 2016.)
    """
    order = np.random.default_rng(seed).permutation(len(logits))
    logits = logits[order].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    probability = np.exp(logits)
    probability /= probability.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(probability), split_size):
        part = probability[start : start + split_size]
        marginal = part.mean(0, keepdims=True)
        tiny = np.finfo(np.float64).tiny
        ratio = np.log(np.maximum(part, tiny)) - np.log(np.maximum(marginal, tiny))
        scores.append(np.exp((part * ratio).sum(1).mean()))
    return float(np.mean(scores))
