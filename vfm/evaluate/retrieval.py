"""How well the modalities of an aligned model share one space: retrieval, zero-shot classes, probes, geometry."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from vfm import flops
from vfm.data.aligned import text_item
from vfm.encoders.vit import ViT
from vfm.errors import UserError
from vfm.evaluate import Evaluation, fewest, options
from vfm.evaluate.probe import LinearProbe
from vfm.evaluate.rollout import patch_map

OPTIONS = {
    "k": (1, 5, 10),
    "classes": (),
    "templates": ("{}",),
    "neighbours": 10,
    "probe_examples": 0,
    "picture": "pca",
    "maps": 4,
}


def ranks(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Place, from 1 on, of the best relevant item of each query, int[n]: similarity float[n, m], relevant bool[n, m].

    Items that are as similar as it count as better ones: a model that gives one embedding to all finds nothing. A query
    without a relevant item raises ValueError.
    """
    if not relevant.any(axis=1).all():
        raise ValueError("a query has no relevant item")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~relevant).sum(axis=1)


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """The share of queries with a relevant item among the first k: "recall@k" in image–text retrieval."""
    return float((ranks <= k).mean())


def alignment(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared distance of partners float[n, E]; 0 is the best (Wang & Isola 2020, section 4.1, α = 2)."""
    return float(np.square(a - b).sum(axis=1).mean())


def uniformity(x: np.ndarray) -> float:
    """Logarithm of the mean of exp(-2 d²) over pairs of rows of float[n, E]; the lower, the better they fill the sphere
    (Wang & Isola 2020, section 4.1, t = 2)."""
    squared = np.square(x).sum(axis=1)
    distance = np.maximum(squared[:, None] + squared[None] - 2 * x @ x.T, 0)
    return float(np.log(np.exp(-2 * distance[np.triu_indices(len(x), 1)]).mean()))


def modality_gap(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of the means of two modalities' embeddings (Liang et al. 2022, section 2)."""
    return float(np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)))


def check_retrieval(experiment) -> None:
    """Refuses a model without a shared space, data without pairs, and options that do not fit them."""
    chosen = options(experiment, "retrieval", OPTIONS)
    if experiment.model.alignment is None:
        raise UserError("the evaluator 'retrieval' needs model.alignment")
    if "pairs" not in experiment.config.data:
        raise UserError("the evaluator 'retrieval' needs data with pairs, such as config.data.name='composed'")
    if chosen["classes"] and "text" not in experiment.layout.modalities:
        raise UserError("config.eval.retrieval.classes needs a text encoder that reads items ('text_transformer')")
    for template in chosen["templates"]:
        if "{}" not in template:
            raise UserError(f"config.eval.retrieval.templates: {template!r} has no place {{}} for the class")
    if chosen["probe_examples"] and experiment.config.data.name != "composed":
        raise UserError("config.eval.retrieval.probe_examples needs config.data.name='composed', which has classes")
    if chosen["picture"] not in ("pca", "umap", ""):
        raise UserError(f"config.eval.retrieval.picture={chosen['picture']!r} must be 'pca', 'umap' or '' (none)")


