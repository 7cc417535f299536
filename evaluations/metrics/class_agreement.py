"""How often images show the class that was asked for, by a classifier of real images.

The agreement cannot be trusted beyond the classifier's accuracy on held-out real images.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PENALTY = 0.01  # sklearn's C: inverse of the strength of the L2 penalty
ITERATIONS = 300


class AgreementClassifier:
    """A logistic regression on features of real images: features (n, dim), classes (n,)."""

    def __init__(self, features: np.ndarray, classes: np.ndarray) -> None:
        regression = LogisticRegression(C=PENALTY, max_iter=ITERATIONS)
        self.classifier = make_pipeline(StandardScaler(), regression).fit(features, classes)

    def agreement(self, features: np.ndarray, wanted: np.ndarray) -> float:
        """The share of images (features (n, dim)) that show their class (n,), in [0, 1]."""
        return float(self.agrees(features, wanted).mean())

    def agrees(self, features: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether each image shows its class, (n,) bool."""
        return self.classifier.predict(features) == wanted
