"""Bits per byte of texts: against one document after the other, read byte by byte."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.evaluate import families
from vfm import tokenizers
from vfm.evaluate.text import byte_lengths, text


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_bits_per_byte_against_one_document_after_the_other(tmp_path, smoothing):
    """What the objective smooths is no figure of merit."""
    experiment = families.experiment(tmp_path, objective={"label_smoothing": smoothing}, whole=True)
    params, tokenizer = experiment.init_state().params, experiment.tokenizer
    found = text(experiment, params, {}, "test", None).metrics
    run = jax.jit(lambda tokens: experiment.model.apply({"params": params}, tokens, train=False)[0])
    nll, tokens, read = 0.0, 0, 0
    for document in families.documents():
        ids = [tokenizer.bos_id, *tokenizer.encode(document["text"]), tokenizer.eos_id]
        # Padded to one length, so that it compiles once; the rows are causal.
        row = np.zeros((1, families.LENGTH), np.int32)
        row[0, : len(ids)] = ids
        log_p = jax.nn.log_softmax(run(jnp.asarray(row))[0])
        nll -= sum(float(log_p[i, target]) for i, target in enumerate(ids[1:]))
        tokens += len(ids) - 1
        read += len(document["text"].encode())
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / read, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert found["bytes_per_token"] == pytest.approx(read / tokens)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_byte_lengths_add_up_to_the_text(pattern):
    words = "a naïve café, 北京 and 🙂🙂 " * 4
    tokenizer = tokenizers.train_bpe([words], vocab_size=300, pattern=pattern, report=lambda line: None)
    sizes = byte_lengths(tokenizer)
    assert sizes.shape == (tokenizer.vocab_size,)
    assert not sizes[list(tokenizer.special.values())].any()
    for sample in (words, "x", " y", "\n\n🙂"):
        assert sizes[tokenizer.encode(sample)].sum() == len(sample.encode())
