"""Autoencoders in the layout of `diffusers`: `AutoencoderKL` (latent diffusion) and `VQModel` (VQGAN)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vfm import model as model_lib
from vfm.decoders.latent import LatentDecoder
from vfm.encoders.latent import LatentEncoder, LatentFields
from vfm.errors import UserError
from vfm.interop.configs import refuse
from vfm.model import VFM

CODEBOOK = "encoders_image/quantizer/codebook/embedding"
TYPES = {"encoder": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
TYPES["decoder"] = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
# What the library takes where config.json says nothing.
DEFAULTS = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (64,), "layers_per_block": 1, "latent_channels": 4,
    "sample_size": 32, "norm_num_groups": 32, "scaling_factor": 0.18215, "mid_block_add_attention": True,
}  # fmt: skip
OF_KL = {"use_quant_conv": True, "use_post_quant_conv": True}
OF_VQ = {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None}
# The attention of weights from before 2023 has these names.
OLDER = {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

SAME = (lambda x: x, lambda x: x)
CONV = (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
# Attention of one head: [C, 1, C] of a linear layer's [out, in], and the same of its last layer.
HEAD = (lambda x: x.reshape(len(x), -1).T[:, None], lambda x: x[:, 0].T)
HEAD_BIAS = (lambda x: x[None], lambda x: x[0])
HEAD_OUT = (lambda x: x.reshape(len(x), -1).T[None], lambda x: x[0].T)
Row = tuple[str, str, tuple[Callable, Callable]]


class Autoencoder:
    """One of the two classes: how config.json and tensors become a model, and back; see `diffusers.FAMILIES`."""

    def __init__(self, kind: str, quantized: bool):
        self.kind, self.quantized = kind, quantized

    def read(self, c: Mapping[str, Any], files: Mapping[str, np.ndarray], **fields: Any) -> dict[str, Any]:
        """`config.model` of a config.json; fields: of both halves, such as image_size=(256, 256), centred=True."""
        c = {**DEFAULTS, **(OF_VQ if self.quantized else OF_KL), **c}
        refuse(c, self.kind, act_fn="silu", latents_mean=None, latents_std=None, shift_factor=None, norm_type="group")
        refuse(c, self.kind, lookup_from_codebook=False)
        attention = [self._attention(c, half) for half in ("encoder", "decoder")]
        if attention[0] != attention[1][::-1]:
            raise UserError(
                f"config.json: a {self.kind!r} whose halves have attention at other levels is not supported"
            )
        if c["in_channels"] != c["out_channels"]:
            raise UserError(f"config.json: in_channels={c['in_channels']} and out_channels={c['out_channels']} differ")
        if self.quantized:
            width = c["vq_embed_dim"] or c["latent_channels"]
            bottleneck = {"name": "vq", "codebook_size": c["num_vq_embeddings"], "codebook_init": "uniform"}
        else:
            if c["use_quant_conv"] != c["use_post_quant_conv"]:
                raise UserError("config.json: use_quant_conv and use_post_quant_conv differ, which is not supported")
            width, bottleneck = (c["latent_channels"] if c["use_quant_conv"] else None), {"name": "gaussian"}
        size = c["sample_size"]
        both = {
            "name": "latent",
            "image_size": (size, size) if isinstance(size, int) else tuple(size),
            "channels": c["in_channels"],
            "widths": tuple(c["block_out_channels"]),
            "layers_per_block": c["layers_per_block"],
            "groups": c["norm_num_groups"],
            "attention": attention[0] if any(attention[0]) else (),
            "mid_attention": c["mid_block_add_attention"],
            "latent_channels": c["latent_channels"],
            "embed_dim": width,
            "scaling_factor": c["scaling_factor"],
            **fields,
        }
        for field in fields:
            if field not in LatentFields.__dataclass_fields__:
                raise UserError(f"interop: no block of this model has a field {field!r}")
        halves = {"encoders": {"image": {**both, "bottleneck": bottleneck}}, "decoders": {"image": both}}
        return {"centre": "image", "backbone": None, **halves}

    def _attention(self, c: Mapping[str, Any], half: str) -> tuple[bool, ...]:
        plain, attending = TYPES[half]
        found = c.get(f"{'down' if half == 'encoder' else 'up'}_block_types") or [plain] * len(c["block_out_channels"])
        if set(found) - {plain, attending} or len(found) != len(c["block_out_channels"]):
            raise UserError(
                f"config.json: a {self.kind!r} with blocks {', '.join(found)} is not supported, only {plain} and "
                f"{attending}, one for each of {len(c['block_out_channels'])} levels"
            )
        return tuple(name == attending for name in found)

    def parameters(self, cfg: Mapping[str, Any], take: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """{path: array} of the tensors."""
        return {path: load(_tensor(take, name)) for name, path, (load, _) in self._rows(cfg["encoders"]["image"])}

    def write(self, model: VFM) -> dict[str, Any] | None:
        """config.json of a model, or None if it is not one of this class."""
        first, second = model.encoders.get("image"), model.decoders.get("image")
        if type(first) is not LatentEncoder or type(second) is not LatentDecoder:
            return None
        attention = tuple(first.attention) or (False,) * len(first.widths)
        c = {
            "act_fn": "silu",
            "in_channels": first.channels,
            "out_channels": first.channels,
            "block_out_channels": list(first.widths),
            "down_block_types": [TYPES["encoder"][a] for a in attention],
            "up_block_types": [TYPES["decoder"][a] for a in reversed(attention)],
            "layers_per_block": first.layers_per_block,
            "latent_channels": first.latent_channels,
            "norm_num_groups": first.groups,
            "sample_size": first.image_size[0] if len(set(first.image_size)) == 1 else list(first.image_size),
            "scaling_factor": first.scaling_factor,
            "mid_block_add_attention": first.mid_attention,
        }
        if self.quantized:
            c |= {"norm_type": "group", "vq_embed_dim": first.embed_dim, "lookup_from_codebook": False}
            c["num_vq_embeddings"] = first.bottleneck.get("codebook_size")
        else:
            c |= dict.fromkeys(OF_KL, first.embed_dim is not None)
        again = model_lib.build(self.read(c, {}))
        return c if _meaning(again) == _meaning(model) else None

    def tensors(self, model: VFM, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{name: tensor} of the parameters; of a codebook in a collection of its own too."""
        first = model.encoders["image"]
        fields = {name: getattr(first, name) for name in first.__dataclass_fields__ if name not in ("parent", "name")}
        values = {**params}
        if self.quantized:
            values[CODEBOOK] = params.get(CODEBOOK, 0) + sum(
                params.get(f"codebook/{CODEBOOK}".replace("/embedding", f"/{part}"), 0)
                for part in ("embedding", "offset")
            )
        return {name: save(values[path]) for name, path, (_, save) in self._rows(fields)}

    def _rows(self, fields: Mapping[str, Any]) -> Iterator[Row]:
        """(tensor, our path, (tensor -> array, the inverse)) of all."""
        levels, attention = len(fields["widths"]), tuple(fields["attention"]) or (False,) * len(fields["widths"])
        for half in ("encoder", "decoder"):
            ours, encodes = f"{half}s_image/", half == "encoder"
            yield from _conv(f"{half}.conv_in", f"{ours}conv_in")
            yield from _mid(f"{half}.mid_block.", f"{ours}mid/", fields["mid_attention"])
            for i in range(levels):
                level, way = (i, "down") if encodes else (levels - 1 - i, "up")
                theirs = f"{half}.{way}_blocks.{i}."
                for j in range(fields["layers_per_block"] + (not encodes)):
                    block = f"{ours}{way}_{level}_block_{j}/"
                    shortcut = _changes(fields["widths"], level, j, encodes)
                    yield from _residual(f"{theirs}resnets.{j}.", block, shortcut)
                    if attention[level]:
                        yield from _attend(f"{theirs}attentions.{j}.", f"{ours}{way}_{level}_attention_{j}/")
                if i < levels - 1:
                    sampler = "downsamplers" if encodes else "upsamplers"
                    yield from _conv(f"{theirs}{sampler}.0.conv", f"{ours}{way}_{level}/conv")
            yield from _norm(f"{half}.conv_norm_out", f"{ours}norm_out")
            yield from _conv(f"{half}.conv_out", f"{ours}conv_out")
            if fields["embed_dim"] is not None:
                yield from _conv("quant_conv" if encodes else "post_quant_conv", f"{ours}conv_quant")
        if self.quantized:
            yield "quantize.embedding.weight", CODEBOOK, SAME


