"""A language model that compiles in no time, with the interface of `VFM` that generation needs."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

DIM = 6


@dataclasses.dataclass(frozen=True)
class Recency:
    """Logits = tanh(sum over the tokens so far of DECAY^distance · u[token]) · w: all tokens count, in their order.

    Its cache holds u[token] as keys, so that it has the leaves of a real one.
    """

    vocab_size: int
    max_len: int = 64

    encoders = input_projectors = output_projectors = types.MappingProxyType({})
    centre = "text"

    @property
    def backbone(self):
        return types.SimpleNamespace(kind="decoder_only", max_len=self.max_len)

    @property
    def decoders(self):
        return {"text": types.SimpleNamespace(vocab_size=self.vocab_size)}

    def variables(self, seed=0, sharpness=2.0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        return {"u": draw(self.vocab_size, DIM), "w": sharpness * draw(DIM, self.vocab_size)}

    def init_cache(self, batch_size, length):
        return {
            "key": jnp.zeros((1, batch_size, 1, length, DIM)),
            "index": jnp.zeros((), jnp.int32),
            "valid": jnp.zeros((batch_size, length), bool),
        }

    def apply(self, variables, tokens, *, input_mask=None, cache=None, method="", train):
        if method == "text_logits":
            return tokens @ variables["w"]
        B, T = tokens.shape
        cache = self.init_cache(B, T) if cache is None else cache
        start, write = cache["index"], jax.lax.dynamic_update_slice_in_dim
        key = write(cache["key"], variables["u"][tokens][None, :, None], start, axis=3)
        valid = write(cache["valid"], input_mask, start, axis=1)
        number = jnp.cumsum(valid, axis=1)  # of the real tokens
        distance = jax.lax.dynamic_slice_in_dim(number, start, T, axis=1)[:, :, None] - number[:, None]
        weight = jnp.where(valid[:, None] & (distance >= 0), 0.7 ** jnp.maximum(distance, 0), 0)
        x = jnp.tanh(jnp.einsum("bts,bsk->btk", weight, key[0, :, 0]))
        cache = {"key": key, "index": cache["index"] + T, "valid": valid}
        return x @ variables["w"], {"output": x, "backbone": {"cache": cache}}
