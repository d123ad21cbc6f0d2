"""The study of scaling: its grid, and what it makes of runs that follow a known law."""

import copy

import numpy as np
import pytest

from configs import scaling as config
from experiments import scaling as study
from experiments.scaling_points import COUNTS, early_stopped, near_best, point_of, unique_tokens
from vfm import scaling_laws as laws
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.plan import analytic

WITHOUT, WITH = COUNTS
EXPONENT = "exponent [95 %]"


def settings(arg="", **changes):
    c = config.get_config(arg)
    c.study.update(changes)
    return c.study


def parameters(size):
    """(without embeddings, with them)"""
    width, depth = size
    mlp = config.backbone("vanilla", *size, 8)["mlp_dim"]
    n = depth * (4 * width**2 + 3 * width * mlp + 2 * width) + width
    return n, n + 2 * config.BYTES * width


def record(run, loss, **metrics):
    """The record of a run of `study.runs`, with a loss."""
    backbone = run["model"]["backbone"]
    size = backbone["width"], backbone["depth"]
    tokens = run["train.steps"] * run["train.batch_size"] * config.LENGTH
    modality, architecture = run["cell"]["modality"], run["cell"]["architecture"]
    data = config.data(modality)
    data["rows"]["train"] = run.get("data.rows.train", 0)
    return {
        "run": str(abs(hash(str(run)))),
        "seed": run["seed"],
        "parameters": parameters(size)[1],
        "flops": tokens * study.flops_per_token(modality, architecture, *size),
        "tokens": tokens,
        "device": "1 × cpu",
        "versions": {"jax": "0"},
        "metrics": {"test_loss": loss, **metrics},
        "config": {
            "cell": run["cell"],
            "model": run["model"],
            "data": data,
            "tokenizer": {"name": "byte"},
            "optimizer": {"learning_rate": run["optimizer.learning_rate"]},
        },
    }


def follow(law, s, noise=1e-3):
    """Records of the grid of settings `s`, whose losses are law(N, unique tokens, tokens, run) with noise."""
    rng, found = np.random.default_rng(0), []
    for run in study.runs(s):
        made = record(run, 1.0)
        unique = unique_tokens(made["config"]) or made["tokens"]
        n = point_of({**made, "metrics": {"test_loss": 1.0, "early_stopping_loss": 1.0}}).n[0]
        loss = law(n, unique, made["tokens"], run) * np.exp(noise * rng.normal())
        gap = {"early_stopping_loss": loss, "early_stopping_gap": 0.5 * made["tokens"] / unique * n / unique}
        made["metrics"] |= {"test_loss": loss} | (gap if run["cell"]["name"] == "data" else {})
        found.append(made)
    return found


def chinchilla(n, unique, tokens, run):
    """A rate that is not the rule's costs 1 %; few passes over little data cost as well."""
    worse = run["optimizer.learning_rate"] != pytest.approx(run["cell"]["rate"]) or run["cell"]["batch"] > 1
    return (0.9 + 12 / n**0.35 + 200 / min(tokens, 4 * unique) ** 0.45) * (1.01 if worse else 1)


@pytest.fixture(scope="module")
def found():
    records = follow(chinchilla, settings(seeds=2))
    return records, {row["law"]: row for row in study.summarize(records)}


def test_the_grid_is_wide_enough():
    s = settings()
    runs = study.runs(s)
    sizes, data, budgets = ([run for run in runs if run["cell"]["name"] == name] for name in study.SWEEPS)
    n = sorted({parameters((r["model"]["backbone"]["width"], r["model"]["backbone"]["depth"]))[0] for r in sizes})
    assert len(n) >= 6 and n[-1] / n[0] >= 100
    assert len({run["data.rows.train"] for run in data}) >= 6
    by_budget = {
        b: {r["model"]["backbone"]["width"] for r in budgets if r["cell"]["budget"] == b} for b, _ in s.budgets
    }
    assert len(by_budget) >= 4 and min(map(len, by_budget.values())) >= 5
    assert {run["seed"] for run in runs} == {0, 1, 2}
    assert len(sizes) == len(n) * (3 + len(s.variations))  # only the first seed has variations
    assert all(run not in runs[:i] for i, run in enumerate(runs))


def test_every_size_sees_the_same_tokens_and_every_budget_is_met():
    s = settings(seeds=1)
    for run in study.runs(s):
        tokens, made = run["train.steps"] * run["train.batch_size"] * config.LENGTH, record(run, 1.0)
        if run["cell"]["name"] == "sizes":
            assert tokens == pytest.approx(s.tokens, rel=2e-3)
        if run["cell"]["name"] == "budgets":
            assert made["flops"] == pytest.approx(run["cell"]["budget"], rel=0.01)
        width = run["model"]["backbone"]["width"]
        assert round(run["optimizer.learning_rate"] * width / 0.4, 6) in (1, 0.5, 2, 1.4)


