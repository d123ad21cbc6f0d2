"""What `config.plan` adds to a plan: time, compute-optimal N and D, data that repeat, the tier of customisation."""

import json
import types

import numpy as np
import pytest

from tests import tiny
from vfm import budget, scaling_laws
from vfm import plan as plan_lib
from vfm.errors import UserError
from vfm.experiment import Experiment

E, A, B, ALPHA, BETA = 1.5, 50.0, 100.0, 0.35, 0.3


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    """A machine that is always as fast."""
    monkeypatch.setattr(budget, "matmul_rate", lambda width, rows: 2e9)


@pytest.fixture(scope="module")
def found():
    """The plan of the tiny language model without `config.plan`."""
    return plan_lib.analytic(Experiment(tiny.get_config("text")))


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    """A file of a joint law and of gaps, 6 N D FLOPs, that a study could have written."""
    rng = np.random.default_rng(0)
    noise = lambda values: values * np.exp(0.001 * rng.normal(size=values.shape))
    n, d = (values.ravel() for values in np.meshgrid(np.geomspace(1e4, 1e6, 6), np.geomspace(1e5, 1e8, 6)))
    joint = scaling_laws.fit("chinchilla", {"N": n, "D": d}, noise(E + A / n**ALPHA + B / d**BETA), draws=200)
    ratio, epochs = (values.ravel() for values in np.meshgrid(np.geomspace(0.1, 100, 4), np.geomspace(2, 64, 4)))
    gap = scaling_laws.fit("product", {"D_over_N": ratio, "epochs": epochs}, noise(0.01 * epochs / ratio), draws=200)
    folder = tmp_path_factory.mktemp("laws")
    scaling_laws.save(folder / "laws.json", {"joint": joint, "gap": gap}, count="total", about={"study": "a test"})
    scaling_laws.save(folder / "joint.json", {"joint": joint}, count="non_embedding")
    scaling_laws.save(folder / "gap.json", {"gap": gap}, count="total")
    line = scaling_laws.fit("chinchilla", {"N": n[:8], "D": 20 * n[:8] * np.arange(1, 9)}, 2 + 0.1 * rng.random(8))
    scaling_laws.save(folder / "vague.json", {"joint": line}, count="total")
    return folder


MEMORY = {
    "memory.parameters": 4e6, "memory.gradients": 4e6, "memory.optimizer": 8e6, "memory.ema": 0.0,
    "memory.batch": 1e5, "memory.variables": 0.0, "memory.temporaries": 12e6,
}  # fmt: skip


def plan(found, **settings):
    """(numbers, the printed rows as one text)."""
    c = tiny.get_config("text")
    c.plan.update(settings)
    numbers, rows = budget.plan(
        Experiment(c), {**found, **MEMORY, "flops.executed": 1e9}, plan_lib._si, plan_lib._bytes
    )
    assert all(isinstance(value, int | float) for value in numbers.values())
    return {name.removeprefix("budget."): value for name, value in numbers.items()}, "\n".join(
        "|".join(r) for r in rows
    )


def surface(n, d):
    return E + A / n**ALPHA + B / d**BETA


def test_the_best_n_and_d_of_a_budget(found, laws):
    numbers, text = plan(found, law=str(laws / "laws.json"), budget=1e14, accelerator="H100", utilisation=0.5)
    n, d = numbers["n"], numbers["d"]
    assert 6 * n * d == pytest.approx(1e14)
    best = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (1e14 / 6) ** (BETA / (ALPHA + BETA))
    assert numbers["n_low"] < best < numbers["n_high"] and n == pytest.approx(best, rel=0.05)
    assert numbers["loss_low"] < surface(n, d) < numbers["loss_high"]
    assert numbers["beyond"] == 1 and numbers["flops_per_second"] == 0.5 * 989e12 * 8  # the mesh has 8 devices
    assert numbers["optimal_seconds"] == pytest.approx(1e14 / (0.5 * 989e12 * 8))
    steps, batch = numbers["optimal_steps"], found["step.tokens"]
    assert steps * numbers["optimal_step_seconds"] == pytest.approx(numbers["optimal_seconds"])
    assert steps == pytest.approx(d / batch)
    ratio = n / found["parameters.total"]
    assert numbers["optimal_memory"] == pytest.approx(16e6 * ratio + 8e6 * ratio ** (2 / 3) + 1e5)
    assert "epochs" not in numbers and "beyond" not in text.split("this run, by the law")[0]
    assert numbers["step_seconds"] == 1e9 / numbers["flops_per_second"]
    assert numbers["seconds"] == pytest.approx(numbers["step_seconds"] * tiny.STEPS)


def test_without_a_budget_it_is_that_of_the_run_and_the_cpu_is_timed(found, laws):
    numbers, text = plan(found, law=str(laws / "joint.json"))
    assert numbers["flops"] == found["flops.step"] * tiny.STEPS
    assert numbers["flops_per_second"] == budget.UTILISATION["cpu"] * 2e9 and "measured in matrix products" in text
    n, d = found["parameters.non_embedding"], found["step.tokens"] * tiny.STEPS
    assert numbers["this_loss_low"] < surface(n, d) < numbers["this_loss_high"]
    beyond = max(1e4 / n, 1e5 / d)
    assert beyond > 1 and numbers["this_beyond"] == pytest.approx(beyond)
    assert f"{numbers['this_beyond']:.3g} × beyond the measured range" in text


