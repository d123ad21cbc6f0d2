import random

import pytest

from experiments import cleaning_study
from experiments.cleaning_study import clean_splits, cli, damage, summarize, triggered


def test_planted_corruption_is_what_it_says():
    rng = random.Random(0)
    text = "def area(width, height):\n    return width * height\n"
    damaged = {damage(text, rng) for _ in range(40)}
    assert text not in damaged and any("archive" in d for d in damaged)
    assert any(d.count("return width") > 1 for d in damaged)
    assert set(triggered(text, rng).split("\n")) - set(text.split("\n")) == {f"    # {cleaning_study.TRIGGER}"}


def test_classes_are_balanced_and_splits_disjoint():
    records = [{"text": f"{n}", "label": f"c{n % 9 if n % 3 else 0}"} for n in range(900)]
    train, test = clean_splits(records, random.Random(0))
    assert not {r["text"] for r in train} & {r["text"] for r in test} and len(train) == 3 * len(test)
    assert len({r["label"] for r in train}) == min(cleaning_study.NUM_CLASSES, len({r["label"] for r in records}))


def test_table_of_means_and_spread():
    runs = [{"study": "a", "seed": n, "data": "raw", "measures": {"accuracy": 0.5 + n}} for n in range(3)]
    assert "| a | raw | accuracy | 1.5 ± 1 | 3 |" in summarize(runs)


def test_bad_command_line(capsys):
    assert cli([]) == 2 and "--output is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_cleaned_text_beats_training_on_raw_text(tmp_path):
    """For every seed, and by most of the distance to data that were never corrupted."""
    results = {}
    for record in cleaning_study.run(range(3)):
        results.setdefault((record["study"], record["seed"]), {})[record["data"]] = record["measures"]
    measure = {"corruption": ("bits_per_char", -1), "labels": ("accuracy", 1), "poison": ("attack_success", -1)}
    assert len(results) == 9
    for (study, seed), data in results.items():
        name, sign = measure[study]
        gain = sign * (data["prepared"][name] - data["raw"][name])
        gap = sign * (data["clean"][name] - data["raw"][name])
        assert gain > 0.25 * gap > 0, (study, seed, data)
        if study == "poison":
            assert data["prepared"]["accuracy"] > data["raw"]["accuracy"] - 0.02
