"""The study of autoencoders: its grid, its tables from records, and its config."""

import jax
import numpy as np
import pytest

from configs import autoencoder, digits
from experiments import autoencoder as study
from experiments import command_line
from experiments.records import markdown
from experiments.study import resolve
from tests import tiny
from vfm import model as model_lib
from vfm import objectives
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.run import run

SETTINGS = {"schemes": (), "seeds": 3, "variation_seeds": 1}


def base(arg=""):
    c = autoencoder.get_config(arg)
    with c.unlocked():
        del c.study
    return c


@pytest.mark.parametrize(
    "variant", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spectrogram", "tfds"))]
)
def test_every_run_is_a_model_with_its_objective_and_the_same_latents(variant):
    found = study.runs(SETTINGS)
    assert len(found) == 3 * len(study.SCHEMES) + len(study.VARIED) == len({str(run) for run in found})
    shapes = set()
    for overrides in found:
        if overrides["seed"]:
            continue
        model = model_lib.build(resolve(base(variant), overrides).model)
        objectives.build(resolve(base(variant), overrides).objective, model)
        encoder, decoder = model.encoders["image"], model.decoders["image"]
        shapes.add((encoder.num_tokens, encoder.width, decoder.num_tokens, encoder.item_shape, decoder.item_shape))
    assert len(shapes) == 1


def test_what_was_expected_is_of_schemes_and_columns_that_there_are():
    columns = {"bits", *study.COLUMNS}
    for item in study.EXPECTED:
        for name, column in ((item.scheme, item.column), item.than):
            assert name in study.ALL and column in columns
        assert (item.scheme, item.column) != item.than and item.sign in (-1, 1)
    assert set(study.VARIED) <= {name for item in study.EXPECTED for name in (item.scheme, item.than[0])} | {
        "VQ-VAE, adversarial term"
    }


def record(name, seed, **metrics):
    found = {metric: 0.5 for metric in study.COLUMNS.values() if "code" not in metric and "active" not in metric}
    found |= {"latent_floats_image": 16.0, **metrics}
    overrides = {**study.ALL[name], "seed": seed}
    return {
        "run": f"{name}{seed}",
        "overrides": overrides,
        "metrics": found,
        "parameters": 9,
        "flops": 7,
        "seconds": 2.0,
    }


def test_tables_say_what_was_found_and_what_held(tmp_path):
    mse, code = "reconstruction_image_mse", {"codebook_usage_image": 0.75, "code_bits_image": 32.0}
    records = [record("AE", seed, **{mse: 0.010 + 0.002 * seed, "probe_image": 0.9}) for seed in (0, 1)]
    records += [record("VAE", seed, **{mse: 0.0111 + 0.002 * seed, "test_kl_image": np.log(2) * 20}) for seed in (0, 1)]
    frechet = "reconstruction_image_frechet"
    records += [record("VQ-VAE", 0, **{mse: 0.05, frechet: 2.0, **code})]
    records += [record("VQGAN", 0, **{mse: 0.04, frechet: 1.0, **code})]
    table = study.summarize(records)
    rows = {row["scheme"]: row for row in table}
    assert list(rows) == list(study.SCHEMES)
    assert rows["AE"]["mse"].mean == pytest.approx(0.011) and rows["AE"]["seeds"] == 2
    assert [rows[name]["bits"].mean for name in rows] == pytest.approx([512, 20, 32, 32])
    assert rows["VQGAN"]["codes in use"].mean == 0.75 and rows["AE"]["codes in use"] == "–"
    found = {row["expected"]: row["held"] for row in study.expectations(table)}
    assert found["A posterior costs reconstruction"] == "within the spread"
    assert found["Codes cost more than a posterior, at equal floats"] == "yes"
    assert found["The adversarial and perceptual terms do not lower the squared error"] == "no"
    assert found["They lower the Fréchet distance"] == "yes"
    assert found["Latents of an AE are better than principal components"] == "yes"
    assert "More β, more error" not in found  # it was not run
    assert "512" in markdown(table) and study.figure(table).axes
    assert study.pictures(records, tmp_path) == {}


def test_pictures_are_those_of_the_first_seed(tmp_path):
    from matplotlib.image import imsave

    records = [record("AE", 0), record("AE", 1), record("VAE, β 4", 0)]
    for number, found in enumerate(records):
        folder = tmp_path / "runs" / found["run"] / "figures"
        folder.mkdir(parents=True)
        imsave(folder / "sample_image.png", np.full((4, 8, 3), number / 4))
    drawn = study.pictures(records, tmp_path)
    assert list(drawn) == ["study_sample_image"]
    (axes,) = drawn["study_sample_image"][1].axes
    assert axes.get_title() == "AE" and axes.images[0].get_array()[..., 0].max() == 0


@pytest.mark.parametrize(
    "changes, message",
    [({"schemes": ("VQVAE",)}, "unknown scheme 'VQVAE'.*did you mean 'VQ-VAE'"), ({"seeds": 0}, "seeds=0 must be")],
)
def test_bad_settings_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        study.runs(SETTINGS | changes)


def test_the_halves_are_the_blocks_of_the_config_that_loads_them():
    ours, theirs = autoencoder.get_config("digits").model, digits.get_config().model
    for kind in ("encoders", "decoders"):
        assert ours[kind].image.to_dict() == theirs[kind].image.to_dict()


def test_the_command_that_loads_them_is_one():
    doc = autoencoder.__doc__
    line = doc[doc.index("--config=configs/digits.py") :].replace("\\\n", " ").replace('"', "").split()
    config = command_line.parse(line).config
    assert config.init.match == ("(en|de)coders_image/.*",) == config.optimizer.frozen
    assert config.init.path == "runs/halves"


@pytest.mark.slow
def test_trained_halves_become_those_of_the_foundation_model(tmp_path):
    """The command of the config's head, with fewer steps: they are there, and they stay."""
    ours = autoencoder.get_config("digits")
    ours.train.steps, ours.optimizer.schedule.warmup_steps, ours.eval.test_limit = 2, 1, 40
    theirs = digits.get_config("smoke")
    rows = ("(en|de)coders_image/.*",)
    theirs.init.update(path=str(tmp_path / "halves"), match=rows)
    theirs.optimizer.frozen = rows
    with tiny.quick_compilation():
        run(ours, str(tmp_path / "halves"), jax.devices()[:1])
        results = run(theirs, str(tmp_path / "whole"), jax.devices()[:1])
    assert "text_to_image_accuracy" in results
    halves, whole = (
        tiny.state(Experiment(c, jax.devices()[:1]), tmp_path / name).params
        for name, c in (("halves", ours), ("whole", theirs))
    )
    for block in ("encoders_image", "decoders_image"):
        jax.tree.map(np.testing.assert_array_equal, whole[block], halves[block])