@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
def test_parameters_and_flops_are_those_of_the_program(architecture):
    c = config.get_config()
    c.model = config.model("text", architecture, 24, 2)
    measured = analytic(Experiment(c))
    per_token = study.flops_per_token("text", architecture, 24, 2)
    assert measured["flops.per_token"] == pytest.approx(per_token, rel=0.01)
    made = {"cell": c.cell, "model": c.model, "data": c.data, "optimizer": c.optimizer}
    made = {"parameters": measured["parameters.total"], "config": made, "run": "", "seed": 0, "flops": 1, "tokens": 1}
    point = point_of({**made, "metrics": {"test_loss": 1.0}})
    assert point.n == (measured["parameters.backbone"], measured["parameters.total"])


def test_modalities_have_data_and_vocabulary_of_their_own():
    runs = study.runs(settings("modalities", seeds=1, variations=()))
    by = {run["cell"]["modality"]: run for run in runs}
    assert {name: run["model"]["decoders"]["text"]["vocab_size"] for name, run in by.items()} == {
        "text": 259, "images": 13, "audio": 259, "logs": 259
    }  # fmt: skip
    assert "data" not in by["text"]  # the config itself has it
    assert {name: by[name]["data"]["of"]["name"] for name in config.OURS[1:]} == {
        "images": "visual_sentences", "audio": "waveform", "logs": "text"
    }  # fmt: skip
    assert "data" not in study.runs(settings("images"))[0]


def test_the_exponents_of_a_known_law_are_found(found):
    _, rows = found
    size = rows[f"L(N) = E + …, N {WITHOUT}"]
    assert size[EXPONENT].low <= 0.35 <= size[EXPONENT].high
    floor = 0.9 + 200 / settings().tokens ** 0.45
    assert size["irreducible loss"].low <= floor <= size["irreducible loss"].high
    joint = rows[f"L(N, D), α of N {WITHOUT}"]
    assert joint[EXPONENT].low <= 0.35 <= joint[EXPONENT].high
    assert joint["irreducible loss"].low <= 0.9 <= joint["irreducible loss"].high
    beta = rows[f"L(N, D), β of D, N {WITHOUT}"][EXPONENT]
    assert beta.low <= 0.45 <= beta.high
    assert rows[f"L(N), N {WITHOUT}"]["ΔAIC, exponential"] > 10
    assert abs(rows[f"L(N) = E + …, N {WITHOUT}"]["largest predicted, error in %"]) < 1
    assert rows["L(D)"][EXPONENT].low > 0
    assert str(rows[f"L(N), N {WITHOUT}"]["cells"]) == "7 cells of 14 runs, 3.52e+03 to 3.74e+05"


def test_isoflop_finds_the_optimum_of_the_law(found):
    """By numbers: the best N of a budget, where tokens follow from what the program costs."""
    _, rows = found
    cells = rows[f"N_opt(C), IsoFLOP, N {WITHOUT}"]["cells"]
    assert len({*cells.budget}) == 4
    widths = np.arange(8, 120, 2)  # of the ladder of the study, whose depth grows with width
    sizes = [(int(w), int(d)) for w, d in zip(widths, np.interp(widths, *zip(*config.LADDER)).round())]
    for point in cells.allocation.points:
        assert not point.reason
        n = np.array([parameters(size)[0] for size in sizes])
        tokens = point.budget / np.array([study.flops_per_token("text", "vanilla", *size) for size in sizes])
        best = n[(12 / n**0.35 + 200 / tokens**0.45).argmin()]
        assert point.n.value == pytest.approx(best, rel=0.35)


def test_a_size_is_moved_by_what_its_best_variation_gains():
    s = settings(sweeps=("sizes",), sizes=config.SIZES[:3], variations=((0.5, 1), (2.0, 1)))

    def law(n, unique, tokens, run):
        """For the smallest size twice the rate is 5 % better; seeds differ by 1 %."""
        times = run["optimizer.learning_rate"] / run["cell"]["rate"]
        better = 0.95 if times > 1.9 and n < 5000 else 1.1 if times != pytest.approx(1) else 1
        return n**-0.1 * better * (1 + 0.01 * run["seed"])

    points = [point_of(r) for r in follow(law, s, noise=0)]
    moved, best = near_best(points)
    assert len(moved) == 9
    assert [name for name, _ in best.values()] == ["rate × 2, batch × 1", "the rule", "the rule"]
    for point in moved:
        better = 0.95 if point.n[0] < 5000 else 1
        assert point.loss == pytest.approx(point.n[0] ** -0.1 * better * (1 + 0.01 * point.seed))


def test_the_best_number_of_passes_counts():
    s = settings(sweeps=("data",), seeds=1)
    points = [point_of(r) for r in follow(lambda n, unique, tokens, run: 1 + abs(tokens - 5e5) / 5e6, s, noise=0)]
    best = early_stopped(points)
    assert len(best) == len(s.data.rows) < len(points)
    for point in best:
        tokens = [p.tokens for p in points if p.rows == point.rows]
        assert point.tokens == min(tokens, key=lambda t: abs(t - 5e5))


