"""Text generation with a key/value cache, one jitted program for prefill and all new tokens."""

import functools

import jax
import jax.numpy as jnp

from vfm.errors import UserError
from vfm.model import INPUTS


def generate(model, variables, batch, *, max_new: int, eos_id: int, temperature: float = 0.0, rng=None) -> jax.Array:
    """Continues every row of `batch` (prompts padded at the right end, see `VFM`): -> int32[B, max_new].

    temperature 0 is greedy, else tokens are drawn from softmax(logits / temperature) with the key `rng`. Behind the
    first `eos_id` a row repeats it. Raises `UserError` if prompt and answer are longer than the backbone's `max_len`.
    """
    length = batch["input_mask"].shape[1]
    if length + max_new > model.backbone.max_len:
        raise UserError(
            f"prompt of {length} positions + {max_new} new tokens is longer than "
            f"model.backbone.max_len={model.backbone.max_len}"
        )
    if temperature and rng is None:
        raise UserError("generate: sampling at a temperature needs a key: pass rng=jax.random.key(seed)")
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    rng = jax.random.key(0) if rng is None else rng
    return _generate(model, max_new, float(temperature), variables, inputs, eos_id, rng)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, max_new, temperature, variables, inputs, eos_id, rng):
    B, T = inputs["input_mask"].shape
    cache = model.init_cache(B, T + max_new)
    logits, out = model.apply(variables, **inputs, cache=cache, train=False)
    last = inputs["input_mask"].sum(axis=1) - 1
    logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]

    def pick(logits, rng):
        if temperature:
            return jax.random.categorical(rng, logits.astype(jnp.float32) / temperature)
        return jnp.argmax(logits, axis=-1)

    def body(carry, rng):
        cache, logits, done = carry
        token = jnp.where(done, eos_id, pick(logits, rng)).astype(jnp.int32)
        logits, out = model.apply(
            variables, token[:, None], input_mask=jnp.ones((B, 1), bool), cache=cache, train=False
        )
        return (out["backbone"]["cache"], logits[:, 0], done | (token == eos_id)), token

    carry = (out["backbone"]["cache"], logits, jnp.zeros((B,), bool))
    _, tokens = jax.lax.scan(body, carry, jax.random.split(rng, max_new))
    return tokens.T
