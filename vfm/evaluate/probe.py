"""Linear probes: how much of a label can be read off frozen features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vfm.data.passages import Passages
from vfm.data.records import stream
from vfm.errors import UserError, unknown
from vfm.evaluate import Evaluation, check_length, fewest, options
from vfm.model import INPUTS, example_batch

OPTIONS = {"features": (), "length": 0, "per_document": 4, "train_examples": 2000, "test_examples": 1000, "C": 1.0}


class LinearProbe:
    """Logistic regression (scikit-learn, L2 penalty 1 / C) on standardised features float[n, D], labels int[n].

    It is fitted in one thread: the same on every machine, and for problems of this size quicker.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, *, C: float = 1.0):
        import threadpoolctl
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(np.unique(labels)) < 2:
            raise UserError("a probe needs training examples of at least two classes")
        self._model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        with threadpoolctl.threadpool_limits(1):
            self._model.fit(np.asarray(features, np.float64), labels)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """int[n] classes of features float[n, D]."""
        return self._model.predict(np.asarray(features, np.float64))

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """The share of features float[n, D] whose class is found."""
        return float(np.mean(self.predict(features) == labels))


class Probed(NamedTuple):
    """The name of the features that were chosen, the probe on them, and how well each did on the held-out fifth."""

    name: str
    model: LinearProbe
    scores: dict[str, float]


def fit(features: Mapping[str, np.ndarray], labels: np.ndarray, groups: np.ndarray, *, C: float = 1.0) -> Probed:
    """Chooses among features {name: float[n, D]} and fits a probe on the best.

    Every feature is tried on a fifth of the groups (such as documents) after training on the others, so that neither
    the choice nor the probe sees a test example. Equal scores: the first.
    """
    if not features:
        raise UserError("a probe needs features")
    held_out = np.unique(groups, return_inverse=True)[1] % 5 == 4
    scores = dict.fromkeys(features, float("nan"))
    if len(features) > 1 and len(np.unique(labels[~held_out])) > 1 and held_out.any():
        for name, x in features.items():
            probe = LinearProbe(x[~held_out], labels[~held_out], C=C)
            scores[name] = probe.accuracy(x[held_out], labels[held_out])
    best = max(features, key=lambda name: np.nan_to_num(scores[name]))
    return Probed(best, LinearProbe(features[best], labels, C=C), scores)


def reader(experiment, names: Sequence[str]) -> Callable[[Mapping[str, Any], Any], tuple[dict, np.ndarray]]:
    """A function (weights, dataset) -> ({name: float32[n, D]}, int[n]): features of every example that can be read,
    each averaged to one vector, and which examples these are.

    weights: {"params", …}. names: places in the model's `out`, such as "output", "backbone/layers" or "image/features"
    (see `VFM`); the stack "layers" becomes one feature for each layer, "backbone/layers/0" and so on. Features of
    sequence positions are averaged over the positions of `input_mask`. Raises UserError for a place that is not there.
    """
    pooled = experiment.jit(lambda variables, batch: _pool(experiment.model, variables, batch, tuple(names)))

    def read(weights, dataset):
        found: dict[str, list[np.ndarray]] = {}
        rows: list[np.ndarray] = []
        for host, batch in experiment.eval_batches(dataset):
            real = host["example_mask"] > 0
            rows.append(real)
            for name, x in pooled(weights, batch).items():
                found.setdefault(name, []).append(experiment.fetch(x)[real])
        return {name: np.concatenate(parts) for name, parts in found.items()}, np.flatnonzero(np.concatenate(rows))

    return read


def _pool(model, variables, batch, names) -> dict[str, jax.Array]:
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    _, out = model.apply(variables, **inputs, train=False)
    found = {}
    for name in names:
        x: Any = out
        for part in name.split("/"):
            if not isinstance(x, Mapping) or part not in x:
                raise unknown("features", name, _places(out), "config.eval.probe")
            x = x[part]
        if not hasattr(x, "ndim"):
            raise unknown("features", name, _places(out), "config.eval.probe")
        if part == "layers":
            found |= {f"{name}/{i}": _mean(x[i], batch["input_mask"]) for i in range(len(x))}
        else:
            found[name] = _mean(x, batch["input_mask"])
    return found


