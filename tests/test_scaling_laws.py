"""Scaling laws: what was planted is found within its interval, and what is not in the data is not claimed."""

import json
import pathlib

import numpy as np
import pytest

from vfm import scaling_laws
from vfm.errors import UserError
from vfm.scaling_laws.fitting import unpinned
from vfm.scaling_laws.forms import FORMS

FIXTURE = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "functions" / "scaling_laws"
# Hoffmann et al. (2022), equation 10.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def surface(n, d):
    return E + A / np.asarray(n) ** ALPHA + B / np.asarray(d) ** BETA


def noisy(values, noise, rng):
    return values * np.exp(noise * rng.normal(size=np.shape(values)))


def grid(sizes=7, data=6):
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e9, 1e12, data))
    return n.ravel(), d.ravel()


def covered(make, truth, draws=100):
    """The share of `draws` data sets whose interval is identified and holds the truth; make(rng) -> Estimate."""
    found = [make(np.random.default_rng(seed)) for seed in range(draws)]
    return np.mean([estimate.identified and estimate.low <= truth <= estimate.high for estimate in found])


def of_power(cells, noise, floor, rng, alpha=0.3, scale=5e6):
    n = np.geomspace(1e5, 1e8, cells)
    loss = noisy(floor + (scale / n) ** alpha, noise, rng)
    return scaling_laws.fit("floor" if floor else "power", {"N": n}, loss, draws=400, rng=rng)


@pytest.mark.parametrize("cells", (5, 20))
def test_the_exponent_of_a_power_law_lies_in_its_interval(cells):
    # 5 cells: an interval of the normal distribution, or of resampled cells, would hold it 86 times in 100 or less.
    # The law is linear in its parameters, so that noise of another size would give the same.
    assert covered(lambda rng: of_power(cells, 0.01, 0.0, rng).parameters["alpha"], 0.3, draws=300) >= 0.93


@pytest.mark.parametrize(
    "cells, noise",
    [
        (8, 0.003),
        pytest.param(6, 0.001, marks=pytest.mark.slow),
        pytest.param(12, 0.003, marks=pytest.mark.slow),
        pytest.param(20, 0.003, marks=pytest.mark.slow),
        pytest.param(20, 0.01, marks=pytest.mark.slow),
    ],
)
def test_the_exponent_beside_an_irreducible_loss_lies_in_its_interval(cells, noise):
    assert covered(lambda rng: of_power(cells, noise, 1.7, rng).parameters["alpha"], 0.3) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("huber, noise", [(None, 0.001), (None, 0.01), (1e-3, 0.003)])
def test_the_parameters_of_the_joint_law_lie_in_their_intervals(huber, noise):
    n, d = grid()
    hits = dict.fromkeys(("alpha", "beta", "E"), 0)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        loss = noisy(surface(n, d), noise, rng)
        law = scaling_laws.fit("chinchilla", {"N": n, "D": d}, loss, huber=huber, draws=400, rng=rng)
        for name, truth in zip(hits, (ALPHA, BETA, E)):
            found = law.parameters[name]
            hits[name] += found.identified and found.low <= truth <= found.high
    assert min(hits.values()) >= 93


@pytest.mark.parametrize("draws, least", [(12, 10), pytest.param(100, 91, marks=pytest.mark.slow)])
def test_predictions_and_the_best_size_lie_in_their_intervals(draws, least):
    n, d = grid(5, 4)
    budget = 1e23
    best = scaling_laws.compute_optimal(scaling_laws.parametric(n, d, surface(n, d)), budget)
    found = {"n": 0, "loss": 0, "run": 0}
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        law = scaling_laws.fit("chinchilla", {"N": n, "D": d}, noisy(surface(n, d), 0.003, rng), draws=300, rng=rng)
        size = scaling_laws.compute_optimal(law, budget).n
        found["n"] += size.low <= best.n.value <= size.high
        loss = law.predict({"N": 70e9, "D": 1.4e12})
        found["loss"] += loss.low <= surface(70e9, 1.4e12) <= loss.high
        found["run"] += loss.run_low <= noisy(surface(70e9, 1.4e12), 0.003, rng) <= loss.run_high
    assert min(found.values()) >= least
    assert law.predict({"N": 70e9, "D": 1.4e12}).beyond == pytest.approx(7)


