"""DiT in the layout of `diffusers` (`DiTTransformer2DModel`): class-conditional, adaLN-Zero, in latent space.

There every block holds its own embedding of time and class. If they are all equal, as in published weights, the network
gets one for all blocks. A class becomes a unit vector (`LabelEncoder`), which the embedding's kernel turns into the
row of the published table; the last row is the null condition.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vfm.decoders.diffusion import Diffusion
from vfm.errors import UserError, unknown
from vfm.interop.configs import refuse
from vfm.model import VFM

KIND = "DiTTransformer2DModel"
NETWORK = "decoders_image/denoiser/"
LAYERS = f"{NETWORK}transformer/layers/"
TABLE = "encoders_label/embedding/embedding"
NULL = "decoders_image/unconditional/null_condition"
EMBEDDING = "norm1.emb."
ACTIVATIONS = {"gelu-approximate": "gelu_tanh", "gelu": "gelu"}
# The noise that published models were trained with; config.json does not say it.
PROCESS = {"name": "gaussian", "schedule": "linear", "timesteps": 1000, "prediction": "epsilon"}
DEFAULTS = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None, "num_layers": 28,
    "attention_bias": True, "sample_size": 32, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "norm_eps": 1e-5,
}  # fmt: skip


def read(c: Mapping[str, Any], files: Mapping[str, np.ndarray], **fields: Any) -> dict[str, Any]:
    """`config.model` of a config.json; fields: of the network."""
    c = {**DEFAULTS, **c}
    refuse(c, KIND, norm_type="ada_norm_zero", norm_elementwise_affine=False, attention_bias=True, dropout=0.0)
    if c["activation_fn"] not in ACTIVATIONS:
        raise unknown("activation", c["activation_fn"], ACTIVATIONS, f"config.json of a {KIND!r}")
    channels, size, depth = c["in_channels"], c["sample_size"], c["num_layers"]
    out_channels = c["out_channels"] or channels
    if out_channels not in (channels, 2 * channels):
        raise UserError(f"config.json: out_channels={out_channels} is neither in_channels={channels} nor twice that")
    equal = all(
        np.array_equal(files[name], files[name.replace("blocks.0.", f"blocks.{i}.", 1)])
        for name in files
        if name.startswith(f"transformer_blocks.0.{EMBEDDING}")
        for i in range(1, depth)
    )
    network = {
        "name": "dit",
        "patch_size": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": depth,
        "num_heads": c["num_attention_heads"],
        "mlp_dim": 4 * c["num_attention_heads"] * c["attention_head_dim"],
        "activation": ACTIVATIONS[c["activation_fn"]],
        "embedders": "shared" if equal else "per_block",
        **fields,
    }
    classes = c["num_embeds_ada_norm"]
    decoder = {
        "name": "diffusion",
        "item_shape": (size, size, channels),
        "value_range": (-1.0, 1.0),
        "network": network,
        "process": {**PROCESS, "variance": "learned_range" if out_channels > channels else "fixed_small"},
    }
    label = {"name": "label", "num_classes": classes, "width": classes + 1}
    return {"centre": "label", "backbone": None, "encoders": {"label": label}, "decoders": {"image": decoder}}


def _rows(depth: int, heads: int, shared: bool) -> list[tuple[str, str, Callable, Callable]]:
    """(tensor with {i} for the block, our path, tensor -> array of one block, the inverse)."""
    transpose = lambda x: x.T
    same = lambda x: x
    split, join = lambda x: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(len(x), -1).T
    split_bias, join_bias = lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1)
    split_out, join_out = lambda x: x.T.reshape(heads, -1, len(x)), lambda x: x.reshape(-1, x.shape[-1]).T
    block = "transformer_blocks.{i}."
    own = f"{NETWORK}embedder/" if shared else f"{NETWORK}embedders/layers/"

    def dense(name, path):
        return [
            (f"{name}.weight", f"{path}/kernel", transpose, transpose),
            (f"{name}.bias", f"{path}/bias", same, same),
        ]

    rows = []
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value")):
        rows.append((f"{block}attn1.to_{theirs}.weight", f"{LAYERS}attention/{ours}/kernel", split, join))
        rows.append((f"{block}attn1.to_{theirs}.bias", f"{LAYERS}attention/{ours}/bias", split_bias, join_bias))
    rows.append((f"{block}attn1.to_out.0.weight", f"{LAYERS}attention/out/kernel", split_out, join_out))
    rows.append((f"{block}attn1.to_out.0.bias", f"{LAYERS}attention/out/bias", same, same))
    rows += dense(f"{block}ff.net.0.proj", f"{LAYERS}mlp/up") + dense(f"{block}ff.net.2", f"{LAYERS}mlp/down")
    rows += dense(f"{block}norm1.linear", f"{LAYERS}modulation")
    rows += dense(f"{block}{EMBEDDING}timestep_embedder.linear_1", f"{own}hidden")
    rows += dense(f"{block}{EMBEDDING}timestep_embedder.linear_2", f"{own}projection")
    rows += dense("proj_out_1", f"{NETWORK}transformer/modulation") + dense("proj_out_2", f"{NETWORK}unpatch")
    to_conv, from_conv = lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    rows.append(("pos_embed.proj.weight", f"{NETWORK}patch/kernel", to_conv, from_conv))
    rows.append(("pos_embed.proj.bias", f"{NETWORK}patch/bias", same, same))
    return rows


def _table(i: int) -> str:
    return f"transformer_blocks.{i}.{EMBEDDING}class_embedder.embedding_table.weight"


def parameters(cfg: Mapping[str, Any], take: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """{path: array} of the tensors."""
    network = cfg["decoders"]["image"]["network"]
    depth, shared, found = network["depth"], network["embedders"] == "shared", {}
    for name, path, load, _ in _rows(depth, network["num_heads"], shared):
        layers = [load(take(name.format(i=i))) for i in range(depth if "{i}" in name else 1)]
        found[path] = np.stack(layers) if "/layers/" in path else layers[0]
    tables = [take(_table(i)) for i in range(depth)]
    own = f"{NETWORK}embedder/" if shared else f"{NETWORK}embedders/layers/"
    found[f"{own}condition/kernel"] = tables[0] if shared else np.stack(tables)
    found[f"{own}condition/bias"] = np.zeros_like(found[f"{own}hidden/bias"])
    unit = np.eye(len(tables[0]), dtype=np.float32)
    return {**found, TABLE: unit[:-1], NULL: unit[-1:]}


def write(model: VFM) -> dict[str, Any] | None:
    """config.json of a class-conditional DiT, or None for any other model."""
    decoder, label = model.decoders.get("image"), model.encoders.get("label")
    if model.backbone is not None or model.centre != "label" or not isinstance(decoder, Diffusion) or label is None:
        return None
    if set(model.encoders) | set(model.decoders) != {"label", "image"} or model.output_projectors:
        return None
    n, (H, W, C) = _network(decoder), (*decoder.item_shape, 1)[:3]
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    plain = decoder.latent is None and decoder.control is None and n.base_grid is None and n.norm_epsilon == 1e-6
    usual = n.conditioning == "adaln_zero" and n.frequencies == 256 and n.mlp_dim == 4 * n.width and H == W
    if not (plain and usual and decoder.condition_dropout and n.activation in names):
        return None
    learned = decoder.process.get("variance") == "learned_range"
    return {
        "num_attention_heads": n.num_heads,
        "attention_head_dim": n.width // n.num_heads,
        "in_channels": C,
        "out_channels": 2 * C if learned else C,
        "num_layers": n.depth,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "attention_bias": True,
        "sample_size": H,
        "patch_size": n.patch_size,
        "activation_fn": names[n.activation],
        "num_embeds_ada_norm": label.num_classes,
        "upcast_attention": False,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
    }


def _network(decoder: Diffusion):
    from vfm.blocks import build_block
    from vfm.decoders.diffusion import NETWORKS

    return build_block(NETWORKS, decoder.network, "network")


def tensors(model: VFM, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name: tensor} of the parameters."""
    n = _network(model.decoders["image"])
    shared, found = n.embedders == "shared", {}
    for name, path, _, save in _rows(n.depth, n.num_heads, shared):
        for i in range(n.depth if "{i}" in name else 1):
            found[name.format(i=i)] = save(params[path][i] if "/layers/" in path else params[path])
    own = f"{NETWORK}embedder/" if shared else f"{NETWORK}embedders/layers/"
    rows = np.concatenate([params[TABLE], params[NULL]])
    for i in range(n.depth):
        kernel, bias = (params[f"{own}condition/{leaf}"] for leaf in ("kernel", "bias"))
        found[_table(i)] = rows @ (kernel if shared else kernel[i]) + (bias if shared else bias[i])[None]
    return found
