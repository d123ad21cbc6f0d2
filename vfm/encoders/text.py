"""Text encoder: the embedding half of the tokenizer (ids -> features)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class TextEncoder(nn.Module):
    """Token embedding: tokens int32[B, T] -> (float[B, T, D], out). Positions belong to the backbone."""

    vocab_size: int = 259
    width: int = 32
    dtype: str = "float32"

    item_shape = ()  # an item is one token
    num_tokens = 1

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype)

    def __call__(self, tokens: jax.Array, *, train: bool):
        return self.embedding(tokens), {}

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float[B, T, V] by the transposed table, for a decoder with tied weights (Press & Wolf 2017)."""
        return self.embedding.attend(x.astype(jnp.dtype(self.dtype)))
