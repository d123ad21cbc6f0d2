"""The study of in-context learning: its grids, its table, what was expected, and its figures."""

import pytest

from configs import in_context as config
from experiments import in_context as study
from experiments.records import markdown
from experiments.study import resolve
from vfm import tree
from vfm.errors import UserError
from vfm.experiment import Experiment


def base(arg=""):
    c = config.get_config(arg)
    settings = c.study.to_dict()
    del c.study
    return c, settings


@pytest.mark.parametrize("arg, count", [("", 3 * 2 + 2), ("lookup", 3 * 2), ("functions", 3 * 5)])
def test_every_run_is_an_experiment_of_its_task(arg, count):
    c, settings = base(arg)
    found = study.runs(settings)
    assert len(found) == count == len({str(run) for run in found})
    for overrides in found[: len(study.TASKS[settings["task"]][0])]:
        experiment = Experiment(resolve(c, overrides))
        row = experiment.dataset("train").example(0)
        assert row["loss_mask"].sum() > 0 and len(experiment.dataset("test")) >= 512
        assert experiment.model.backbone.depth == overrides["model.backbone.depth"]


def test_one_length_is_that_of_the_config():
    c, _ = base()
    assert c.data.source.block == study.BLOCK and c.data.source.least < study.BLOCK


def test_attention_alone_has_no_mlp():
    names = lambda arg: tree.flatten(Experiment(base(arg)[0]).abstract_state.params["backbone"])
    assert not any("mlp" in name for name in names("")) and any("mlp" in name for name in names("functions"))


def test_an_unknown_task_is_refused():
    settings = base()[1]
    with pytest.raises(UserError, match="unknown task 'induktion' in config.study.task; did you mean 'induction'"):
        study.runs({**settings, "task": "induktion"})


SOURCE = {task: source for source, task in study.SOURCES.items()}
ALL = {  # scheme: (source of its data, overrides)
    name: (SOURCE[task], overrides)
    for task, groups in study.TASKS.items()
    for group in groups
    for name, overrides in group.items()
}


def record(name, seed, late, score, step=None, shots=()):
    metrics = {"late_loss": late, "late_accuracy": 1 - late / 4, "late_exact_match": 0.5, "icl_score": late - 3}
    metrics |= {"induction_score": score, "previous_token_score": 0.3, "loss_from_0": 3.5, "loss_from_48": late}
    metrics |= {"course_late_loss_at_20": 3.5, "course_late_loss_at_100": late}
    if step:
        metrics |= {f"course_{metric}_first_step": step for metric in ("late_loss", "icl_score", "induction_score")}
    for before in ("", "validation_"):
        metrics |= {f"{before}accuracy_{k}_shots": value for k, value in enumerate(shots)}
        metrics |= {f"{before}loss_{k}_shots": 2 - value for k, value in enumerate(shots)}
    return {
        "run": f"{name}{seed}",
        "overrides": {**ALL[name][1], "seed": seed},
        "config": {"data": {"source": {"name": ALL[name][0]}}},
        "metrics": metrics,
        "parameters": 100,
        "flops": 1000,
        "seconds": 10.0,
    }


INDUCTION = [
    record("2 layers", 0, 0.1, 0.8, 260),
    record("1 layer", 0, 2.9, 0.1),
    record("2 layers", 1, 0.2, 0.7, 300),
    record("1 layer", 1, 2.8, 0.1, 780),
]


def test_the_table_has_a_row_for_each_scheme_and_says_when():
    one, two = study.summarize(INDUCTION)
    assert (one["scheme"], two["scheme"]) == ("1 layer", "2 layers")
    assert str(two["late loss"]) == "0.150 ± 0.071" and str(two["step of the head"]) == "280 ± 28"
    assert one["step of the head"] == "780, by 1 of 2"
    assert study.summarize(INDUCTION[:2])[0]["step of the head"] == "never"
    assert markdown([one, two])


def test_equal_overrides_of_two_tasks_are_two_schemes():
    found = record("1 layer, lookup", 0, 2.0, 0.1)
    del found["metrics"]["icl_score"]
    (row,) = study.summarize([found])
    assert row["scheme"] == "1 layer, lookup" and row["step of the ICL score"] == "–" and row["ICL score"] == "–"
    assert {line["that is"] for line in study.expectations([row])} == {"1 layer, lookup: late loss > 1.0"}


def test_what_was_expected_is_of_schemes_and_columns_that_there_are():
    columns = {*study.COLUMNS, *study.STEPS}
    columns |= {f"{of}accuracy, {shots}" for of in ("", "trained ones: ") for shots in ("1 shot", "most shots")}
    for item in study.EXPECTED:
        assert item.scheme in ALL and item.column in columns
        assert not isinstance(item.bound, tuple) or item.bound[0] in columns
        assert (item.sign == 0) == (item.bound is None)


def test_expectations_hold_or_not():
    held = {line["that is"]: line["held"] for line in study.expectations(study.summarize(INDUCTION))}
    assert held["2 layers: late loss < 0.3"] == "yes" and held["1 layer: late loss > 2.0"] == "yes"
    assert held["2 layers: step of the ICL score < step of the head + 60"] == "yes"
    assert held["1 layer: step of the ICL score: never"] == "no"  # one seed was past the level
    worse = [record("2 layers", 0, 0.4, 0.8), record("2 layers", 1, 0.15, 0.1, 300)]
    held = {line["that is"]: line["held"] for line in study.expectations(study.summarize(worse))}
    assert held["2 layers: late loss < 0.3"] == "within the spread"
    assert held["2 layers: induction head > 0.5"] == "no"
    assert held["2 layers: step of the ICL score < step of the head + 60"] == "no"  # not by all seeds


def test_figures_are_drawn_from_the_records_alone(tmp_path):
    rows = study.summarize(INDUCTION)
    assert [bar.get_width() for bar in study.figure(rows).axes[0].patches] == pytest.approx([2.85, 0.15])
    found = study.pictures(INDUCTION, tmp_path / "none")
    assert set(found) == {"course", "positions"}
    lines = found["course"][1].axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in lines][0] == [[20, 3.5], [100, 2.9]] and len(lines) == 4
    several = [record("2 layers, new functions", seed, 0.4, 1.0, 200, (0.1, 0.2, 0.9)) for seed in range(2)]
    table = study.summarize(several)
    assert str(table[0]["accuracy, most shots"]) == str(table[0]["trained ones: accuracy, most shots"]) == "0.9"
    found = study.pictures(several, tmp_path)["shots"][1]
    assert found.axes[0].get_lines()[0].get_xydata().tolist() == [[0, 0.1], [1, 0.2], [2, 0.9]]
    for drawing in (found, study.figure(table)):
        drawing.canvas.draw()