def retrieval(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of the rows of a split (or `limit`), one item of each modality:

      r{k}_{A}_{B}        share of items of A for which an item of B of the row's label is among the k most similar
      alignment_{A}_{B}, gap_{A}_{B}, uniformity_{A}    see the functions
      query_flops         see the function; a candidate costs the product of two embeddings
      zero_shot_{A}       with `classes`: share of items whose label is that of the nearest class; a class is
                          the mean of the embeddings of its name in all `templates`
      probe_{A}, probe_random_{A}, probe_pca_{A}, knn_{A}    with `probe_examples`: accuracy of a linear probe on the
                          pooled features for the classes that an item shows, mean over their places, trained on
                          unchanged items; the same for the untrained model, and for so many principal components of
                          the raw items; and of the vote of the nearest embeddings

    Options in config.eval.retrieval: k, classes, templates, neighbours (of knn), probe_examples (of the training split;
    0: no probes), picture ("pca", "umap": of the shared space, in the report; umap-learn must be installed), maps (so
    many items of a ViT are shown with the rollout of its attention).
    """
    chosen = options(experiment, "retrieval", OPTIONS)
    dataset, read = experiment.dataset(split), reader(experiment)
    found = read(params, variables, dataset, fewest(limit, len(dataset)))
    embeddings, labels = found["embedding"], found["label"]
    measured: dict[str, float] = {}
    for a, b in itertools.permutations(embeddings, 2):
        place = ranks(embeddings[a] @ embeddings[b].T, labels[a][:, None] == labels[b][None])
        measured |= {f"r{k}_{a}_{b}": hit_rate(place, k) for k in chosen["k"]}
    for a, b in itertools.combinations(embeddings, 2):
        measured[f"alignment_{a}_{b}"] = alignment(embeddings[a], embeddings[b])
        measured[f"gap_{a}_{b}"] = modality_gap(embeddings[a], embeddings[b])
    measured |= {f"uniformity_{name}": uniformity(x) for name, x in embeddings.items() if len(x) > 1}
    width, count = next(iter(embeddings.values())).shape[1], len(next(iter(embeddings.values())))
    measured["query_flops"] = query_flops(experiment, embedder(experiment.model), 2.0 * width, count)
    if chosen["classes"]:
        measured |= zero_shot(experiment, params, variables, chosen, embeddings, labels)
    if chosen["probe_examples"]:
        measured |= probes(experiment, params, variables, chosen, read, dataset, found)
    samples = _samples(chosen, embeddings, dataset.pairs, measured)
    for name, encoder in experiment.model.encoders.items():
        if chosen["maps"] and isinstance(encoder, ViT):
            images = found["raw"][name][: chosen["maps"]]
            heat = np.asarray(patch_map(encoder, params[f"encoders_{name}"], images))
            caption = f"Rollout of the attention to the patches of {name}, from none (dark) to most (bright)"
            samples[f"rollout_{name}"] = (caption, [_mapped(*pair) for pair in zip(images, heat)])
    return Evaluation(measured, samples)


def embedder(model):
    """(params, variables, {X: items [B, …]}) -> {"embedding", "pooled": {X: float[B, …]}}."""

    def embed(params, variables, items):
        inputs = {name: x[:, None] for name, x in items.items()}
        out = model.apply({"params": params, **variables}, inputs=inputs, train=False)[1]
        pooled = {n: out[n]["encoder"].get("pooled", out[n]["features"][:, 0].mean(axis=1)) for n in inputs}
        return {"embedding": {n: out[n]["embedding"][:, 0] for n in inputs}, "pooled": pooled}

    return embed


def reader(experiment, of=None):
    """A function (params, variables, dataset, rows) -> {kind: {X: [n, …]}} of the first item of each modality X in so
    many rows: what `of` gives, a function like `embedder` (the default); "raw", the items; and "label"."""
    step = experiment.jit(of or embedder(experiment.model))

    def read(params, variables, dataset, rows):
        shown = {name: k for k, pair in reversed(list(enumerate(dataset.pairs))) for name in pair}
        found: dict[str, dict[str, list]] = {}
        for host, batch in experiment.eval_batches(dataset, rows):
            real = host["example_mask"] > 0
            part = jax.tree.map(
                experiment.fetch, step(params, variables, {n: items[:, 0] for n, items in batch["inputs"].items()})
            )
            part |= {"raw": {n: items[:, 0] for n, items in host["inputs"].items()}}
            part |= {"label": {n: host["label"][:, k] for n, k in shown.items()}}
            for kind, values in part.items():
                for name, x in values.items():
                    found.setdefault(kind, {}).setdefault(name, []).append(x[real])
        return {kind: {name: np.concatenate(x) for name, x in sorted(v.items())} for kind, v in found.items()}

    return read


def zero_shot(experiment, params, variables, chosen, embeddings, labels) -> dict[str, float]:
    """Accuracy of the nearest class by its name in prompts (CLIP, Radford et al. 2021, section 3.1)."""
    layout, tokenizer = experiment.layout, experiment.tokenizer
    prompts = [template.replace("{}", name) for name in chosen["classes"] for template in chosen["templates"]]
    items = np.stack([text_item(p, layout, tokenizer, "config.eval.retrieval.templates") for p in prompts])
    embed = experiment.jit(
        lambda params, variables, items: experiment.model.apply(
            {"params": params, **variables}, inputs={"text": items[:, None]}, train=False
        )[1]["text"]["embedding"][:, 0]
    )
    x = experiment.fetch(embed(params, variables, items)).reshape(len(chosen["classes"]), len(chosen["templates"]), -1)
    centres = x.mean(axis=1)
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
    return {
        f"zero_shot_{name}": float(((y @ centres.T).argmax(axis=1) == labels[name]).mean())
        for name, y in embeddings.items()
        if name != "text"
    }


def probes(experiment, params, variables, chosen, read, evaluated, test) -> dict[str, float]:
    """See `retrieval`. evaluated: the data set of the split; test: what `read` gave of it."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    dataset, tested = experiment.dataset("train", augment={}), len(next(iter(test["label"].values())))
    rows = min(chosen["probe_examples"], len(dataset))
    untrained = experiment.init_state()
    train = read(params, variables, dataset, rows)
    before = [read(untrained.params, untrained.variables, d, n) for d, n in ((dataset, rows), (evaluated, tested))]

    def accuracy(make, x, y, name):
        """Mean over the places of an item of the accuracy for the class there."""
        labels = [np.asarray([dataset.digits(string) for string in part["label"][name]]) for part in (train, test)]
        places = range(labels[0].shape[1])
        return float(np.mean([(make(x, labels[0][:, i]).predict(y) == labels[1][:, i]).mean() for i in places]))

    found = {}
    for name in train["pooled"]:
        if name == "text":  # which spells its classes
            continue
        raw = [part["raw"][name].reshape(len(part["raw"][name]), -1) for part in (train, test)]
        pca = PCA(min(train["pooled"][name].shape[1], *raw[0].shape), random_state=0).fit(raw[0])
        linear = {
            "probe": (train["pooled"][name], test["pooled"][name]),
            "probe_random": (before[0]["pooled"][name], before[1]["pooled"][name]),
            "probe_pca": tuple(map(pca.transform, raw)),
        }
        found |= {f"{kind}_{name}": accuracy(LinearProbe, *x, name) for kind, x in linear.items()}
        vote = lambda x, y: KNeighborsClassifier(min(chosen["neighbours"], len(x))).fit(x, y)
        found[f"knn_{name}"] = accuracy(vote, train["embedding"][name], test["embedding"][name], name)
    return found


def _samples(chosen, embeddings, pairs, measured) -> dict[str, tuple[str, list[list]]]:
    """The table of all ordered pairs of modalities, and the picture of the space."""
    count = len(next(iter(embeddings.values())))
    found = {"retrieval": recall_table(tuple(embeddings), pairs, chosen["k"], measured, count)}
    if chosen["picture"] and count > 2:
        drawing = picture(embeddings, chosen["picture"])
        found["space"] = (f"The shared space in two dimensions ({chosen['picture']})", [[("image", drawing)]])
    return found


def recall_table(names, pairs, k, measured, count: int) -> tuple[str, list[list]]:
    """For the report: r{k}_{A}_{B} of all ordered pairs of the named modalities, and whether `pairs` trained them."""
    trained = {frozenset(pair) for pair in pairs}
    rows = [[("text", cell) for cell in ("from → to", "trained on", *(f"recall@{n}" for n in k))]]
    for a, b in itertools.permutations(names, 2):
        how = "pairs of them" if {a, b} in trained else "no pair of them: emergent"
        rows.append([("text", cell) for cell in (f"{a} → {b}", how, *(f"{measured[f'r{n}_{a}_{b}']:.3f}" for n in k))])
    return f"Retrieval among {count} items of the other modality", rows


def query_flops(experiment, read, per_candidate: float, count: int) -> float:
    """FLOPs with which an item of one modality ranks `count` items of another one that were read before, mean over the
    modalities: those of reading it, by read(params, variables, {X: items [B, …]}), and those of each candidate."""
    state, table = experiment.abstract_state, experiment.layout.modalities
    names = experiment.model.encoders
    items = {n: jax.ShapeDtypeStruct((1, *table[n].item_shape), jax.numpy.dtype(table[n].dtype)) for n in names}
    return flops.count(read, state.params, state.variables, items) / len(items) + per_candidate * count


def _mapped(image: np.ndarray, heat: np.ndarray) -> list[tuple]:
    """An image float[H, W, C] beside its map float[rows, columns]."""
    shown = image if image.shape[-1] in (1, 3) else image.mean(axis=-1, keepdims=True)
    size = image.shape[0] // heat.shape[0], image.shape[1] // heat.shape[1]
    return [("image", shown), ("image", np.kron(heat / heat.max(), np.ones(size)))]


def picture(embeddings: Mapping[str, np.ndarray], method: str) -> np.ndarray:
    """Embeddings in the plane, a colour for each modality, some partners joined: float[H, W, 3] in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = np.concatenate(list(embeddings.values()))
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise UserError("config.eval.retrieval.picture='umap' needs the package umap-learn") from error
        flat = UMAP(random_state=0).fit_transform(x)
    else:
        from sklearn.decomposition import PCA

        flat = PCA(2, random_state=0).fit_transform(x)
    parts = np.split(flat, len(embeddings))
    drawing = Figure(figsize=(6, 5), dpi=120, layout="constrained")
    axes = drawing.add_subplot()
    for row in range(0, len(parts[0]), max(1, len(parts[0]) // 30)):
        axes.plot(*np.stack([part[row] for part in parts]).T, color="#bbbbbb", linewidth=0.6, zorder=1)
    for name, part in zip(embeddings, parts):
        axes.scatter(*part.T, s=10, label=name, zorder=2)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255.0
