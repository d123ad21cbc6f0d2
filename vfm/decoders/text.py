"""Text decoders: heads that give logits over the vocabulary. The tokenizer's `decode` turns the ids into text."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.errors import unknown
from vfm.layers.dense import dot_general
from vfm.layers.mlp import ACTIVATIONS


class TextDecoder(nn.Module):
    """LM head, float[B, T, D] -> (logits float[B, T, V], out).

    Fields:
      tied: the text encoder's table is used instead of an own kernel (Press & Wolf 2017): `VFM` passes its `attend`
      use_bias: one bias per id. fixed_bias: another that is not trained, in the collection `constants` (BART's
        final_logits_bias)
      scale: factor of the logits, such as 1 / sqrt(D) (T5)
      softcap: c: logits become c · tanh(logits / c) (Gemma 2)
      transform: an activation; the features then go through dense, activation and LayerNorm first, as in the head for
        masked tokens of BERT (Devlin et al. 2019). "": no transformation
    """

    vocab_size: int = 259
    tied: bool = False
    use_bias: bool = False
    fixed_bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    transform: str = ""
    norm_epsilon: float = 1e-12
    in_width: int | None = None
    dtype: str = "float32"

    num_tokens = None
    item_shape = None

    @nn.compact
    def __call__(self, x: jax.Array, *, attend=None, train: bool):
        if self.transform:
            if self.transform not in ACTIVATIONS:
                raise unknown("activation", self.transform, ACTIVATIONS, "model.decoders.text.transform")
            x = ACTIVATIONS[self.transform](nn.Dense(x.shape[-1], dtype=self.dtype, name="hidden")(x))
            x = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=self.dtype, name="norm")(x)
        if self.tied:
            logits = attend(x)
            if self.use_bias:
                bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
                logits = logits + bias[None, None].astype(logits.dtype)
        else:
            logits = nn.Dense(
                self.vocab_size, use_bias=self.use_bias, dtype=self.dtype, dot_general=dot_general, name="head"
            )(x)
        if self.fixed_bias:
            bias = self.variable("constants", "bias", jnp.zeros, (self.vocab_size,), jnp.float32)
            logits = logits + bias.value[None, None].astype(logits.dtype)
        if self.scale != 1:
            logits = logits * jnp.asarray(self.scale, logits.dtype)
        if self.softcap is not None:
            logits = jnp.tanh(logits / self.softcap) * self.softcap
        return logits, {}