FAMILIES = {"AutoencoderKL": Autoencoder("AutoencoderKL", False), "VQModel": Autoencoder("VQModel", True)}


def _changes(widths, level: int, block: int, encodes: bool) -> bool:
    """Whether a residual block changes the number of channels."""
    before = level - 1 if encodes else level + 1
    return block == 0 and 0 <= before < len(widths) and widths[before] != widths[level]


def _conv(theirs: str, ours: str) -> list[Row]:
    return [(f"{theirs}.weight", f"{ours}/kernel", CONV), (f"{theirs}.bias", f"{ours}/bias", SAME)]


def _norm(theirs: str, ours: str) -> list[Row]:
    return [(f"{theirs}.weight", f"{ours}/scale", SAME), (f"{theirs}.bias", f"{ours}/bias", SAME)]


def _residual(theirs: str, ours: str, shortcut: bool) -> list[Row]:
    rows = []
    for i in range(2):
        rows += _norm(f"{theirs}norm{i + 1}", f"{ours}norm_{i}") + _conv(f"{theirs}conv{i + 1}", f"{ours}conv_{i}")
    return rows + (_conv(f"{theirs}conv_shortcut", f"{ours}conv_shortcut") if shortcut else [])


def _attend(theirs: str, ours: str) -> list[Row]:
    rows = _norm(f"{theirs}group_norm", f"{ours}norm")
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rows += [
            (f"{theirs}to_{short}.weight", f"{ours}attention/{name}/kernel", HEAD),
            (f"{theirs}to_{short}.bias", f"{ours}attention/{name}/bias", HEAD_BIAS),
        ]
    out = f"{ours}attention/out"
    return [
        *rows,
        (f"{theirs}to_out.0.weight", f"{out}/kernel", HEAD_OUT),
        (f"{theirs}to_out.0.bias", f"{out}/bias", SAME),
    ]


