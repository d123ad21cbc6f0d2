"""The contrastive study: its grid, and its table from records."""

import itertools

import jax
import pytest

from configs import contrastive
from experiments import contrastive as study
from experiments.records import Spread, markdown
from experiments.study import resolve
from vfm import model as model_lib
from vfm import objectives
from vfm.errors import UserError
from vfm.run import run

SETTINGS = {"schemes": (), "seeds": 2, "variation_seeds": 1}


def test_every_run_is_a_model_with_its_objective():
    base = contrastive.get_config("smoke")
    with base.unlocked():
        del base.study
    found = study.runs(SETTINGS)
    assert len(found) == 2 * len(study.SCHEMES) + len(study.VARIATIONS)
    for overrides in found:
        config = resolve(base, overrides)
        model = model_lib.build(config.model)
        objectives.build(config.objective, model)
        assert {name for pair in config.data.pairs for name in pair.split("-")} == set(model.encoders)
        assert (model.backbone is None) == (config.objective.name == "contrastive")


def test_centres_pair_all_others_with_it_alone():
    for name in contrastive.MODALITIES:
        pairs = study.SCHEMES[f"centre {name}"]["objective.pairs"]
        assert len(pairs) == 2 and all(name in pair.split("-") for pair in pairs)
        shuffled = study.SCHEMES[f"centre {name}, shuffled"]["data.shuffled"]
        assert len(shuffled) == 1 and shuffled[0] in pairs


@pytest.mark.slow
def test_a_fusion_encoder_finds_what_belongs_together(tmp_path):
    base = contrastive.get_config()
    with base.unlocked():
        del base.study
    base.train.steps = 200
    found = run(resolve(base, study.SCHEMES["fusion, all pairs"]), str(tmp_path), jax.devices()[:1])
    for a, b in itertools.permutations(contrastive.MODALITIES, 2):
        assert found[f"r1_{a}_{b}"] > 0.3  # chance: 0.01


def record(name, seed, score):
    base = contrastive.get_config()
    with base.unlocked():
        del base.study
    overrides = study.ALL[name]
    config = resolve(base, overrides).to_dict()
    known = {n for pair in config["data"]["pairs"] for n in pair.split("-")}
    metrics = {f"r1_{a}_{b}": score for a, b in itertools.permutations(sorted(known), 2)}
    return {
        "run": f"{name}{seed}",
        "overrides": {**overrides, "seed": seed},
        "metrics": {**metrics, "query_flops": 5.0},
        "flops": 7,
        "config": config,
    }


def test_the_table_marks_what_is_emergent_and_divides_by_direct_training():
    records = [record("centre text", 0, 0.4), record("centre text", 1, 0.6), record("image-audio alone", 0, 0.8)]
    records += [
        record("all pairs", 0, 0.9),
        record("centre text, shuffled", 0, 0.1),
        record("fusion, all pairs", 0, 0.7),
    ]
    table = {row["scheme"]: row for row in study.summarize(records)}
    assert list(table) == [
        "all pairs",
        "centre text",
        "image-audio alone",
        "fusion, all pairs",
        "centre text, shuffled",
    ]
    centre = table["centre text"]
    assert isinstance(centre["image → audio"], study.Emergent) and isinstance(centre["audio → image"], study.Emergent)
    assert type(centre["image → text"]) is Spread and centre["image → text"].mean == pytest.approx(0.5)
    assert str(centre["image → audio"]) == "0.50 ± 0.14 *"
    assert centre["emergent ÷ direct"] == "0.62" and centre["paired sets"] == 2 and centre["seeds"] == 2
    assert table["image-audio alone"]["image → text"] == "–" and table["all pairs"]["emergent ÷ direct"] == "–"
    assert centre["FLOPs per query"] == 5.0 and table["fusion, all pairs"]["paired sets"] == 3
    assert "0.50 ± 0.14 *" in markdown(list(table.values()))
    assert study.figure(list(table.values())).axes


@pytest.mark.parametrize(
    "changes, message",
    [({"schemes": ("centre txt",)}, "unknown scheme 'centre txt'.*did you mean"), ({"seeds": 0}, "seeds=0 must be")],
)
def test_bad_settings_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        study.runs(SETTINGS | changes)
