"""All pairs of two modalities in batches, against one pair at a time."""

import jax
import numpy as np
import pytest

from vfm import model as model_lib
from vfm import tree
from vfm.data.fused import Fused
from vfm.evaluate.matching import match_scores
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZER, WORDS, LENGTH = ByteTokenizer(), ("one", "three", "nine"), 8


def model_of(backbone, length):
    model = model_lib.build({
        "centre": "text",
        "encoders": {
            "text": {"name": "text", "vocab_size": 259, "width": 12},
            "image": {"name": "vit", "image_size": (4, 4), "patch_size": 2, "width": 12, "depth": 1, "mlp_dim": 8},
        },
        "backbone": {"name": backbone, "width": 12, "depth": 1, "mlp_dim": 8, "max_len": 16},
        "decoders": {"label": {"name": "classifier"}},
    })  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), length))
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
    return model, jax.tree.map(draw, tree.paths(shapes), shapes)


@pytest.mark.parametrize("backbone, length, decoder_length", [("encoder_only", 12, 0), ("cross_encoder", 4, LENGTH)])
def test_all_pairs_equal_one_pair_at_a_time(backbone, length, decoder_length):
    model, variables = model_of(backbone, length)
    fused = Fused(model_lib.layout(model, length), TOKENIZER, decoder_length)
    images = np.random.default_rng(1).normal(size=(4, 4, 4, 1)).astype(np.float32)
    row = lambda i, j: fused.row({"image": images[i]}, WORDS[j])
    scores = match_scores(model, variables, row, len(images), len(WORDS), batch_size=5)  # which does not divide 12
    assert scores.shape == (4, 3) and scores.dtype == np.float32

    forward = jax.jit(lambda batch: model.apply(variables, **batch, train=False)[1]["label"]["logits"])
    for i in range(len(images)):
        for j in range(len(WORDS)):
            batch = {name: value for name, value in row(i, j).items() if name in model_lib.INPUTS}
            logits = np.asarray(forward(jax.tree.map(lambda x: x[None], batch))[0])
            np.testing.assert_allclose(scores[i, j], logits[1] - logits[0], atol=1e-5, err_msg=f"{i}, {j}")
    assert np.abs(scores - scores[0]).max() > 1e-3 and np.abs(scores - scores[:, :1]).max() > 1e-3

    from_words = match_scores(model, variables, lambda j, i: row(i, j), len(WORDS), len(images))  # one batch, too long
    np.testing.assert_allclose(from_words, scores.T, atol=1e-5)
    assert match_scores(model, variables, row, 0, 3).shape == (0, 3)
