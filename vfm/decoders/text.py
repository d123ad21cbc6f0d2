"""Text decoder: the LM head. The tokenizer's `decode` turns the ids into text."""

import flax.linen as nn
import jax


class TextDecoder(nn.Module):
    """LM head, float[B, T, D] -> (logits float[B, T, V], out).

    With `tied` the text encoder's table is used instead of an own kernel: `VFM` passes its `attend`.
    """

    vocab_size: int = 259
    tied: bool = False
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None
    item_shape = None

    @nn.compact
    def __call__(self, x: jax.Array, *, attend=None, train: bool):
        if self.tied:
            return attend(x), {}
        return nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="head")(x), {}
