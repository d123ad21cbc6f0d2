"""Text encoder: the embedding half of the tokenizer (ids -> features)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.layers.dense import dot_general


class TextEncoder(nn.Module):
    """Token embedding: tokens int32[B, T] -> (float[B, T, D], out). Positions belong to the backbone.

    scale: factor of the embeddings, such as sqrt(D) (Vaswani et al. 2017, section 3.4); `attend` has none.
    pad_id: an id whose embedding gets no gradient where it is read (padding_idx of torch); None: there is none.
    """

    vocab_size: int = 259
    width: int = 32
    scale: float = 1.0
    pad_id: int | None = None
    dtype: str = "float32"

    item_shape = ()  # an item is one token
    num_tokens = 1

    def setup(self):
        # The features start with the same variance, whatever the scale.
        init = nn.initializers.normal(self.width**-0.5 / self.scale)
        self.embedding = nn.Embed(self.vocab_size, self.width, embedding_init=init, dtype=self.dtype)

    def __call__(self, tokens: jax.Array, *, train: bool):
        x = self.embedding(tokens)
        if self.pad_id is not None:
            x = jnp.where((tokens == self.pad_id)[..., None], jax.lax.stop_gradient(x), x)
        return (x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)), {}

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits float[B, T, V] by the transposed table, for a decoder with tied weights (Press & Wolf 2017)."""
        dtype = jnp.dtype(self.dtype)
        table = self.embedding.embedding.astype(dtype).T
        return dot_general(x.astype(dtype), table, (((x.ndim - 1,), (0,)), ((), ())))
