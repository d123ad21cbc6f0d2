"""The study of output sides: its grid, and its table from records."""

import pytest

from configs import output_projection
from experiments import output_projection as study
from experiments.records import Spread, markdown
from experiments.study import resolve
from vfm import model as model_lib
from vfm import objectives
from vfm.errors import UserError

SETTINGS = {"schemes": tuple(output_projection.SCHEMES), "seeds": 2, "first": "somewhere"}


def test_every_run_is_a_model_with_its_objective():
    base = output_projection.get_config()
    with base.unlocked():
        del base.study
    found = study.runs(SETTINGS)
    assert len(found) == 2 * len(output_projection.SCHEMES) and [run["seed"] for run in found] == [0] * 4 + [1] * 4
    for overrides in found:
        config = resolve(base, overrides)
        objectives.build(config.objective, model_lib.build(config.model))
        starts = config.model.decoders.image.name == "var"
        assert (config.init.path, bool(config.init.match), bool(config.optimizer.frozen)) == (
            "somewhere" if starts else "",
            starts,
            starts,
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schemes": ("dit",)}, "unknown scheme 'dit'"),
        ({"seeds": 0}, "config.study.seeds=0"),
        ({"first": ""}, "config.study.first='' must be the folder of a run of configs/output_projection.py:first"),
    ],
)
def test_bad_settings_are_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        study.runs({**SETTINGS, **changes})


def record(name, seed, score):
    base = output_projection.get_config()
    with base.unlocked():
        del base.study
    overrides = {**output_projection.SCHEMES[name], "seed": seed}
    metrics = {metric: score for metric in study.COLUMNS.values()} | {"text_to_image_seconds": score / 1000}
    frozen = {"parameters_frozen": 150} if name == "var" else {}
    return {
        "run": f"{name}{seed}",
        "parameters": 250 if name == "var" else 200,
        "flops": 30 if name == "var" else 20,
        "metrics": {**metrics, **frozen},
        "config": resolve(base, overrides).to_dict(),
    }


def test_the_table_counts_what_learns_and_spreads_over_seeds():
    records = [record("discriminative", 0, 0.4), record("var", 0, 0.8), record("discriminative", 1, 0.6)]
    rows = study.summarize([*records, record("flow", 0, 0.9)])
    assert [row["output side"] for row in rows] == [
        "projector, discriminative decoder",
        "next-scale prediction",
        "flow matching, cross-attention",
    ]
    assert [row["seeds"] for row in rows] == [2, 1, 1]
    assert [(row["parameters that learn"], row["× parameters"], row["× FLOPs"]) for row in rows] == [
        (200, 1.0, 1.0),
        (100, 0.5, 1.5),
        (200, 1.0, 1.0),
    ]
    assert rows[0]["agreement ↑"] == Spread(0.5, pytest.approx(0.1414, abs=1e-3), 2)
    assert rows[1]["ms per image ↓"].mean == pytest.approx(0.8)
    assert "next-scale prediction" in markdown(rows) and study.figure(rows).axes


def test_a_record_without_the_scores_is_named():
    bad = record("flow", 0, 0.5)
    del bad["metrics"]["text_to_image_agreement"]
    with pytest.raises(UserError, match="run flow0 has no text_to_image_agreement: the study needs"):
        study.summarize([bad])
