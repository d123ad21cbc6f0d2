"""The studies of emergence: equal FLOPs, tables and figures of records that are made up, and what is said of them."""

import math

import numpy as np
import pytest

from configs import emergence as config
from experiments import emergence as study
from experiments import grokking
from experiments.records import Spread, markdown
from experiments.study import resolve
from experiments.study import study as run_study
from tests import tiny
from vfm import data, tokenizers
from vfm.data.interleave import Layout
from vfm.errors import UserError
from vfm.evaluate.answers import _dataset
from vfm.experiment import Experiment
from vfm.plan import analytic
from vfm.thresholds import Sigmoid, Threshold
from vfm.workdir import plain


def made(c, module, metrics, parameters=lambda config: config.model.backbone.width**2):
    """Records of all runs of a config, with metrics(config) of each."""
    settings = c.study
    base = c.copy_and_resolve_references()
    del base.study
    found = []
    for number, overrides in enumerate(module.runs(settings)):
        resolved = resolve(base, overrides)
        work = 1e6 * resolved.train.steps * resolved.data.length / 14
        run = {"run": str(number), "overrides": overrides, "seed": resolved.seed, "flops": work}
        found.append(
            run | {"parameters": parameters(resolved), "metrics": metrics(resolved), "config": plain(resolved)}
        )
    return found


# Where each form comes to a half, in examples.
MIDDLES = {"plain": 900, "reversed": 700, "scratchpad": 500}


def score(c):
    source = c.data.source
    match = float(Sigmoid(math.log(MIDDLES[source.form]) + 0.05 * (c.seed - 2), 3.0)(source.examples))
    half = 0.6 if source.form == "scratchpad" else 0.4
    found = {study.MATCH: match, study.LIKELIHOOD: -2 / math.log(source.examples), study.DISTANCE: 1 - match}
    for i in range(1, 12):
        step = c.train.steps * i // 12
        found[f"course_{study.MATCH}_at_{step}"] = match * float(Sigmoid(math.log(half), 6.0)(i / 12))
        found[f"course_{study.LIKELIHOOD}_at_{step}"] = -2.0
        found[f"course_{study.DISTANCE}_at_{step}"] = 0.5
    return found


@pytest.fixture(scope="module")
def records():
    c = config.get_config()
    c.study.series = ("examples",)
    return made(c, study, score)


def test_runs_of_two_series_are_made_once():
    c = config.get_config()
    found = study.runs(c.study)
    settings = c.study
    amounts, widths, digits = (len(settings[name]) for name in ("examples", "widths", "numbers"))
    assert len(found) == settings.seeds * 3 * (amounts + (widths - 1))
    assert len(study.runs({**settings, "series": ("digits", "examples")})) == settings.seeds * 3 * (
        amounts + digits - 1
    )
    assert all(run["seed"] == run["data.source.seed"] for run in found)
    with pytest.raises(UserError, match="did you mean 'examples'"):
        study.runs({**settings, "series": ("example",)})
    with pytest.raises(UserError, match="config.study.seeds=0"):
        study.runs({**settings, "seeds": 0})


@pytest.mark.parametrize("arg, width", [("", 48), ("", 16), ("hops", 64)])
def test_forms_have_equal_flops(arg, width):
    """But for what rounding to checkpoints makes."""
    c = config.get_config(arg)
    c.study.seeds = 1
    if not arg:
        c.study.update(series=("digits",), numbers=(3,), width=width)
    base = c.copy_and_resolve_references()
    del base.study
    found = {}
    for overrides in study.runs(c.study):
        if overrides["data.length"] in found:
            continue
        resolved = resolve(base, overrides)
        found[resolved.data.length] = analytic(Experiment(resolved))["flops.step"] * resolved.train.steps
    assert len(found) == 2
    assert max(found.values()) < 1.03 * min(found.values())


@pytest.mark.parametrize("form", ["plain", "reversed", "scratchpad"])
def test_rows_are_as_long_as_said(form):
    c = config.get_config()
    source = {"name": "addition", "digits": 3, "form": form, "examples": 400}
    length = study.row_length(form, 3)
    build = lambda length: data.build(
        {"name": "questions", "source": source},
        "train",
        layout=Layout(length),
        tokenizer=tokenizers.build(c.tokenizer),
    )
    build(length)
    with pytest.raises(UserError, match="longest row"):
        build(length - 1)


