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
from vfm.parity import transformers_generation

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


# Beams and options; some ends, so that answers have many lengths.
ENDS = (2, 5, 9, 17, 30, 41, 53)
LIVE = [
    {
        "beams": 1,
        "eos_id": ENDS,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new": 4,
        "forced_eos_id": 2,
    },
    {"beams": 4, "eos_id": ENDS, "early_stopping": "never", "no_repeat_ngram_size": 2, "forced_eos_id": 2},
    {
        "beams": 3,
        "eos_id": ENDS,
        "early_stopping": True,
        "length_penalty": -1.0,
        "repetition_penalty": 1.3,
        "min_new": 3,
    },
]
ALL = itertools.product((3, 4), (0.0, 1.0, -1.0), (False, True, "never"), ((), ENDS), (1.0, 1.3), (0, 2), (0, 4))
FIELDS = (
    "beams", "length_penalty", "early_stopping", "eos_id", "repetition_penalty", "no_repeat_ngram_size", "min_new"
)  # fmt: skip
MORE = [dict(zip(FIELDS, values)) for values in itertools.islice(ALL, 0, None, 13)]


def check(name, **options):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    found = transformers_generation.compare(name, **options)
    np.testing.assert_array_equal(found.ours, found.theirs)
    assert found.scores < 1e-4
    jax.clear_caches()


@pytest.mark.parametrize("options", LIVE, ids=str)
def test_options_against_the_library(options):
    check("gpt2", **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", MORE, ids=str)
def test_more_options_against_the_library(options):
    check("gpt2", **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", transformers_generation.LANGUAGE_MODELS)
def test_families_against_the_library(name):
    check(name)
    check(name, beams=3, eos_id=ENDS)