def test_seeds_of_a_cell_are_not_independent_evidence():
    n = np.geomspace(1e5, 1e8, 6)

    def make(rng):  # a cell is off the law by 1 %, its seeds by 0.1 % of each other
        cell = noisy((5e6 / n) ** 0.3, 0.01, rng)
        runs = noisy(np.repeat(cell, 5), 0.001, rng)
        return scaling_laws.fit("power", {"N": np.repeat(n, 5)}, runs, draws=400, rng=rng)

    assert covered(lambda rng: make(rng).parameters["alpha"], 0.3, draws=300) >= 0.93
    law = make(np.random.default_rng(0))
    assert len(law.loss) == 6 and law.runs.tolist() == [5] * 6
    assert 0.0005 < law.seed_noise < 0.002 < law.noise


def test_the_published_constants_give_the_published_loss_and_are_recovered():
    n, d = grid()
    law = scaling_laws.parametric(n, d, surface(n, d))
    found = {name: estimate.value for name, estimate in law.parameters.items()}
    truth = {"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}
    assert found == pytest.approx(truth, rel=1e-4)
    loss = law.predict({"N": 70e9, "D": 1.4e12})
    assert loss.value == pytest.approx(1.9366, abs=1e-4)  # Chinchilla: 70 B parameters, 1.4 T tokens
    best = scaling_laws.compute_optimal(law, 6 * 70e9 * 1.4e12)
    # The derivative of the loss along N D = constant vanishes there, and the loss is below that of Chinchilla.
    step = np.array([0.999, 1.001])
    sides = surface(best.n.value * step, best.d.value / step)
    assert (sides > best.loss.value).all() and best.loss.value < loss.value
    assert best.n.value * best.d.value * 6 == pytest.approx(best.budget)
    assert best.a.value == pytest.approx(BETA / (ALPHA + BETA), rel=1e-4)
    assert best.a.value + best.b.value == pytest.approx(1)
    tokens = scaling_laws.compute_optimal_tokens(law, best.n.value)
    assert tokens.value == pytest.approx(best.d.value) and tokens.low <= tokens.value <= tokens.high


def test_the_joint_form_of_kaplan():
    n, d = grid()
    loss = ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095
    law = scaling_laws.fit("kaplan", {"N": n, "D": d}, loss)
    found = {name: estimate.value for name, estimate in law.parameters.items()}
    assert found == pytest.approx({"N_c": 8.8e13, "D_c": 5.4e13, "alpha": 0.076, "beta": 0.095}, rel=1e-4)
    best = scaling_laws.compute_optimal(law, 1e21)
    step = np.array([0.9, 1.1])
    sides = law.evaluate({"N": best.n.value * step, "D": best.d.value / step})
    assert (sides > best.loss.value).all()
    assert best.a.value == pytest.approx(1 / (1 + 0.076 / 0.095), rel=1e-4)
    assert scaling_laws.compute_optimal_tokens(law, best.n.value).value == pytest.approx(best.d.value)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_derivatives(name):
    form, rng = FORMS[name], np.random.default_rng(0)
    u = rng.normal(size=(5, len(form.variables)))
    theta = rng.uniform(0.2, 0.8, len(form.parameters))
    value, slopes = form.predict(theta, u)
    for i in range(len(theta)):
        step = 1e-6 * np.eye(len(theta))[i]
        difference = (form.predict(theta + step, u)[0] - form.predict(theta - step, u)[0]) / 2e-6
        np.testing.assert_allclose(slopes[:, i], difference, rtol=1e-6, atol=1e-8)
    many = form.predict(np.stack([theta, theta + 0.1]), u)[0]
    np.testing.assert_allclose(many[0], value)


@pytest.mark.parametrize("floor", (False, True))
def test_power_law_against_exponential(floor):
    rng, n = np.random.default_rng(0), np.geomspace(1e4, 1e7, 7)
    power = noisy(1.5 * floor + (1e9 / n) ** 0.1, 0.003, rng)
    found = scaling_laws.compare({"N": n}, power, floor=floor)
    assert found.delta_aic > 10 and found.power > 0.99 > found.exponential
    x = np.linspace(1, 30, 10)
    exponential = noisy(1.5 * floor + 2 * np.exp(-0.1 * x), 0.003, rng)
    found = scaling_laws.compare({"D": x}, exponential, floor=floor)
    assert found.delta_aic < -10 and found.exponential > 0.99


def test_an_exponential_is_recovered():
    x = np.linspace(1, 30, 10)
    law = scaling_laws.fit("exponential_floor", {"D": x}, 1.5 + 2 * np.exp(-0.1 * x))
    found = {name: estimate.value for name, estimate in law.parameters.items()}
    assert found == pytest.approx({"E": 1.5, "A": 2, "rate": 0.1}, rel=1e-4)


def test_floor_and_exponent_that_trade_off_are_not_identified():
    n = np.geomspace(1e6, 1e7, 8)
    law = scaling_laws.fit("floor", {"N": n}, noisy(1.7 + (5e6 / n) ** 0.3, 0.02, np.random.default_rng(1)))
    found = law.parameters
    assert not law.identified and not found["alpha"].identified and not found["N_c"].identified
    assert str(found["alpha"]).startswith("not identified (alpha may be anything from")
    # Within the range the law is as good as its points; beyond it is not to be trusted.
    assert law.predict({"N": 3e6}).reason == "" and "×" not in str(law.predict({"N": 3e6}))
    assert str(law.predict({"N": 1e9})) == f"not identified ({found['alpha'].reason}), 100 × beyond the measured range"


def test_a_floor_that_is_not_there_is_not_claimed():
    law = of_power(12, 0.003, 0.0, np.random.default_rng(0))
    with_floor = scaling_laws.fit("floor", {"N": law.x[:, 0]}, law.loss)
    assert with_floor.identified and not with_floor.parameters["E"].identified
    assert "at most" in str(with_floor.parameters["E"])


def test_a_loss_that_depends_on_nothing_has_no_exponent():
    n = np.geomspace(1e5, 1e8, 8)
    law = scaling_laws.fit("power", {"N": n}, noisy(np.full(8, 2.0), 0.01, np.random.default_rng(0)))
    assert "not told from 0" in str(law.parameters["alpha"]) and not law.identified


def test_sizes_and_data_that_grow_together_do_not_part_their_exponents():
    n = np.geomspace(1e6, 1e9, 12)
    loss = noisy(surface(n, 20 * n), 0.002, np.random.default_rng(0))
    law = scaling_laws.fit("chinchilla", {"N": n, "D": 20 * n}, loss)
    assert not law.parameters["alpha"].identified and not law.parameters["beta"].identified
    best = scaling_laws.compute_optimal(law, 1e21)
    assert not best.n.identified and not best.a.identified


def test_the_largest_cell_predicted_from_the_others():
    rng, n = np.random.default_rng(0), np.geomspace(1e4, 1e7, 7)
    loss = noisy((1e9 / np.repeat(n, 3)) ** 0.1, 0.003, rng)
    found = scaling_laws.hold_out("power", {"N": np.repeat(n, 3)}, loss)
    assert abs(found.error) < 0.02 and found.measured == pytest.approx(np.exp(np.log(loss[-3:]).mean()))
    assert found.predicted.beyond == pytest.approx(n[-1] / n[-2])
    loss[-3:] *= 1.1
    assert scaling_laws.hold_out("power", {"N": np.repeat(n, 3)}, loss).error == pytest.approx(
        (1 + found.error) / 1.1 - 1
    )


def isoflop_runs(noise, rng, budgets=5, sizes=7, most=1e21):
    best = lambda c: (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (c / 6) ** (BETA / (ALPHA + BETA))
    compute = np.repeat(np.geomspace(1e18, most, budgets), sizes)
    n = best(compute) * np.tile(np.geomspace(0.25, 4, sizes), budgets)
    return n, compute, noisy(surface(n, compute / (6 * n)), noise, rng), best


@pytest.mark.parametrize("noise", (0.001, 0.003))
def test_isoflop_minima_grow_with_the_exponent_that_was_planted(noise):
    make = lambda rng: scaling_laws.isoflop(*isoflop_runs(noise, rng)[:3], draws=400, rng=rng).exponent
    assert covered(make, BETA / (ALPHA + BETA)) >= 0.93


def test_isoflop_points_are_the_minima():
    n, compute, loss, best = isoflop_runs(0.0003, np.random.default_rng(0))
    found = scaling_laws.isoflop(n, compute * np.random.default_rng(1).uniform(0.99, 1.01, len(n)), loss)
    assert [point.reason for point in found.points] == [""] * 5
    for point in found.points:
        assert point.n.value == pytest.approx(best(point.budget), rel=0.15)
        assert point.d == pytest.approx(point.budget / (6 * point.n.value))
        assert point.loss == pytest.approx(surface(point.n.value, point.d), rel=0.002)
    wider = found.size.predict({"C": 1e23})
    assert wider.beyond == pytest.approx(100, rel=0.01) and wider.low < best(1e23) * 1.1 and wider.high > best(1e23)


def test_a_budget_without_a_minimum_is_left_out_and_says_so():
    n, compute, loss, best = isoflop_runs(0.0003, np.random.default_rng(0))
    small = (compute > 9e20) & (n > 0.5 * best(compute))  # of the largest budget only sizes that are too small
    found = scaling_laws.isoflop(n[~small], compute[~small], loss[~small])
    assert found.points[-1].reason and not found.points[-1].n.identified and found.size is not None
    some = compute > 2e20
    found = scaling_laws.isoflop(n[some], compute[some], loss[some])
    assert found.size is None and "a line needs 3" in str(found.exponent)
    with pytest.raises(UserError, match="none of 5 budgets has 4 sizes"):
        scaling_laws.isoflop(*(values.reshape(5, 7)[:, :3].ravel() for values in (n, compute, loss)))


def curves(sizes, noise, rng):
    """Training curves of constant learning rate: the law itself along D."""
    tokens = np.geomspace(1e7, 1e12, 200)
    n = np.repeat(sizes, 2)
    return n, [6 * size * tokens for size in n], [noisy(surface(size, tokens), noise, rng) for size in n]


def test_the_envelope_of_training_curves():
    sizes = np.geomspace(1e7, 1e10, 10)
    found = scaling_laws.envelope(*curves(sizes, 0.0, np.random.default_rng(0)))
    assert 6 <= len(found.points) <= 8  # the smallest and the largest are overtaken at one end only
    assert found.exponent.value == pytest.approx(BETA / (ALPHA + BETA), rel=0.02)
    assert found.loss.r_squared > 0.97  # there is an irreducible loss
    hits = covered(
        lambda rng: scaling_laws.envelope(*curves(sizes, 0.0005, rng), draws=400).exponent, BETA / (ALPHA + BETA), 20
    )
    assert hits >= 0.85
    few = scaling_laws.envelope(*curves(sizes[:4], 0.0, np.random.default_rng(0)))
    assert few.size is None and "a line needs 3" in str(few.exponent)
    with pytest.raises(UserError, match="there are none"):
        scaling_laws.envelope([], [], [])


def test_a_curve_that_ends_is_not_overtaken():
    """A size stops before it is overtaken: where those beside it are the best is then not known either."""
    sizes = np.geomspace(1e7, 1e10, 10)
    n, compute, loss = curves(sizes, 0.0, np.random.default_rng(0))
    budgets = lambda: {point.n.value: point.budget for point in scaling_laws.envelope(n, compute, loss).points}
    whole = budgets()
    for i in np.flatnonzero(n == sizes[4]):
        stop = np.searchsorted(compute[i], whole[sizes[4]])
        compute[i], loss[i] = compute[i][:stop], loss[i][:stop]
    found = budgets()
    assert {*whole} - {*found} == {*sizes[3:6]}
    assert all(found[size] == pytest.approx(whole[size], rel=0.02) for size in found)


def test_what_an_isoflop_line_does_not_pin_is_said_of_its_own_interval():
    """The interval of the line is that of the simulated minima; the reason is too."""
    rng = np.random.default_rng
    said = []
    for seed, (noise, budgets, most) in enumerate([(0.02, 5, 1e19), (0.01, 3, 1e20), (0.002, 3, 1e21)] * 8):
        n, compute, loss, _ = isoflop_runs(noise, rng(seed), budgets=budgets, most=most)
        found = scaling_laws.isoflop(n, compute, loss, draws=400)
        if found.size is not None:
            exponent = found.exponent
            assert bool(exponent.reason) == bool(unpinned("a", exponent.low, exponent.high)), exponent
            said.append(bool(exponent.reason))
    assert {*said} == {True, False}


@pytest.mark.parametrize(
    "form, x, loss, message",
    [
        ("power", {"N": [1, 2]}, [2, 1], "2 parameters and needs at least 3 cells; there are 2 different N"),
        ("power", {"N": [1, 1, 2, 2]}, [2, 2, 1, 1], "there are 2 different N"),
        ("floor", {"N": [1, 2, 4]}, [3, 2, 1], "needs at least 4 cells"),
        ("power", {"N": [1, 2, 4]}, [3, 2], "3 values of N but 2 losses"),
        ("power", {"N": [1, 2, 4]}, [3, 2, -1], "loss=-1 cannot be"),
        ("power", {"N": [1, 2, 4]}, [3, 2, float("nan")], "loss=nan cannot be"),
        ("power", {"N": [0, 2, 4]}, [3, 2, 1], "N=0 cannot be"),
        ("power", {"N": [1, 2, 4]}, [2, 2, 2], "all losses are equal"),
        ("power", {"N": [1, 2, 4], "D": [1, 2, 4]}, [3, 2, 1], "is of x, not of N, D"),
        ("chinchilla", {"N": [1, 2, 4], "C": [1, 2, 4]}, [3, 2, 1], "is of N, D, not of N, C"),
        ("chinchilla", {"N": [1] * 6, "D": [1, 2, 3, 4, 5, 6]}, [6, 5, 4, 3, 2, 1], "all runs have the same N"),
        ("chinchilla", {"N": [1, 2], "D": [1]}, [1, 2], "2 N, 1 D"),
        ("powr", {"N": [1, 2, 4]}, [3, 2, 1], "did you mean 'power'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(form, x, loss, message):
    with pytest.raises(UserError, match=message):
        scaling_laws.fit(form, x, loss)


def test_laws_are_the_same_after_save_and_load(tmp_path):
    n, d = grid(5, 4)
    law = scaling_laws.parametric(n, d, noisy(surface(n, d), 0.003, np.random.default_rng(0)), draws=50)
    path = tmp_path / "laws.json"
    scaling_laws.save(path, {"joint": law}, count="non_embedding", about={"study": "a test"})
    found = scaling_laws.load(path)
    assert (found.count, found.flops, found.about) == ("non_embedding", 6, {"study": "a test"})
    again = found.laws["joint"]
    assert (again.form, again.variables, again.reasons) == (law.form, law.variables, law.reasons)
    for name, estimate in law.parameters.items():
        assert again.parameters[name][:3] == pytest.approx(estimate[:3], rel=1e-6)
    with pytest.raises(UserError, match="unknown law 'jiont'"):
        scaling_laws.save(path, {"jiont": law}, count="total")
    with pytest.raises(UserError, match="unknown count of parameters 'N'"):
        scaling_laws.save(path, {"joint": law}, count="N")
    whole = json.loads(path.read_text())
    for broken, message in [
        ("{", "is not JSON"),
        ("{}", "is no file of scaling laws"),
        (json.dumps({**whole, "laws": {"joint": {"form": "chinchilla"}}}), "a law is not whole"),
        (json.dumps({**whole, "laws": {"joint": {**whole["laws"]["joint"], "theta": [1.0]}}}), "wrong shapes"),
        (json.dumps({**whole, "laws": {"joint": {**whole["laws"]["joint"], "theta": ["1"] * 5}}}), "are no numbers"),
        (json.dumps({**whole, "laws": {"jiont": whole["laws"]["joint"]}}), "unknown law 'jiont'"),
        (json.dumps({**whole, "count": "totl"}), "did you mean 'total'"),
        (json.dumps({**whole, "flops": 0}), "flops=0.0 must be positive"),
    ]:
        path.write_text(broken)
        with pytest.raises(UserError, match=message):
            scaling_laws.load(path)
    with pytest.raises(UserError, match="cannot read the laws"):
        scaling_laws.load(tmp_path / "nowhere.json")


@pytest.mark.skipif(not FIXTURE.exists(), reason="no reference outputs at hand")
def test_against_reference_fits():
    io, about = np.load(FIXTURE / "io.npz"), json.loads((FIXTURE / "meta.json").read_text())
    n, truth = io["in/kaplan_N"], about["params"]["true"]
    power = scaling_laws.fit("power", {"N": n}, io["in/kaplan_L"])
    slope, intercept = io["out/kaplan_fit"]
    alpha, scale = power.parameters["alpha"], power.parameters["N_c"]
    assert [-alpha.value, alpha.value * np.log(scale.value)] == pytest.approx([slope, intercept], rel=1e-6)
    floor = scaling_laws.fit("floor", {"N": n}, io["in/kaplan_offset_L"]).parameters
    fitted = [floor["E"].value, np.log(floor["N_c"].value), floor["alpha"].value]
    assert fitted == pytest.approx(io["out/kaplan_offset_fit"], rel=1e-2)  # that one is of the loss, not of its log
    joint = scaling_laws.parametric(io["in/chinchilla_N"], io["in/chinchilla_D"], io["in/chinchilla_L"])
    fitted = [estimate.value for estimate in joint.parameters.values()]
    assert fitted == pytest.approx(io["out/chinchilla_fit"], rel=1e-4)
    for budget, wanted in zip(about["params"]["budgets"], io["out/compute_optimal"].T):
        best = scaling_laws.compute_optimal(joint, budget)
        assert [best.n.value, best.d.value] == pytest.approx(wanted, rel=1e-3)
    planted = [*truth["kaplan"].items(), *truth["offset"].items(), *truth["chinchilla"].items()]
    names = {"Nc": "N_c", "Linf": "E"}
    found = [power.parameters] * 2 + [floor] * 3 + [joint.parameters] * 5
    for (name, value), parameters in zip(planted, found, strict=True):
        estimate = parameters[names.get(name, name)]
        assert estimate.identified and estimate.low <= value <= estimate.high