def test_thresholds_of_the_table(records):
    table = study.summarize(records)
    rows = {(row["form"], row["examples"]): row for row in table}
    for form, middle in MIDDLES.items():
        found = rows[form, 1200]["50 % at examples"]
        assert found is rows[form, 300]["50 % at examples"] and found.value == pytest.approx(middle, rel=0.1)
        assert found.low <= middle <= found.high
    assert rows["plain", 300]["50 % at steps"].state == "not reached"
    found = rows["plain", 4800]["50 % at FLOPs"]
    assert found.value == pytest.approx(1e6 * rows["plain", 4800]["50 % at steps"].value)
    assert 0.3 < found.value / (1e6 * rows["plain", 4800]["steps"]) < 0.5
    assert "not reached (>" in markdown(table)


def test_the_survey_beside_what_was_seen(records):
    table = study.summarize(records)
    found = {row["expected"]: row for row in study.expectations(table)}
    row = found["scratchpad is earlier than plain in examples"]
    assert row["held"].startswith("yes, 1.8 times") and row["by"].startswith("the survey")
    assert found["scratchpad is earlier than plain in FLOPs"]["held"].startswith("no: later")
    assert found["reversed is earlier than plain in examples"]["held"].startswith("yes")
    # Numbers of each length by themselves, where a study has several.
    longer = [{**row, "digits": 4} for row in table if row["form"] != "scratchpad"]
    both = [row["expected"] for row in study.expectations([*table, *longer])]
    assert "scratchpad is earlier than plain in FLOPs, numbers of 3 digits" in both
    assert "reversed is earlier than plain in FLOPs, numbers of 4 digits" in both
    assert not any(row.startswith("scratchpad") and "4 digits" in row for row in both)
    jumps = [row for text, row in found.items() if "jumps" in text]
    assert len(jumps) == 3 and all(row["held"] == "yes" for row in jumps)


def test_what_cannot_be_told():
    between, wide = Threshold(5, 4, 6, "found"), Threshold(6, 1, 20, "found")
    nowhere = Threshold(math.nan, math.nan, math.nan, "not identified")
    never = Threshold(math.nan, 10, math.inf, "not reached")
    assert study._earlier(between, wide) == study._earlier(nowhere, between) == "cannot be told"
    assert study._earlier(between, never) == "yes" and study._earlier(never, between) == "no: later"