def _mid(theirs: str, ours: str, attention: bool) -> list[Row]:
    rows = [row for i in range(2) for row in _residual(f"{theirs}resnets.{i}.", f"{ours}block_{i}/", False)]
    return rows + (_attend(f"{theirs}attentions.0.", f"{ours}attention_0/") if attention else [])


def _tensor(take: Callable[[str], np.ndarray], name: str) -> np.ndarray:
    """A tensor by its name, or by the older one."""
    try:
        return take(name)
    except UserError:
        place, dot, rest = name.partition(".attentions.")
        number, _, layer = rest.partition(".")
        layer, _, kind = layer.rpartition(".")
        if not dot or OLDER[layer] == layer:
            raise
        try:
            return take(f"{place}{dot}{number}.{OLDER[layer]}.{kind}")
        except UserError:
            pass
        raise


def _meaning(model: VFM) -> Any:
    """What a model computes, of its fields: all but what only training reads."""
    free = ("dtype", "parent", "name", "in_width", "learned_scale", "bottleneck")
    blocks = [
        {name: getattr(block, name) for name in block.__dataclass_fields__ if name not in free}
        for group in (model.encoders, model.decoders)
        for block in group.values()
    ]
    trained = ("update", "decay", "codebook_init", "restart")
    neck = {k: v for k, v in model.encoders["image"].bottleneck.items() if k not in trained and v is not False}
    groups = [
        sorted(getattr(model, kind)) for kind in ("encoders", "decoders", "input_projectors", "output_projectors")
    ]
    for block in blocks:
        block["attention"] = tuple(block["attention"]) if any(block["attention"]) else ()
        block["image_size"], block["widths"] = tuple(block["image_size"]), tuple(block["widths"])
    return groups, model.backbone, blocks, neck
