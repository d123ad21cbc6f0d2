"""An independent classifier, fitted on real data only, that judges generated data."""

import numpy as np

from vfm.errors import UserError


class Judge:
    """Support vector classifier with a radial kernel (scikit-learn), on flattened items.

    `real_accuracy` is its accuracy on real held-out items: what it says of generated ones is worth no more than that.
    """

    def __init__(self, items: np.ndarray, labels: np.ndarray, *, C: float = 10.0):
        from sklearn.svm import SVC

        if len(np.unique(labels)) < 2:
            raise UserError("the judge needs training items of at least two classes")
        # The shape of the decision function does not change what is predicted.
        self._model = SVC(C=C, gamma="scale", decision_function_shape="ovo").fit(_flat(items), labels)

    def accuracy(self, items: np.ndarray, labels: np.ndarray) -> float:
        """The share of items float[n, ...] that are classified as their labels int[n]."""
        return float(np.mean(self.predict(items) == labels))

    def predict(self, items: np.ndarray) -> np.ndarray:
        """int[n] classes of items float[n, ...]."""
        return self._model.predict(_flat(items))

    def features(self, items: np.ndarray) -> np.ndarray:
        """float[n, D] signed distances of items from the borders between each two of the classes, in which sets of
        items can be compared: D = classes · (classes - 1) / 2."""
        return self._model.decision_function(_flat(items)).reshape(len(items), -1)


def _flat(items: np.ndarray) -> np.ndarray:
    return np.asarray(items, np.float64).reshape(len(items), -1)