@pytest.mark.slow
def test_figures(records, tmp_path):
    study.figure(study.summarize(records)).savefig(tmp_path / "one.png")
    for name, (_, drawing) in study.pictures(records, tmp_path).items():
        drawing.savefig(tmp_path / f"{name}.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_hops():
    def metrics(c):
        share = c.data.source.fractions["train"]
        match = float(Sigmoid(math.log(0.15 if c.data.source.chain else 0.4), 4.0)(share))
        return {study.MATCH: match, study.LIKELIHOOD: match - 1, study.DISTANCE: 1 - match}

    c = config.get_config("hops")
    table = study.summarize(made(c, study, metrics))
    assert {(row["form"], row["examples"]) for row in table} == {
        (form, round(share * 20 * 16)) for form in ("direct", "chain") for share in c.study.shares
    }
    assert study.figure(table).axes[-1].get_xlabel() == "examples"  # the only amount; there are no digits
    chain = next(row for row in study.expectations(table) if row["expected"].startswith("chain"))
    assert chain["held"].startswith("yes, 2.7 times")


def shown(c):
    """Chains in front help models of at least width 16 that were trained on others; nothing else helps."""
    chain = 0.9 if c.data.source.both and c.model.backbone.width >= 16 else 0.05
    found = {}
    for lead, match in (("", 0.1), ("chain_shots_", chain)):
        found |= {f"{lead}{study.MATCH}": match + 0.001 * c.seed, f"{lead}{study.LIKELIHOOD}": match - 1}
        found[f"{lead}{study.DISTANCE}"] = 1 - match
        found |= {f"course_{lead}{study.MATCH}_at_{200 * i}": match * i / 12 for i in range(1, 12)}
    return found


def test_prompted():
    c = config.get_config("prompted")
    records = made(c, study, shown)
    table = study.summarize(records)
    assert len(table) == 2 * 2 * len(c.study.widths)
    rows = {(row["form"], row["width"]): row for row in table}
    for name, width, match in (
        ("behind chains", 16, 0.9),
        ("behind chains", 8, 0.05),
        ("behind direct answers", 8, 0.1),
    ):
        assert rows[f"{name}, some chains trained", width]["exact match"].mean == pytest.approx(match, abs=0.002)
    assert rows["behind chains, some chains trained", 64]["50 % at steps"].state == "found"
    assert rows["behind direct answers, some chains trained", 64]["50 % at steps"].state == "not reached"
    found = {row["expected"]: row for row in study.expectations(table)}
    row = found["chains in front of the question help above some scale, where those of other pairs were trained"]
    assert row["held"] == "yes" and row["found"].startswith("3 of 4 models")
    control = found["without any chains in training those in front do not help"]
    assert control["held"] == "yes" and control["found"].startswith("0 of 4 models")
    earlier = [text for text in found if text.startswith("behind chains, some chains trained is earlier")]
    assert len(earlier) == 2 and all(found[text]["held"] == "yes" for text in earlier)
    # The same of models that chains do not help, and of a control that they do.
    for record in records:
        c = resolve(
            config.get_config("prompted"), {"data.source.chain": not record["config"]["data"]["source"]["chain"]}
        )
        with c.unlocked():
            c.data.source.both = c.data.source.chain
            c.model.backbone.width = record["config"]["model"]["backbone"]["width"]
        record["metrics"] = shown(c)
    assert [row["held"] for row in study.expectations(study.summarize(records))][-2:] == ["no", "no"]


def test_chains_in_front_are_never_those_of_the_questions_pairs():
    """And the questions are those of the model's own graph, whatever its seed."""
    c = config.get_config("prompted")
    c.study.update(seeds=2, widths=(8,))
    base = c.copy_and_resolve_references()
    del base.study
    for overrides in study.runs(c.study):
        experiment = Experiment(resolve(base, overrides))
        (asked,) = experiment.config.eval.answers.prompts.values()
        direct, chain = (_dataset(experiment, "test", changes) for changes in ({}, plain(asked)))
        assert [(i["prompt"], i["final"]) for i in direct.items] == [(i["prompt"], i["final"]) for i in chain.items]
        for i in range(len(chain)):
            row = chain.example(i, np.random.default_rng(i))
            words = experiment.tokenizer.decode(row["tokens"][row["input_mask"]]).split()
            ends = [place for place, word in enumerate(words) if word == "="]
            pairs = [tuple(words[end - 2 : end]) for end in ends]
            assert len(pairs) == 3 and pairs[2] not in pairs[:2]
            assert [words[end + 2] for end in ends] == [">"] * 3


def test_several_rates_and_one_seed_are_no_evidence():
    c = config.get_config("rates")
    table = study.summarize(made(c, study, score))
    assert all(row["50 % at FLOPs"].state == "no interval" for row in table if row["form"] == "scratchpad")
    assert not any("earlier" in row["expected"] for row in study.expectations(table))
    # Also where one form has it from the first and the other never.
    c = config.get_config()
    c.study.update(seeds=1, series=("examples",))
    solved = lambda c: {**score(c), study.MATCH: float(c.data.source.form != "plain")}
    rows = study.expectations(study.summarize(made(c, study, solved)))
    assert {row["held"] for row in rows if "earlier" in row["expected"]} == {"cannot be told"}
    c = config.get_config("prompted")
    c.study.seeds = 1
    found = study.expectations(study.summarize(made(c, study, shown)))
    assert [row["held"] for row in found if "jumps" not in row["expected"]] == ["cannot be told"] * 4


def test_a_difference_is_told_only_where_seeds_allow():
    better = lambda a, b: study._better(Spread(*a, 3), Spread(*b, 3), 4)
    assert better((0.9, 0.02), (0.1, 0.02)) and better((0.9, 0.0), (0.1, 0.0))
    assert better((0.1, 0.01), (0.1, 0.01)) is False and better((0.1, 0.0), (0.9, 0.0)) is False
    assert better((0.7, 0.35), (0.05, 0.01)) is None
    assert study._better(Spread(0.9, 0.0, 1), Spread(0.1, 0.0, 1), 4) is None
    # Of equal means, for a noisy score against one that is nearly constant.
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(2000):
        scores = rng.normal(0.0, 0.1, 3), rng.normal(0.0, 0.002, 3)
        wrong += study._better(*(Spread(x.mean(), x.std(ddof=1), 3) for x in scores), 4) is True
    assert wrong < 0.02 * 2000  # 0.05 / 2 / 4 of each


def test_other_ways_to_ask_are_rows_of_their_own(records):
    more = {f"few_{metric}": 0.5 for metric in study.MEASURES.values()}
    asked = [
        {
            **record,
            "metrics": record["metrics"] | more,
            "config": {**record["config"], "eval": {"answers": {"prompts": {"few": {"shots": 3}}}}},
        }
        for record in records
    ]
    rows = [row for row in study.summarize(asked) if row["form"] == "plain, asked as few"]
    assert len(rows) == 5 and all(row["exact match"].mean == 0.5 for row in rows)
    without = [{**record, "config": {**record["config"], "eval": {"answers": {"marker": ">"}}}} for record in records]
    assert len(study.summarize(without)) == len(study.summarize(records))


def test_a_run_without_answers_is_refused(records):
    with pytest.raises(UserError, match="run 0 has no answer_final_match"):
        study.summarize([{**records[0], "metrics": {}}])


def general(c):
    """Learned by heart at step 100; the rule at 1500, with weight decay alone."""
    decays = c.optimizer.weight_decay > 0
    found = {"test_loss": 0.1 if decays else 5.0, "spectrum_top_share": 0.9 if decays else 0.3 + 0.01 * c.seed}
    for step in range(50, c.train.steps, 50):
        found[f"course_train_token_accuracy_at_{step}"] = 1.0 if step >= 100 else 0.7
        found[f"course_answer_exact_match_at_{step}"] = 0.99 if decays and step >= 1500 + 50 * c.seed else 0.05
        found[f"course_loss_at_{step}"] = 2.0
    found["answer_exact_match"] = found[f"course_answer_exact_match_at_{step}"]
    return found | {f"spectrum_{k}": 0.1 for k in range(1, 11)}


def test_delayed_generalisation(tmp_path):
    c = config.get_config("modular")
    c.study.weight_decays = (1.0, 0.0)
    records = made(c, grokking, general)
    table = grokking.summarize(records)
    assert [row["weight decay"] for row in table] == [1.0, 0.0]
    assert table[0]["learned by heart at step"].mean == 100
    assert table[0]["generalises at step"].mean == 1550 and table[1]["generalises at step"] == "never"
    assert [row["held"] for row in grokking.expectations(table)] == ["yes"] * 3
    # Without a seed that generalises, and with a control that does.
    for record in records:
        record["metrics"] = general(
            resolve(c, {"optimizer.weight_decay": float(not record["overrides"]["optimizer.weight_decay"])})
        )
    assert [row["held"] for row in grokking.expectations(grokking.summarize(records))][:2] == ["no", "no"]
    with pytest.raises(UserError, match="no course of the accuracy"):
        grokking.summarize([{**records[0], "metrics": {}}])


@pytest.mark.slow
def test_figures_of_delayed_generalisation(tmp_path):
    records = made(config.get_config("modular"), grokking, general)
    grokking.figure(grokking.summarize(records)).savefig(tmp_path / "one.png")
    grokking.pictures(records, tmp_path)["courses"][1].savefig(tmp_path / "two.png")


@pytest.mark.slow
def test_the_studies_run(tmp_path):
    """Each at a size of nothing, from its config to its table."""
    with tiny.quick_compilation():
        c = config.get_config("smoke")
        c.study.examples = (40,)
        records = run_study(c, str(tmp_path / "sums"))
        assert len(records) == 3
        assert len(study.course(records[0], study.MATCH)) == 2
        c = config.get_config("modular")
        c.study.seeds, c.study.weight_decays = 1, (1.0,)
        c.train.update(steps=4, batch_size=8)
        c.optimizer.schedule.warmup_steps = 1
        c.eval.update(every=2, limit=8, test_limit=8, batch_size=8)
        c.log.every = 2
        (record,) = run_study(c, str(tmp_path / "modular"))
        assert {f"spectrum_{k}" for k in range(1, 24)} <= {*record["metrics"]}
        c = config.get_config("hops")
        c.study.update(seeds=1, steps=4, evaluations=2, shares=(0.5,))
        c.train.batch_size = 8
        c.optimizer.schedule.warmup_steps = 1
        c.eval.update(limit=8, test_limit=8, batch_size=8)
        c.log.every = 2
        records = run_study(c, str(tmp_path / "hops"))
        assert [study._cell(record)["form"] for record in records] == ["direct", "chain"]
        c = config.get_config("prompted")
        c.study.update(seeds=1, steps=4, evaluations=2, widths=(8,))
        c.train.batch_size = 8
        c.optimizer.schedule.warmup_steps = 1
        c.eval.update(limit=8, test_limit=8, batch_size=8)
        c.log.every = 2
        records = run_study(c, str(tmp_path / "prompted"))
        assert len(records) == 2 and all(len(study.course(r, f"chain_shots_{study.MATCH}")) == 2 for r in records)
