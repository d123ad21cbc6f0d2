"""The study of task families: its grid, its table out of records, and what it says of them."""

import numpy as np
import pytest
from scipy import stats

from configs import task_families as config
from experiments import task_families as study
from vfm.data.task_families import choose
from vfm.errors import UserError

STEPS = {kind: tuple(config.source()[kind]) for kind in ("orders", "changes", "starts", "ends")}


def record(k, draw, instruction="given", **scores):
    source = {**config.source(), "families": k, "draw": draw, "instruction": instruction}
    metrics = {f"{lead}{key}": -1.0 for lead in study.ASKED.values() for key in study.SCORES.values()}
    return {"run": f"{k}-{draw}", "config": {"data": {"source": source}}, "metrics": {**metrics, **scores}}


def records(rise=1.0):
    """Exact match that rises with k, from two draws; one control."""
    found = [
        record(k, draw, answer_exact_match=rise * k / 10 + draw / 100, answer_token_accuracy=0.1 * draw)
        for draw in range(2)
        for k in (1, 4, 8)
    ]
    return [*found, *(record(k, 0, "withheld", answer_exact_match=0.01 * k) for k in (1, 4, 8))]


def by_place(table):
    return {(row["instruction"], row["families asked"], row["score"]): row for row in table}


def test_runs_are_draw_by_draw_and_then_the_controls():
    c = config.get_config()
    found = study.runs(c.study)
    assert len(found) == 5 * 5 + 2 * 5
    assert [run["data.source.families"] for run in found[:6]] == [1, 2, 4, 8, 16, 1]
    assert [run["data.source.draw"] for run in found] == [run["seed"] for run in found]
    assert [run["data.source.instruction"] for run in found] == ["given"] * 25 + ["withheld"] * 10
    with pytest.raises(UserError, match="unknown instruction 'without' in config.study.controls"):
        study.runs({**c.study, "controls": ("without",)})
    with pytest.raises(UserError, match="config.study.draws=0 must be at least 1"):
        study.runs({**c.study, "draws": 0})


def test_table():
    rows = by_place(study.summarize(records()))
    row = rows["given", "held out", "exact match"]
    assert (row["k = 4"].mean, row["k = 4"].count) == (pytest.approx(0.405), 2)
    points = [(k, k / 10 + draw / 100) for draw in range(2) for k in (1, 4, 8)]
    assert row[study.RANK] == pytest.approx(stats.spearmanr(*zip(*points)).statistic)
    assert row[study.OF_MEANS] == pytest.approx(1) and row[study.INTERVAL] == "needs 3 draws"
    assert rows["given", "held out", "token accuracy"][study.RANK] == pytest.approx(0)
    assert rows["given", "trained", "log-likelihood"][study.RANK] == "constant"
    assert rows["withheld", "held out", "exact match"][study.INTERVAL] == "needs 3 draws"
    assert [place[1] for place in rows][:4] == ["held out"] * 4 and len(rows) == 2 * 10


@pytest.mark.slow
@pytest.mark.parametrize("slope, draw, noise", [(1, 0.5, 0.5), (0.3, 0.5, 0.5), (0, 0.5, 0.5)])
def test_the_interval_of_the_correlation_covers_that_of_many_draws(slope, draw, noise):
    def groups(rng, draws):
        return [
            [(k, slope * np.log2(k) + level + noise * rng.normal()) for k in (1, 2, 4, 8, 16)]
            for level in draw * rng.normal(size=draws)
        ]

    true = np.mean([study._over(groups(np.random.default_rng(1000 + seed), 40)) for seed in range(20)])
    covered = 0
    for seed in range(200):
        low, high = map(float, study._interval(groups(np.random.default_rng(seed), 5)).split(" to "))
        covered += low <= true <= high
    assert covered >= 0.9 * 200


def test_steps_that_were_seen():
    rows = by_place(study.summarize(records()))
    for k in (1, 8):
        shares = []
        for draw in range(2):
            trained, held = choose(k, 8, draw, 3, STEPS)
            steps = {step for name in trained for step in name.split("+")}
            shares.append(np.mean([all(step in steps for step in name.split("+")) for name in held]))
        assert rows["given", "held out", study.SEEN][f"k = {k}"].mean == pytest.approx(np.mean(shares))
    assert rows["given", "held out", study.SEEN]["k = 1"].mean < rows["given", "held out", study.SEEN]["k = 8"].mean


def test_expectations_can_fail():
    held = lambda table: {row["expected"]: row["held"] for row in study.expectations(table)}
    found = held(study.summarize(records()))
    assert found["exact match of families held out rises with k: Spearman at least 0.9"] == "yes"
    assert found["token accuracy of families held out rises with k: Spearman at least 0.9"] == "no"
    assert found["exact match of families held out, k = 8: higher with the instruction than withheld"] == "yes"
    # A control that stops at fewer families is compared there.
    table = study.summarize([*records(), record(16, 0, answer_exact_match=1.0)])
    assert "exact match of families held out, k = 8: higher with the instruction than withheld" in held(table)
    found = held(study.summarize(records(-1.0)))
    assert found["exact match of families held out rises with k: Spearman at least 0.9"] == "no"
    assert found["exact match of families held out, k = 8: higher with the instruction than withheld"] == "no"


def test_figure_has_all_scores():
    drawing = study.figure(study.summarize(records()))
    assert [axes.get_title() for axes in drawing.axes] == [f"{score} ↑" for score in study.SCORES]
    _, labels = drawing.axes[0].get_legend_handles_labels()
    assert labels == ["held out", "unrelated", "trained", "held out, instruction withheld"]


def test_a_run_without_the_scores_is_refused():
    bad = records()
    del bad[0]["metrics"]["unrelated_answer_exact_match"]
    with pytest.raises(UserError, match="run 1-0 has no unrelated_answer_exact_match: the study needs"):
        study.summarize(bad)
