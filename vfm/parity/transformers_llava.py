"""Parity with `transformers` of LLaVA: random models, written there and read by us, and back."""

import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vfm.parity.transformers_models import GQA, Difference, with_random_weights

IMAGE = 95  # the id that stands for a part of an image
_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip
_LLAVA = {"vision_config": _VISION, "text_config": {**GQA, "model_type": "llama"}, "image_token_id": IMAGE}

# name -> fields of the config.
MODELS: dict[str, Mapping[str, Any]] = {
    "llava": _LLAVA,
    "llava, last layer, no biases, mistral": {
        **_LLAVA,
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "relu",
        "text_config": {**GQA, "model_type": "mistral", "sliding_window": 5},
    },
}


def compare(name: str, seed: int = 0) -> Difference:
    """The largest differences of the logits of a padded batch: a row with two images, and one with one."""
    import torch
    import transformers

    from vfm.interop import huggingface, llava

    cls = transformers.LlavaForConditionalGeneration
    theirs = with_random_weights(cls, transformers.LlavaConfig(**MODELS[name]), seed)
    rng = np.random.default_rng(seed)
    B, T, P = 2, 14, 4
    ids = rng.integers(3, IMAGE, (B, T))
    for row, start in ((0, 1), (0, 7), (1, 3)):
        ids[row, start : start + P] = IMAGE
    mask = np.ones((B, T), np.int64)
    mask[1, 10:] = 0
    images = rng.normal(size=(3, 3, 16, 16)).astype(np.float32)
    call = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}

    def output(model):
        with torch.no_grad():
            return model(**{key: torch.asarray(value) for key, value in call.items()}).logits.numpy()

    wanted, real = output(theirs), mask[:, :, None].astype(bool)
    difference = lambda found: float(np.abs(np.where(real, found - wanted, 0)).max())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, variables = huggingface.load(folder)
    inputs = {**llava.arrange(ids, images, IMAGE, P), "input_mask": mask.astype(bool)}
    logits, _ = jax.jit(lambda v, inputs: model.apply(v, **inputs, train=False))(variables, inputs)
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save(folder, model, variables, image_token_index=IMAGE)
        written = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
        back = getattr(transformers, written["architectures"][0]).from_pretrained(folder).eval()
        again = difference(output(back))
    return Difference(difference(np.asarray(logits)), again, float(np.abs(wanted).max()))
