"""Labels that a classifier trained on the other records does not believe."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from vfm.data.prepare import segment
from vfm.errors import UserError

Record = tuple[str, str, int]  # text, label, key


def features(text: str) -> list[str]:
    """Words and pairs of words of a text, of characters where the script has no spaces."""
    words = segment.words(text.casefold(), "characters")
    return words + list(map(" ".join, zip(words, words[1:])))


def suspects(
    records: Callable[[], Iterable[Record]],
    folds: int = 5,
    min_class: int = 20,
    num_features: int = 1 << 16,
    alpha: float = 0.02,
) -> Iterator[tuple[int, str]]:
    """(index, likelier label) of each record whose label is doubtful, in order.

    records: called for each of four passes, gives (text, label, key); texts with equal keys share a fold. For each
    fold a naive Bayes classifier (scikit-learn; alpha: its smoothing) of hashed words and pairs of words is trained on
    the others; it needs one pass, and 16 bytes for each fold, class and feature, however many records. Confident
    learning (Northcutt, Jiang and Chuang 2021): a label is doubted where another class, and not its own, reaches the
    mean confidence that the records of that class have in it. Classes with fewer than min_class records are neither
    doubted nor suggested.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.naive_bayes import MultinomialNB

    counts = Counter(label for _, label, _ in records())
    classes = sorted(label for label, count in counts.items() if count >= min_class)
    if len(classes) < 2:
        raise UserError(
            f"the label filter needs two classes with at least {min_class} records each; it found "
            + (", ".join(f"{label!r}: {count}" for label, count in counts.most_common(5)) or "no label")
        )
    position = {label: n for n, label in enumerate(classes)}
    vectorizer = HashingVectorizer(analyzer=features, n_features=num_features, binary=True, alternate_sign=False)

    def batches():
        """Features, classes (-1: rare) and folds of the records."""
        rest = iter(records())
        while batch := list(islice(rest, 4096)):
            texts, labels, keys = zip(*batch)
            target = np.array([position.get(label, -1) for label in labels])
            yield vectorizer.transform(texts), target, np.array([key % folds for key in keys])

    models = [MultinomialNB(alpha=alpha) for _ in range(folds)]
    for x, target, fold in batches():
        for n, model in enumerate(models):
            if (rows := np.flatnonzero((fold != n) & (target >= 0))).size:
                model.partial_fit(x[rows], target[rows], classes=np.arange(len(classes)))

    def confidences():
        """float[n, classes] by the models that have not seen the records, and their classes."""
        for x, target, fold in batches():
            p = np.zeros((len(target), len(classes)))
            for n, model in enumerate(models):
                if (rows := np.flatnonzero(fold == n)).size and hasattr(model, "classes_"):
                    p[rows] = model.predict_proba(x[rows])
            yield p, target

    sums = np.zeros(len(classes))
    for p, target in confidences():
        known = np.flatnonzero(target >= 0)
        np.add.at(sums, target[known], p[known, target[known]])
    limits = sums / np.array([counts[label] for label in classes])
    begin = 0
    for p, target in confidences():
        sure = np.where(p >= limits, p, 0.0)
        likely = sure.argmax(1)
        rows = np.arange(len(p))
        doubtful = (target >= 0) & (sure[rows, target] == 0) & (sure[rows, likely] > 0)
        for row in np.flatnonzero(doubtful).tolist():
            yield begin + row, classes[likely[row]]
        begin += len(p)
