"""The Transformer block and the scanned stack that every encoder and backbone is made of."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm import tree
from vfm.errors import UserError, unknown
from vfm.layers.attention import Attention
from vfm.layers.causal_convolution import CausalConvolution
from vfm.layers.dense import dot_general
from vfm.layers.mlp import MLP
from vfm.layers.moe import MoE
from vfm.layers.norm import make_norm
from vfm.sharding import constrain

# What a rematerialised block keeps for the backward pass; "none" keeps all (no rematerialisation).
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
NORM_POSITIONS = ("pre", "post", "branch", "sandwich")
ARRANGEMENTS = ("sequential", "parallel", "parallel_one_norm", "attention_only")
MIXERS = ("attention", "convolution")


class BlockFields(nn.Module):
    """The fields of a Transformer block, declared once for the block, its stack, and the backbones made of stacks.

    Fields:
      num_heads, num_kv_heads (None: as many), head_dim (None: width / num_heads), mlp_dim
      norm, norm_epsilon: see `make_norm`
      norm_position: where the norm of a branch f stands. "pre": x + f(norm(x)) (GPT-2, LLaMA); "post": norm(x + f(x))
        (Vaswani et al. 2017; BERT, BART, GPT-1); "branch": x + norm(f(x)) (OLMo 2); "sandwich": x + norm(f(norm(x)))
        (Gemma 2). A stack ends with a norm, unless "post".
      arrangement: "sequential": attention, then MLP. "parallel": x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX),
        "parallel_one_norm": both read the same norm (GPT-J, PaLM). "attention_only": without MLP (Elhage et al. 2021)
      activation, gated: see `MLP`
      use_bias: of all layers; qkv_bias, out_bias (attention), mlp_bias, norm_bias: None: as `use_bias`;
        key_bias: None: as qkv_bias (Whisper has none on the keys)
      qk_norm, attention_scale, attention_softcap, rope_interleaved: see `Attention`
      mixer: what mixes the tokens: "attention", or "convolution" over the last kernel_size tokens of a causal stack
        (see `CausalConvolution`)
      num_experts: a mixture of experts (see `MoE`) in place of the MLP; experts_per_token, normalise_weights of it
      dropout: of every branch. depth: of the stack, for initialisation. remat: a policy of `REMAT`
      cross, causal: set by the backbones: cross-attention over a context; the mask is causal (see `Attention`)
      modulated: set by decoders: a `condition` shifts and scales what attention and MLP read and gates what they add;
        all three start as zero, so that a block starts as the identity (adaLN-Zero, Peebles & Xie 2023). It takes the
        place of the norms' own scale and bias: `norm` is then "layernorm_fixed"
      joint: set by decoders: an attention more, over an `environment`, whose gate starts as zero (CoDi, Tang et al.
        2023)
      modulation_gates: without them a `condition` shifts and scales alone, and not from zero on (adaLN)
    """

    num_heads: int = 2
    mlp_dim: int = 64
    depth: int = 2
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    norm_epsilon: float = 1e-5
    norm_position: str = "pre"
    arrangement: str = "sequential"
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    qkv_bias: bool | None = None
    key_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    qk_norm: str = "none"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    rope_interleaved: bool = False
    mixer: str = "attention"
    kernel_size: int = 8
    num_experts: int | None = None
    experts_per_token: int = 2
    normalise_weights: bool = True
    dropout: float = 0.0
    cross: bool = False
    causal: bool = False
    modulated: bool = False
    modulation_gates: bool = True
    joint: bool = False
    remat: str = "none"
    dtype: str = "float32"

    def block_fields(self) -> dict[str, Any]:
        """Name -> value of the fields above."""
        names = BlockFields.__dataclass_fields__
        return {name: getattr(self, name) for name in names if name not in ("parent", "name")}

    def make_norm(self, name: str) -> nn.Module:
        """The norm that these fields say."""
        bias = self.use_bias if self.norm_bias is None else self.norm_bias
        return make_norm(self.norm, epsilon=self.norm_epsilon, use_bias=bias, dtype=self.dtype, name=name)

    def modulated_by(self, condition: jax.Array, D: int, count: int) -> list[jax.Array]:
        """`count` arrays float[B, 1 | T, D] of a condition float[B, D'] or float[B, T, D'], zero at the start if there
        are gates."""
        condition = condition[:, None] if condition.ndim == 2 else condition
        start = nn.initializers.zeros if self.modulation_gates else nn.initializers.lecun_normal()
        layer = nn.Dense(count * D, dtype=self.dtype, kernel_init=start, dot_general=dot_general, name="modulation")
        return jnp.split(layer(jax.nn.silu(condition)), count, axis=-1)


class Block(BlockFields):
    """Transformer block: attention and MLP, each with a residual connection; float[B, T, D] -> float[B, T, D].

    With `cross` a second attention, over a context, stands between the two; a token that may see nothing of the context
    passes by it. With `joint` another one follows, over an environment; without an environment it is left out. The
    call takes positional arguments only, the first of which is (x, cache of all layers or None), and returns
    ((x, cache), out), as `nn.scan` wants. `layer` holds what differs from layer to layer: number (int32[], its place in
    the cache), local (bool[]: this layer's attention is the local one), scale (float32[], of the logits), added
    (float[B, T, D], to what the block gives), condition (its own, if `modulated`). `shared` holds the rest: mask,
    bias, table and context, context_mask; local_mask and local_table for local layers; taps of a convolution;
    condition, if `modulated`; environment, float[B, S, D'].
    """

    @nn.compact
    def __call__(self, carry, layer, shared, train):
        if self.norm_position not in NORM_POSITIONS:
            raise unknown("norm_position", self.norm_position, NORM_POSITIONS, "model.backbone")
        if self.arrangement not in ARRANGEMENTS:
            raise unknown("arrangement", self.arrangement, ARRANGEMENTS, "model.backbone")
        if self.mixer not in MIXERS:
            raise unknown("mixer", self.mixer, MIXERS, "model.backbone")
        if self.arrangement.startswith("parallel") and (self.cross or self.joint):
            raise UserError(
                f"model.backbone.arrangement={self.arrangement!r} has no place for cross-attention or for other "
                "modalities' features; take 'sequential'"
            )
        before = self.norm_position in ("pre", "sandwich")
        after = self.norm_position in ("branch", "sandwich")
        (x, cache), out = carry, {}
        mask, table = shared.get("mask"), shared.get("table")
        if "local" in layer:
            choose = lambda local, all: jnp.where(layer["local"], local, all)
            mask = choose(shared["local_mask"], mask)
            if shared.get("local_table") is not None:
                table = jax.tree.map(choose, shared["local_table"], table)

        modulation = {}
        if self.modulated:
            each = 3 if self.modulation_gates else 2
            parts = self.modulated_by(layer.get("condition", shared["condition"]), x.shape[-1], 2 * each)
            modulation = {"attention": parts[:each], "mlp": parts[each:]}

        def enter(name, x):
            x = self.make_norm(f"norm_{name}")(x) if before else x
            if name in modulation:
                shift, scale = modulation[name][:2]
                x = x * (1 + scale) + shift
            return x

        def branch(name, y):
            y = self.make_norm(f"norm_{name}_out")(y) if after else y
            y = y * modulation[name][2] if name in modulation and self.modulation_gates else y
            return nn.Dropout(self.dropout, name=f"dropout_{name}")(y, deterministic=not train)

        def leave(name, x):
            x = self.make_norm(f"norm_{name}")(x) if self.norm_position == "post" else x
            return constrain(x, "batch", "length", "width")

        def attention(name, cross=False):
            return Attention(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                use_bias=self.use_bias if self.qkv_bias is None else self.qkv_bias,
                key_bias=self.key_bias,
                out_bias=self.use_bias if self.out_bias is None else self.out_bias,
                qk_norm=self.qk_norm,
                norm_epsilon=self.norm_epsilon,
                scale=self.attention_scale,
                softcap=self.attention_softcap,
                rope_interleaved=self.rope_interleaved,
                cross=cross,
                causal=self.causal and not cross,
                depth=self.depth,
                dtype=self.dtype,
                name=name,
            )

        def mlp(x):
            if self.num_experts is not None:
                y, out["router_logits"] = MoE(
                    self.num_experts,
                    self.experts_per_token,
                    self.mlp_dim,
                    self.activation,
                    self.normalise_weights,
                    self.depth,
                    self.dtype,
                    name="mlp",
                )(x, train=train)
                return y
            bias = self.use_bias if self.mlp_bias is None else self.mlp_bias
            return MLP(self.mlp_dim, self.activation, self.gated, bias, depth=self.depth, dtype=self.dtype, name="mlp")(
                x, train=train
            )

        h = enter("attention", x)
        if self.mixer == "convolution":
            if "taps" not in shared:
                raise UserError("mixer='convolution' reads earlier tokens alone: it is for decoder-only backbones")
            y, cache = CausalConvolution(
                self.kernel_size, self.activation, self.use_bias, self.depth, self.dtype, name="mixer"
            )(h, taps=shared["taps"], cache=cache, layer=layer.get("number"))
        else:
            y, cache = attention("attention")(
                h,
                mask=mask,
                bias=shared.get("bias"),
                table=table,
                layer_scale=layer.get("scale"),
                cache=cache,
                layer=layer.get("number"),
            )
        if self.arrangement in ("parallel", "parallel_one_norm"):
            h = h if self.arrangement == "parallel_one_norm" else enter("mlp", x)
            x = leave("mlp", x + branch("attention", y) + branch("mlp", mlp(h)))
        else:
            x = leave("attention", x + branch("attention", y))
            if self.cross:
                y, cache = attention("cross_attention", cross=True)(
                    enter("cross", x),
                    shared.get("context"),
                    mask=shared.get("context_mask"),
                    cache=cache,
                    layer=layer.get("number"),
                )
                y = leave("cross", x + branch("cross", y))
                if "context_mask" in shared:  # without any key attention gives the mean of the masked values
                    y = jnp.where(shared["context_mask"].any(axis=-1)[:, 0, :, None], y, x)
                x = y
            if self.joint and "environment" in shared:
                y, _ = attention("joint_attention", cross=True)(enter("joint", x), shared["environment"])
                gate = self.param("joint_gate", nn.initializers.zeros, (x.shape[-1],))
                x = leave("joint", x + branch("joint", y * gate[None, None].astype(y.dtype)))
            if self.arrangement != "attention_only":
                x = leave("mlp", x + branch("mlp", mlp(enter("mlp", x))))
        x = x + layer["added"] if "added" in layer else x
        out["x"] = x
        return (x, cache), out


class Transformer(BlockFields):
    """`depth` equal blocks under one `nn.scan` (parameters have a leading layer axis), then a norm.

    x: float[B, T, D] -> (float[B, T, D], out) with out["layers"]: float[L, B, T, D], the residual stream after each
    block, out["cache"], and out["router_logits"] float32[L, B, T, E] of a mixture of experts. The arguments of the
    call are those of `Block`; `local`, `scale`, `added` and `conditions` have a leading layer axis. `cache`: see
    `Attention`. `modulated`: `condition` shifts and scales what the last norm gives as well, and what all blocks read
    that have none of their own in `conditions`. last_norm: without it the stack ends with its last block.
    """

    last_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x,
        *,
        mask=None,
        bias=None,
        table=None,
        local_mask=None,
        local_table=None,
        taps=None,
        context=None,
        context_mask=None,
        environment=None,
        condition=None,
        conditions=None,
        added=None,
        local=None,
        scale=None,
        cache=None,
        train: bool,
    ):
        if self.remat not in REMAT:
            raise unknown("remat policy", self.remat, REMAT)
        block = Block
        if self.remat != "none":
            # Argument 4 (train) is a Python bool; inside a scan common subexpressions cannot undo the recomputation.
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False, static_argnums=(4,))
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(**self.block_fields(), name="layers")
        # The cache goes from layer to layer, and each writes its part in place: cut up and put together by the scan it
        # would be copied several times for every token.
        number = None if cache is None else jnp.arange(self.depth)
        layer = {"local": local, "scale": scale, "number": number, "added": added, "condition": conditions}
        shared = {
            "mask": mask,
            "bias": bias,
            "table": table,
            "local_mask": local_mask,
            "local_table": local_table,
            "taps": taps,
            "context": context,
            "context_mask": context_mask,
            "environment": environment,
            "condition": condition,
        }
        present = lambda arguments: {name: value for name, value in arguments.items() if value is not None}
        cut = self.variables.get("params", {}).get("layers", {})
        run = functools.partial(self._one_by_one, cut) if "0" in cut else stack
        (x, cache), out = run((x, cache), present(layer), present(shared), train)
        out["layers"], out["cache"] = out.pop("x"), cache
        if not self.last_norm:
            return x, out
        if self.norm_position != "post":
            x = self.make_norm("norm")(x)
        if self.modulated:
            shift, scale = self.modulated_by(condition, x.shape[-1], 2)
            x = x * (1 + scale) + shift
        return x, out

    def _one_by_one(self, params, carry, layer, shared, train):
        """As the scanned stack, with parameters that `unstack` gave."""
        found = []
        for i in range(self.depth):
            block = Block(**self.block_fields(), parent=None)
            carry, out = block.apply(
                {"params": params[str(i)]}, carry, {name: leaf[i] for name, leaf in layer.items()}, shared, train
            )
            found.append(out)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def unstack(params: Any) -> dict[str, Any]:
    """The parameters of a backbone with its layers cut out of their stack, as `Transformer` takes them too.

    For many calls with the same parameters, such as the steps of generation: a scan copies each layer's parameters out
    of the stack on CPU, every time. The program then has every layer's code, and takes longer to compile.
    """
    found = {}
    for path, leaf in tree.flatten(params).items():
        before, stacked, after = path.rpartition("transformer/layers/")
        parts = {f"{before}{stacked}{i}/{after}": leaf[i] for i in range(len(leaf))} if stacked else {path: leaf}
        found |= parts
    return tree.unflatten(found)
