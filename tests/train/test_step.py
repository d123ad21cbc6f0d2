"""The training step: what of a frozen block stays."""

import pytest

from vfm.train.step import with_frozen_blocks


@pytest.mark.parametrize("kind", ["codebook", "batch_stats"])
def test_what_moves_without_a_gradient_stays_in_a_frozen_block(kind):
    trained = {"encoders_image": {"a": False, "b": {"c": False}}, "decoders_image": {"a": True, "b": False}}
    old = {kind: {"encoders_image": {"n": 0}, "decoders_image": {"n": 0}}, "perceptual": {"encoders_image": 0}}
    new = {kind: {"encoders_image": {"n": 1}, "decoders_image": {"n": 1}}, "perceptual": {"encoders_image": 1}}
    found = with_frozen_blocks(new, old, trained)
    assert found == {**new, kind: {"encoders_image": {"n": 0}, "decoders_image": {"n": 1}}}
    assert with_frozen_blocks(new, old, None) == new
