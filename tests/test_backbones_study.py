"""The study of the families of backbones: what is matched, the same text for all, table and figure."""

import pytest

from configs import backbones as config
from experiments import backbones as study
from vfm.data.construct import construct
from vfm.data.corrupted import CORRUPTIONS, capacity
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.plan import analytic
from vfm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer(config.SPECIAL)


@pytest.fixture(scope="module")
def cost():
    """{model: (parameters, FLOPs of a training step)}"""
    found = {}
    for name in config.MODELS:
        c = config.get_config("" if name == "decoder_only" else name)
        measured = analytic(Experiment(c))
        found[name] = measured["parameters.total"], measured["flops.step"]
    return found


@pytest.mark.parametrize("name", config.MODELS)
def test_models_are_matched_in_flops_or_in_parameters(name, cost):
    parameters, work = (a / b for a, b in zip(cost[name], cost["decoder_only"]))
    if name != "small_encoder_decoder":
        assert work == pytest.approx(1, abs=study.TOLERANCE)
    if name not in ("encoder_decoder", "infilling"):
        assert parameters == pytest.approx(1, abs=study.TOLERANCE)
    # The price of the match: an encoder–decoder has more parameters for its FLOPs.
    if name == "encoder_decoder":
        assert parameters > 1.5
    if name == "small_encoder_decoder":
        assert work < 0.6


@pytest.mark.parametrize("name", config.MODELS)
def test_rows_of_all_models_hold_the_same_text(name):
    c = config.get_config("" if name == "decoder_only" else name)
    assert (c.train.steps, c.train.batch_size) == (300, 16)
    length = c.data.length
    kind = construct("corruption", CORRUPTIONS, c.data.corruption, length=length, tokenizer=TOKENIZER)
    assert (length if kind.framed else capacity(kind.room, length, kind.least, kind.name)) == config.LENGTH
    assert c.eval.probe.length == c.eval.continuation.length == 96
    assert set(c.model.backbone) - {"embedding_norm"} == {"name", "depth", "mlp_dim", *config.LAYERS}


def test_every_model_with_every_seed():
    c = config.get_config()
    found = study.runs(c.study)
    assert [run["seed"] for run in found] == [seed for seed in range(3) for _ in config.MODELS]
    assert found[-1] == {**config.MODELS["infilling"], "seed": 2}
    with pytest.raises(UserError, match="unknown model 'encoder-only' in config.study.models; did you mean"):
        study.runs({"models": ("encoder-only",), "seeds": 1})
    with pytest.raises(UserError, match="config.study.seeds=0 must be at least 1"):
        study.runs({"models": ("encoder_only",), "seeds": 0})


def records():
    """Of two models with two seeds, and of a third with one."""

    def record(name, seed, parameters, flops, accuracy, bits):
        overrides = {**config.MODELS[name], "seed": seed}
        backbone, corruption = overrides["model.backbone"], overrides["data.corruption"]
        metrics = {
            "probe_accuracy": accuracy,
            "probe_random_accuracy": 0.4,
            "probe_majority": 0.2,
            "continuation_bits_per_byte": bits,
            "continuation_flops_per_byte": 1e6,
        }
        c = {"model": {"backbone": backbone}, "data": {"corruption": corruption}, "seed": seed}
        return {"run": f"{name}{seed}", "parameters": parameters, "flops": flops, "metrics": metrics, "config": c}

    return [
        record("encoder_decoder", 0, 190, 1040, 0.7, 2.0),
        record("decoder_only", 0, 100, 1000, 0.5, 1.5),
        record("small_encoder_decoder", 0, 102, 520, 0.6, 2.5),
        record("encoder_decoder", 1, 190, 1040, 0.8, 2.2),
        record("decoder_only", 1, 100, 1000, 0.5, 1.7),
    ]


def test_the_table_has_a_row_for_each_model():
    rows = {row["model"]: row for row in study.summarize(records())}
    assert list(rows) == [
        "encoder-decoder, span corruption, 4 + 4 layers",
        "decoder-only, next token, 4 layers",
        "encoder-decoder, span corruption, 2 + 2 layers",
    ]
    large, decoder, small = rows.values()
    assert [row["matched in"] for row in rows.values()] == ["FLOPs", "parameters and FLOPs", "parameters"]
    assert (large["× parameters"], large["× FLOPs"], large["seeds"], small["seeds"]) == (1.9, 1.04, 2, 1)
    assert str(large["understanding: accuracy ↑"]) == "0.750 ± 0.071" and str(large["untrained"]) == "0.4"
    assert str(decoder["generation: bits per byte ↓"]) == "1.60 ± 0.14"
    assert str(small["generation: bits per byte ↓"]) == "2.5"


def test_a_run_without_a_score_is_named():
    found = records()
    del found[1]["metrics"]["probe_accuracy"]
    with pytest.raises(UserError, match="run decoder_only0 has no probe_accuracy: .*evaluators=probe,continuation"):
        study.summarize(found)


def test_the_figure_shows_all_models_and_both_scores():
    drawing = study.figure(study.summarize(records()))
    understanding, generation, *costs = drawing.axes
    assert [bar.get_width() for bar in understanding.patches] == pytest.approx([0.75, 0.5, 0.6])
    assert [bar.get_width() for bar in generation.patches] == pytest.approx([2.1, 1.6, 2.5])
    assert [bar.get_width() for axes in costs for bar in axes.patches] == pytest.approx([1.04, 1, 0.52, 1.9, 1, 1.02])
    assert understanding.get_yticklabels()[0].get_text() == "encoder-decoder\nspan corruption\n4 + 4 layers"
    drawing.canvas.draw()
