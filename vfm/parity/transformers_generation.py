"""Parity with `transformers.generate`: greedy and beam search of small random models, with the same options."""

import dataclasses
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from vfm.parity.transformers_models import MODELS, random_model

# Our options -> the library's.
NAMES = {
    "eos_id": "eos_token_id", "length_penalty": "length_penalty", "early_stopping": "early_stopping",
    "repetition_penalty": "repetition_penalty", "no_repeat_ngram_size": "no_repeat_ngram_size",
    "min_new": "min_new_tokens", "forced_eos_id": "forced_eos_token_id",
}  # fmt: skip
LANGUAGE_MODELS = tuple(
    name for name, (architecture, _) in MODELS.items()
    if architecture.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "MTModel"))
)  # fmt: skip
LENGTHS = (7, 5, 3, 1)  # of the prompts


@dataclasses.dataclass(frozen=True)
class Generated:
    """Tokens int[4, beams, new] of both sides, and the largest difference of the beams' scores (0 for one beam)."""

    ours: np.ndarray
    theirs: np.ndarray
    scores: float


def compare(name: str, seed: int = 0, *, beams: int = 1, new: int = 12, **options: Any) -> Generated:
    """Continues prompts of unequal length with a model of `MODELS`; `options` are those of our functions."""
    import torch

    from vfm.beam import beam_search
    from vfm.generate import generate
    from vfm.interop import huggingface

    library = random_model(name, seed)
    two = library.config.is_encoder_decoder
    pad, start = library.config.pad_token_id or 0, library.config.decoder_start_token_id if two else None
    rng, length = np.random.default_rng(seed), max(LENGTHS)
    # The library wants the end of a prompt at the right, and padded inputs of an encoder as in training.
    place, size = np.arange(length)[None], np.array(LENGTHS)[:, None]
    mask = place < size if two else place >= length - size
    ids = np.where(mask, rng.integers(3, library.config.vocab_size, mask.shape), pad)
    eos = tuple(np.atleast_1d(options.pop("eos_id", ())).tolist())
    for field in ("eos_token_id", "bos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(library.generation_config, field, None)
    call = {NAMES[option]: value for option, value in options.items()}
    # The library's cache for T5 has as many layers as the encoder; here the decoder has more.
    call["use_cache"] = not library.config.model_type.endswith("t5")
    if beams > 1:
        call |= {"num_return_sequences": beams, "output_scores": True, "return_dict_in_generate": True}
    found = library.generate(
        torch.asarray(ids), attention_mask=torch.asarray(mask.astype(np.int64)), max_new_tokens=new, do_sample=False,
        num_beams=beams, pad_token_id=pad, eos_token_id=list(eos) or None, decoder_start_token_id=start,
        # The library takes padding for a part of repeated n-grams, so it must not be generated.
        suppress_tokens=[pad], **call,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        library.save_pretrained(folder)
        model, variables = huggingface.load(folder)
    # Where padding is id 0, the library fills beams up with the first end.
    fill = eos[0] if beams > 1 and eos and not pad else pad
    batch = {"tokens": jnp.asarray(ids, jnp.int32), "input_mask": jnp.asarray(mask)}
    options |= {"max_new": new, "eos_id": eos, "pad_id": fill, "start_id": start, "suppress": (pad,)}
    sequences, scores = found, np.zeros(())
    if beams > 1:
        sequences, scores = found.sequences, found.sequences_scores.numpy()
        ours, our_scores = beam_search(model, variables, batch, beams=beams, num_return=beams, **options)
        scores = np.abs(np.asarray(our_scores).ravel() - scores)
    else:
        ours = generate(model, variables, batch, **options)
    theirs = np.full((len(LENGTHS) * beams, new), fill)
    sequences = sequences[:, 1 if two else length :].numpy()
    theirs[:, : sequences.shape[1]] = sequences
    shape = (len(LENGTHS), beams, new)
    return Generated(np.asarray(ours).reshape(shape), theirs.reshape(shape), float(scores.max()))