def test_extrapolation_is_told(found, laws):
    numbers, text = plan(found, law=str(laws / "laws.json"), budget=1e18)
    assert numbers["beyond"] == pytest.approx(1e18 / (6 * 1e6 * 1e8))
    assert f"of config.plan; {numbers['beyond']:.3g} × beyond the measured range" in text
    width = lambda name: numbers[f"{name}_high"] / numbers[f"{name}_low"]
    inside, _ = plan(found, law=str(laws / "laws.json"), budget=1e14)
    assert width("n") > inside["n_high"] / inside["n_low"] and width("loss") > inside["loss_high"] / inside["loss_low"]


def test_data_that_repeat(found, laws):
    settings = {"law": str(laws / "laws.json"), "budget": 1e14}
    plenty, text = plan(found, **settings, tokens=1e10)
    assert plenty["epochs"] < 1 and "gap" not in plenty and "no token is seen twice" in text
    few, text = plan(found, **settings, tokens=plenty["d"] / 8)
    assert few["epochs"] == pytest.approx(8)
    ratio = few["d"] / 8 / few["n"]
    assert few["gap_low"] < 0.01 * 8 / ratio < few["gap_high"]
    once = 1e14 / (6 * plenty["d"] / 8)
    line = next(line for line in text.splitlines() if "each token once" in line)
    assert float(line.split("|")[1]) == pytest.approx(surface(once, plenty["d"] / 8), rel=0.01)
    _, text = plan(found, law=str(laws / "joint.json"), budget=1e14, tokens=1e6)
    assert "train–validation gap|not measured" in text


def test_the_tier_by_what_the_model_needs(found, laws):
    path = str(laws / "laws.json")
    n = found["parameters.total"]
    need = scaling_laws.compute_optimal_tokens(scaling_laws.load(path).laws["joint"], n).value
    tier = lambda compute, data: plan(found, law=path, budget=6 * n * need * compute, tokens=need * data)[0]["tier"]
    assert tier(1.01, 1.01) == tier(1.01, 0.26) == 3  # data are seen up to 4 times
    assert tier(0.99, 1.0) == tier(1.01, 0.24) == tier(0.11, 1.0) == 2
    assert tier(0.09, 1.0) == tier(2.0, 0.024) == 1
    _, text = plan(found, law=path, budget=6 * n * need, tokens=need / 100)
    assert "1|keep the whole general model: low cost, low flexibility" in text


def test_what_the_law_does_not_identify_has_no_number(found, laws):
    numbers, text = plan(found, law=str(laws / "vague.json"), budget=1e14, tokens=1e6)
    assert not {"n", "d", "tier", "epochs", "optimal_memory"} & set(numbers)
    assert "parameters N|not identified|" in text and "tier|–|the law does not say" in text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": 1e12}, "need config.plan.law"),
        ({"accelerator": "abacus"}, "accelerator='abacus' has no known peak"),
        ({"accelerator": "H100", "utilisation": 1.5}, "utilisation=1.5 must be 0 or more and at most 1"),
        ({"law": "nowhere.json"}, "cannot read the laws nowhere.json"),
        ({"law": "gap.json"}, "has no joint law of N and D; it has gap"),
        ({"budget": -1.0}, "budget=-1.0 must be 0 or more"),
    ],
)
def test_bad_input(found, laws, settings, message):
    if settings.get("law") == "gap.json":
        settings = {"law": str(laws / "gap.json")}
    with pytest.raises(UserError, match=message):
        plan(found, **settings)


def test_in_the_plan_of_a_run(tmp_path, laws, capsys):
    c = tiny.get_config("text")
    c.plan.update(law=str(laws / "laws.json"), accelerator="cpu")
    found = plan_lib.plan(Experiment(c), tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == found and found["budget.n"] > 0
    out = capsys.readouterr().out
    assert "customisation, table 1 of the survey" in out and "compute-optimal, by" in out


def test_parameters_without_embeddings(found):
    tables = 264 * tiny.WIDTH  # of the encoder, and the head
    assert found["parameters.embeddings"] == 2 * tables
    assert found["parameters.non_embedding"] == found["parameters.total"] - 2 * tables
    assert found["flops.6ND"] == 6 * found["parameters.non_embedding"] * found["step.tokens"]
    shape = lambda *sizes: types.SimpleNamespace(shape=sizes)
    params = {
        "encoders_text": {"embedding": {"embedding": shape(7, 4)}, "reader": {"positions": {"embedding": shape(9, 4)}}},
        "backbone": {"positions": shape(9, 4), "layers": {"attention": {"query": {"kernel": shape(4, 4)}}}},
        "decoders_text": {"head": {"kernel": shape(4, 7), "bias": shape(7)}, "dense": {"kernel": shape(4, 4)}},
        "encoders_image": {"patch": {"kernel": shape(5, 4)}, "codebook": {"embedding": shape(8, 4)}},
    }
    assert plan_lib.non_embedding(params) == 4 * 4 + 4 * 4 + 5 * 4 + 8 * 4


def test_the_speed_of_this_machine_is_measured(monkeypatch):
    monkeypatch.undo()
    assert 1e7 < budget.matmul_rate(64, 256, seconds=0.05) < 1e15


DURATIONS = [(2e-5, "20 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s"), (600, "10 min"), (9000, "2.5 h"), (1e6, "11.6 days")]


@pytest.mark.parametrize("seconds, text", [*DURATIONS, (1e9, "11,574 days")])
def test_durations_are_readable(seconds, text):
    assert budget.duration(seconds) == text
