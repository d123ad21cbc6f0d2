import numpy as np
import pytest

from configs import emergence
from vfm.errors import UserError
from vfm.evaluate.spectrum import power
from vfm.experiment import Experiment


def test_waves_are_found():
    p, rng = 31, np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(p)[:, None] / p
    table = 3 * np.cos(4 * angle) * rng.normal(size=(1, 8)) + np.sin(9 * angle) * rng.normal(size=(1, 8)) + 5
    share = power(table)
    assert share.shape == (15,) and share.sum() == pytest.approx(1)
    assert set(np.argsort(share)[-2:] + 1) == {4, 9} and share[[3, 8]].sum() == pytest.approx(1)
    noise = power(rng.normal(size=(p, 512)))
    np.testing.assert_allclose(noise, 1 / 15, rtol=0.25)
    # An even number has a frequency without a mirror image.
    np.testing.assert_allclose(power(rng.normal(size=(8, 20_000))), [2 / 7, 2 / 7, 2 / 7, 1 / 7], rtol=0.05)


def test_refusals():
    c = emergence.get_config("modular")
    Experiment(c)
    c.eval.spectrum = {"top": 0}
    with pytest.raises(UserError, match="config.eval.spectrum.top=0"):
        Experiment(c)
    c = emergence.get_config("")
    c.eval.evaluators = ("spectrum",)
    with pytest.raises(UserError, match="needs config.data.source.name='modular'"):
        Experiment(c)