def _places(out: Mapping, prefix: str = "") -> list[str]:
    """All names of arrays that can be pooled."""
    found = []
    for name, value in out.items():
        found += _places(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return [name for name in found if not name.startswith("backbone/cache")]


def _mean(x: jax.Array, input_mask: jax.Array) -> jax.Array:
    """float[B, …, D] -> float32[B, D]."""
    x = x.astype(jnp.float32)
    if x.shape[:2] == input_mask.shape and x.ndim == 3:
        weight = input_mask[:, :, None].astype(jnp.float32)
        return (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
    return x.mean(axis=tuple(range(1, x.ndim - 1)))


# The field of a source of text that gives it labels.
LABELS = {"jsonl": "label_field", "stdlib": "label"}


class Images:
    """One image in a row, as a data set of visual sentences gives it, with labels; at most `most` of them, at random.

    The interface is that of `Passages`, each image a document of its own.
    """

    def __init__(self, dataset, most: int = 0):
        if dataset.labels is None:
            raise UserError("the evaluator 'probe' needs images with labels; the source has none")
        self.dataset, labels = dataset, np.asarray(dataset.labels)
        order = stream(0, "images").permutation(len(labels))
        self.documents = order[labels[order] >= 0][: most or None]
        self.labels = labels[self.documents]

    def __len__(self) -> int:
        return len(self.documents)

    def example(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """Image `index`; nothing of it is to be predicted."""
        row = self.dataset.example(int(self.documents[index]), rng)
        return {**row, "loss_mask": np.zeros_like(row["loss_mask"])}


def check_probe(experiment) -> None:
    """Refuses a config without labelled text or images, passages that are too long, and features that the model does
    not have."""
    chosen, model = options(experiment, "probe", OPTIONS), experiment.model
    source = experiment.config.data.get("source")
    visual = experiment.config.data.name == "visual_sentences" and not experiment.config.data.get("tasks")
    if not visual and (experiment.config.data.name != "text" or source is None):
        raise UserError(
            "the evaluator 'probe' needs config.data.name='text', with a source that has labels, or 'visual_sentences' "
            "of one image"
        )
    field = LABELS.get(source.name)
    if field and not source.get(field):
        raise UserError(f"the evaluator 'probe' needs labels: set config.data.source.{field}")
    check_length("probe", chosen["length"], model)
    weights = {"params": experiment.abstract_state.params, **experiment.abstract_state.variables}
    batch = example_batch(model, experiment.config.data.length)
    jax.eval_shape(lambda *call: _pool(model, *call, _names(model, chosen)), weights, batch)


def _names(model, chosen: Mapping[str, Any]) -> tuple[str, ...]:
    reader = "backbone/encoder" if model.backbone.kind == "encoder_decoder" else "backbone"
    return tuple(chosen["features"]) or (f"{reader}/layers",)


def probe(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Accuracy of a linear probe for the labels of the source, on frozen features of passages or images of the split.

      probe_accuracy         trained on the training split, with the features that `fit` chooses there
      probe_random_accuracy  the same for the untrained model: what architecture and words alone give
      probe_majority         the share of the split that the most frequent class of the training split makes up
      probe_examples, probe_classes

    Options in config.eval.probe: features (places for `reader`; (): every layer of the stack that reads the
    text, the encoder of an encoder–decoder), length (tokens of a passage; 0: data.length), per_document,
    train_examples, test_examples (at most; also `limit`), C. A passage has no special tokens and no masks.
    """
    chosen = options(experiment, "probe", OPTIONS)
    read = reader(experiment, _names(experiment.model, chosen))

    def passages(split, most):
        if experiment.config.data.name == "visual_sentences":
            return Images(experiment.dataset(split), most)
        return Passages(
            experiment.config.data.source,
            split=split,
            tokenizer=experiment.tokenizer,
            length=chosen["length"] or experiment.config.data.length,
            per_document=chosen["per_document"],
            most=most,
            labelled=True,
            skip_corrupt=experiment.config.data.get("skip_corrupt", False),
        )

    train = passages("train", chosen["train_examples"])
    test = passages(split, fewest(chosen["test_examples"], limit))
    most_frequent = np.bincount(train.labels).argmax()
    measured: dict[str, float] = {}
    rows = []
    untrained = experiment.init_state()
    for prefix, weights in (
        ("probe", {"params": params, **variables}),
        ("probe_random", {"params": untrained.params, **untrained.variables}),
    ):
        features, there = read(weights, train)
        found = fit(features, train.labels[there], train.documents[there], C=chosen["C"])
        features, there = read(weights, test)
        measured[f"{prefix}_accuracy"] = found.model.accuracy(features[found.name], test.labels[there])
        rows += [[("text", f"{prefix}: {name}"), ("text", f"{score:.3f}")] for name, score in found.scores.items()]
    measured["probe_majority"] = float(np.mean(test.labels == most_frequent))
    measured |= {"probe_examples": len(test), "probe_classes": len(np.unique(train.labels))}
    return Evaluation(measured, {"probe": ("Accuracy by features, on held-out training documents", rows)})


def compare(
    features: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """{name: accuracy on the test items} of a linear probe on each of several features {name: (float[n, ...] of the
    training items, float[m, ...] of the test items)}, which are flattened; labels: int[n], int[m]."""
    flat = lambda x: x.reshape(len(x), -1)
    return {
        name: LinearProbe(flat(train), labels[0]).accuracy(flat(test), labels[1])
        for name, (train, test) in features.items()
    }


def principal(train: np.ndarray, test: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `size` principal components of training items float[n, ...], or all there are, and of test items."""
    from sklearn.decomposition import PCA

    train, test = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (train, test))
    pca = PCA(min(size, *train.shape), random_state=0).fit(train)
    return pca.transform(train), pca.transform(test)