def test_what_held_and_what_did_not(found):
    records, rows = found
    held = {row["expected"]: row["held"] for row in study.expectations(list(rows.values()))}
    assert held["… and no exponential one, ΔAIC > 10"] == "yes"
    assert held["L(N) of text, vanilla falls"] == held["L(D) of text, vanilla falls"] == "yes"
    rising = follow(lambda n, *_: 1 + n / 1e5, settings(seeds=1, sweeps=("sizes",)), noise=0)
    held = {row["expected"]: row["held"] for row in study.expectations(study.summarize(rising))}
    assert held["L(N) of text, vanilla: a power law, R² ≥ 0.98"] == "no"
    assert held["L(N) of text, vanilla falls"] == held["… that predicts the largest model within 2 %"] == "no"


def test_architectures_are_compared_with_the_vanilla_one():
    s = settings("architectures", seeds=1, variations=())
    steep = {"vanilla": 0.08, "windowed": 0.05, "convolution": 0.12}
    table = study.summarize(follow(lambda n, u, t, run: n ** -steep[run["cell"]["architecture"]], s))
    held = {row["expected"]: row["held"] for row in study.expectations(table)}
    assert held["text: vanilla scales at least as steeply as windowed"] == "yes"
    assert held["text: vanilla scales at least as steeply as convolution"] == "no"
    alike = study.summarize(follow(lambda n, *_: n**-0.08, s, noise=0.02))
    held = {row["expected"]: row["held"] for row in study.expectations(alike)}
    assert held["text: vanilla scales at least as steeply as windowed"] == "cannot be told"
    found = {row["architecture"]: row[EXPONENT].value for row in table if row["law"] == f"L(N), N {WITHOUT}"}
    assert found == {name: pytest.approx(value, rel=0.05) for name, value in steep.items()}


def test_the_figure_shows_every_sweep(found):
    drawing = study.figure(list(found[1].values()))
    titles = [axes.get_title() for axes in drawing.axes]
    assert len(titles) == 5 and titles[0].startswith("Size") and titles[1].startswith("Data")
    size, data, compute, *_ = drawing.axes
    assert len(size.lines[0].get_xdata()) == 14 and len(data.lines[0].get_xdata()) == 12
    assert len(compute.lines) == 2 * 4
    drawing.canvas.draw()
    only = study.summarize([r for r in found[0] if r["config"]["cell"]["name"] == "data"])
    assert [axes.get_title()[:4] for axes in study.figure(only).axes] == ["Data"]


def test_the_laws_are_a_file_that_the_planner_reads(found, tmp_path):
    ((name, content),) = study.files(found[0]).items()
    assert name == "laws_text_vanilla.json"
    (tmp_path / name).write_bytes(content)
    read = laws.load(tmp_path / name)
    assert {*read.laws} == {"N", "D", "C", "joint", "gap"} and read.count == "total"
    made = found[0][3]
    expected = made["metrics"]["test_loss"]
    assert read.laws["N"].predict({"N": made["parameters"]}).value == pytest.approx(expected, rel=0.05)
    assert made["flops"] == pytest.approx(read.flops * made["parameters"] * made["tokens"], rel=0.3)
    assert read.laws["gap"].parameters["beta"].value < 0  # more passes, more of a gap


def test_too_few_cells_are_said_and_not_fitted():
    s = settings("smoke")
    rows = {row["law"]: row for row in study.summarize(follow(chinchilla, s))}
    assert "needs at least 3 cells" in rows["L(D)"]["note"] and rows["L(D)"][EXPONENT] == ""
    assert "has 4 sizes" in rows[f"N_opt(C), IsoFLOP, N {WITHOUT}"]["note"]
    study.figure(list(rows.values())).canvas.draw()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modalities": ("txt",)}, "unknown modalities 'txt' in config.study.modalities"),
        ({"architectures": ("mixer",)}, "unknown architectures 'mixer' in config.study.architectures"),
        ({"sweeps": ("size",)}, "unknown sweeps 'size' in config.study.sweeps; did you mean 'sizes'"),
        ({"seeds": 0}, "config.study.seeds=0 must be at least 1"),
        ({"rate": 0.0}, "config.study.rate=0.0 must be positive"),
        ({"budgets": ((0.0, config.SIZES),)}, "a budget of 0.0 FLOPs must be positive"),
    ],
)
def test_bad_settings_end_in_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        study.runs(settings(**changes))


def test_a_run_without_its_loss_is_named(found):
    broken = copy.deepcopy(found[0])
    bad = next(r for r in broken if r["config"]["cell"]["name"] == "data")
    del bad["metrics"]["early_stopping_loss"]
    with pytest.raises(UserError, match=f"run {bad['run']} has no early_stopping_loss; .*evaluators=early_stopping"):
        study.summarize(broken)
