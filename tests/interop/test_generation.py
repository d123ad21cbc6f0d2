"""Greedy and beam search of published models: tokens identical to those of `transformers`, scores equal."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.beam import beam_search
from vfm.generate import generate
from vfm.interop import huggingface

FIXTURES = pathlib.Path(__file__).parents[3] / "shared" / "fixtures"
MODELS = ("gpt2", "llama_*", "mixtral", "t5_*", "bart")
# Of the rotary models whose tables depend on the length, the library's uncached run turns old keys anew.
UNLIKE = {("llama_rope_dynamic", "greedy_long_uncached")}
QUICK = {("gpt2", "greedy_padded_left"), ("gpt2", "beam4"), ("bart", "beam4_eos"), ("t5_relu", "beam4_eos")}


def cases():
    for meta in sorted(path for name in MODELS for path in FIXTURES.glob(f"{name}/meta.json")):
        for case, about in json.loads(meta.read_text(encoding="utf-8"))["cases"].items():
            key = meta.parent.name, case
            if about.get("method") == "generate" and key not in UNLIKE:
                yield pytest.param(*key, about["generation_config"], id="-".join(key),
                                   marks=() if key in QUICK else pytest.mark.slow)  # fmt: skip


@pytest.mark.parametrize("name, case, settings", list(cases()))
def test_reference_outputs(name, case, settings):
    model, variables = huggingface.load(str(FIXTURES / name))
    arrays = np.load(FIXTURES / name / "io.npz")
    ids, mask = (arrays[f"{case}/in/{key}"] for key in ("input_ids", "attention_mask"))
    batch = {"tokens": jnp.asarray(ids, jnp.int32), "input_mask": jnp.asarray(mask, bool)}
    eos = settings["eos_token_id"]
    options = {
        "max_new": settings["max_new_tokens"],
        "eos_id": () if eos is None else eos,
        # Where padding is id 0, the library fills beams up with the end of the sequence.
        "pad_id": settings["pad_token_id"] or None,
        "no_repeat_ngram_size": settings.get("no_repeat_ngram_size", 0),
        "start_id": settings.get("decoder_start_token_id"),
    }
    begin = ids.shape[1] if options["start_id"] is None else 1
    beams = settings["num_beams"]
    if beams == 1:
        found = generate(model, variables, batch, **options)
        np.testing.assert_array_equal(found, arrays[f"{case}/out/sequences"][:, begin:])
        return
    found, scores = beam_search(
        model, variables, batch, **options, beams=beams, num_return=beams,
        length_penalty=settings.get("length_penalty", 1.0), early_stopping=settings.get("early_stopping", False),
    )  # fmt: skip
    expected = arrays[f"{case}/out/all_beams_sequences"][:, begin:]
    np.testing.assert_array_equal(found.reshape(len(expected), -1)[:, : expected.shape[1]], expected)
    np.testing.assert_allclose(scores.ravel(), arrays[f"{case}/out/all_beams_scores"].ravel(), atol=1e-4)


# (beams, length penalty, early stopping, ends, repetition penalty, n-grams, least new tokens, forced end)
LIVE = [
    (1, 1.0, False, (2, 5), 1.3, 2, 4, 2),
    (4, 1.0, "never", (2, 5, 9, 17, 30), 1.0, 2, 0, 2),
    (3, -1.0, True, (2, 5, 9, 17, 30), 1.3, 0, 4, None),
]
ALL = itertools.product(
    (3, 4), (0.0, 1.0, -1.0), (False, True, "never"), ((), (2, 5, 9, 17, 30)), (1.0, 1.3), (0, 2), (0, 4), (None, 2)
)
MORE = [pytest.param(options, marks=pytest.mark.slow) for options in itertools.islice(ALL, 0, None, 17)]


@pytest.mark.parametrize("options", [*LIVE, *MORE], ids=str)
def test_options_against_the_library(options, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    beams, length_penalty, early_stopping, ends, repetition, ngrams, least, forced = options
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()
    for p in theirs.parameters():
        p.data = torch.randn_like(p) * 0.3 if p.ndim > 1 else p.data
    theirs.generation_config.eos_token_id = theirs.generation_config.bos_token_id = None
    theirs.save_pretrained(tmp_path)
    model, variables = huggingface.load(str(tmp_path))
    rng = np.random.default_rng(0)
    lengths, length, new, pad = [7, 5, 3, 1], 7, 12, 1
    mask = np.arange(length)[None] >= length - np.array(lengths)[:, None]
    ids = np.where(mask, rng.integers(2, 61, mask.shape), pad)
    # Padding stays out of the answers: the library takes it for a part of repeated n-grams.
    expected = theirs.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int)), max_new_tokens=new, do_sample=False,
        num_beams=beams, pad_token_id=pad, eos_token_id=list(ends) or None, repetition_penalty=repetition,
        no_repeat_ngram_size=ngrams, min_new_tokens=least or None, forced_eos_token_id=forced, suppress_tokens=[pad],
        **dict(length_penalty=length_penalty, early_stopping=early_stopping, num_return_sequences=beams,
               output_scores=True, return_dict_in_generate=True) if beams > 1 else {},
    )  # fmt: skip
    batch = {"tokens": jnp.asarray(ids, jnp.int32), "input_mask": jnp.asarray(mask)}
    options = dict(max_new=new, eos_id=ends, pad_id=pad, repetition_penalty=repetition, no_repeat_ngram_size=ngrams,
                   min_new=least, forced_eos_id=forced, suppress=(pad,))  # fmt: skip
    if beams == 1:
        found, sequences = generate(model, variables, batch, **options), expected
    else:
        found, scores = beam_search(
            model, variables, batch, beams=beams, num_return=beams, length_penalty=length_penalty,
            early_stopping=early_stopping, **options
        )  # fmt: skip
        sequences = expected.sequences
        np.testing.assert_allclose(scores.ravel(), expected.sequences_scores, atol=1e-4)
    sequences = sequences[:, length:].numpy()
    padded = np.pad(sequences, ((0, 0), (0, new - sequences.shape[1])), constant_values=pad)
    np.testing.assert_array_equal(np.asarray(found).reshape(padded.shape), padded)
    jax.clear_caches()
