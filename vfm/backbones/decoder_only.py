"""Decoder-only backbone: the families (GPT, LLaMA, …) are choices of its fields, which `GPT2`, `LLAMA`, … name."""

import flax.linen as nn
import jax

from vfm.backbones.stack import StackFields

# Field values of the styles, for configs: {**GPT2, "width": 256, ...}.
GPT2 = dict(
    norm="layernorm", norm_epsilon=1e-5, positions="learned", activation="gelu_tanh", gated=False, use_bias=True
)
GPT1 = {**GPT2, "norm_position": "post"}  # Radford et al. 2018
# Brown et al. 2020: dense and locally banded layers in turn.
GPT3 = {**GPT2, "window": 256, "local_layers": (False, True)}
LLAMA = dict(norm="rmsnorm", norm_epsilon=1e-6, positions="rope", activation="silu", gated=True, use_bias=False)
# Chowdhery et al. 2022: parallel branches and one key/value head.
PALM = {**LLAMA, "norm": "layernorm", "arrangement": "parallel_one_norm", "num_kv_heads": 1}
# Du et al. 2022, section 2.3: a second position for the tokens of a blank.
GLM = {**GPT2, "num_block_positions": 128}


class DecoderOnly(StackFields):
    """Causal Transformer: GPT-2 style (Radford et al. 2019), LLaMA style (Touvron et al. 2023), and their relatives.

    x: float[B, T, D] -> (float[B, T, D], out); out["input"]: float[B, T, D], embeddings with positions; out["layers"]:
    float[L, B, T, D]; out["cache"]; out["router_logits"] with experts. Fields: `StackFields`.

    Args of the call:
      input_mask: bool[B, T], False at padding. segment_ids: int32[B, T] for packed rows; tokens see their own segment.
      positions: int32[B, T]; the default counts the real tokens of `input_mask` (so left padding is right as well).
      prefix: bool[B, T]; tokens that all others of the row see, also earlier ones (prefix LM, GLM).
      token_types, block_positions: int32[B, T], rows of the tables of these names.
      context, context_mask: float[B, S, D'], bool[B, S] for cross-attention, context_segments: int32[B, S].
      cache: what `init_cache` gives or the last call returned: keys and values of all layers, and which are real. The
        new tokens are written behind those in it. Without room left the result is undefined (sizes are static): the
        caller counts.
    """

    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False

    kind = "decoder_only"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        input_mask=None,
        segment_ids=None,
        positions=None,
        token_types=None,
        prefix=None,
        block_positions=None,
        context=None,
        context_mask=None,
        context_segments=None,
        cache=None,
        train: bool,
    ):
        return self.run(
            x,
            causal=True,
            input_mask=input_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_types=token_types,
            prefix=prefix,
            block_positions=block_positions,
            context=context,
            context_mask=context_mask,
            context_segments=context_segments,
            cache=cache,
            train=train,
        )
