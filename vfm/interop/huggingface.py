"""Published weights: folders with config.json and safetensors, as the `transformers` library writes them."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm import model as model_lib
from vfm import sharding, tree
from vfm.blocks import TABLES, build_block
from vfm.errors import UserError, unknown
from vfm.interop import audio, bart, bert, clip, diffusers, gpt, llama, llava, t5, vit
from vfm.interop.weights import Family, Files, Tensor, read_config
from vfm.model import VFM

FAMILIES: dict[str, Family] = {
    **gpt.FAMILIES,
    **llama.FAMILIES,
    **bert.FAMILIES,
    **t5.FAMILIES,
    **bart.FAMILIES,
    **vit.FAMILIES,
    **clip.FAMILIES,
    **llava.FAMILIES,
    **audio.FAMILIES,
}
# Without an architecture in config.json.
_USUAL = ("lm", "mlm", "none")
_SHARD = 4 << 30  # bytes of one file
# Fields that say how a model is run and trained, and not what it computes.
_FREE = ("dropout", "remat", "dtype", "max_len", "in_width", "any_size", "interpolation", "patch_dropout")
_FREE += ("mask_time", "mask_mel", "num_masks")
_FRONT_END = "preprocessor_config"  # the name of its file, and of the field that holds it for the families


def load(
    path: str, *, mesh: jax.sharding.Mesh | None = None, rules: Mapping[str, Any] = sharding.RULES,
    param_dtype: str = "float32", dtype: str = "float32", **fields: Any,
) -> tuple[VFM, dict[str, Any]]:  # fmt: skip
    """The model of a folder, and its variables {"params": …} (BART has {"constants": …} as well).

    Args:
      path: folder with config.json and *.safetensors (one file, or several with an index).
      mesh, rules: where the parameters go (see `vfm.sharding`); None: the first device. Tensors are read one after the
        other, and of each only the parts that this process's devices hold are kept.
      param_dtype: of the parameters, whatever the files hold. dtype: of the computation.
      fields: other values for fields of the backbone, or of the encoders that have them where there is no backbone,
        such as remat="full", dropout=0.1, any_size=True.

    Folders in the layout of `diffusers` are read by `vfm.interop.diffusers`.

    `model.apply(variables, tokens=int32[B, T], input_mask=bool[B, T], train=False)` gives (logits, out), see `VFM`;
    encoder–decoders also take decoder_tokens, and models of images inputs={"image": float[B, N, H, W, C]}, normalised
    as they were in training (CLIP and SigLIP also "text": int32[B, N, T], all positions filled). Those of sounds take
    inputs={"audio": float[B, N, S]}, waveforms or what the front end makes of them; Whisper also
    starts={"audio": zeros int32[B, 1]}, input_mask=bool[B, P], all true for the P features of the sound, and
    decoder_tokens. Raises `UserError` for an architecture that is not supported, for a tensor that is missing, has
    another shape, or has no place.
    """
    folder = pathlib.Path(path).expanduser()
    c = read_config(folder, "config.json")
    if (folder / f"{_FRONT_END}.json").is_file():
        c[_FRONT_END] = read_config(folder, f"{_FRONT_END}.json")
    if "_class_name" in c:
        return diffusers.load(path, mesh=mesh, rules=rules, param_dtype=param_dtype, dtype=dtype, **fields)
    kind = c.get("model_type")
    if kind not in FAMILIES:
        raise unknown("model_type", kind, FAMILIES, f"{folder / 'config.json'}")
    family, files = FAMILIES[kind], Files(folder)
    head = _head(c, kind, family, files.names)
    try:
        cfg = family.read(c, head)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: the field {error} of a {kind!r} model is missing") from None
    _override(cfg, fields)
    model = model_lib.build({**cfg, "dtype": dtype})
    length = 8 if model.backbone is None else min(8, model.backbone.max_len)
    shapes = _flatten(jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), length)))
    if mesh is None:
        mesh = sharding.make_mesh({}, jax.devices()[:1])
    shardings = tree.flatten(sharding.parameter_shardings(tree.unflatten(shapes), mesh, rules))
    parts = {path: _Parts(shapes[path].shape, shardings[path], jnp.dtype(param_dtype)) for path in shapes}
    used = set()
    for row in family.tensors(describe(model)):
        _place(row, family, files, parts, shapes, used)
    if left := sorted(set(shapes) - {path for path, part in parts.items() if part.filled}):
        raise UserError(f"interop: the weight map of {kind!r} gives nothing for the parameter {left[0]}")
    ignored = [re.compile(regex) for regex in family.ignored]
    tied = {"lm_head.weight", "embed_out.weight"} if _tied(model) else set()
    left = [n for n in files.names if n not in used | tied and not any(r.fullmatch(n) for r in ignored)]
    if left:
        raise UserError(
            f"{folder}: {len(left)} tensor(s) have no place in a {kind!r} model with head {head!r}, the first: "
            f"{left[0]}"
        )
    found = tree.unflatten({path: part.array() for path, part in parts.items()})
    return model, {"params": found, **({"constants": found.pop("constants")} if "constants" in found else {})}


def save(path: str, model: VFM, variables: Mapping[str, Any], **config: Any) -> None:
    """Writes a folder that `transformers` loads: config.json and safetensors with the parameters as they are.

    config: further fields of config.json that the model does not know, such as eos_token_id=2, pad_token_id=0.

    The family is the first whose config.json can say all that the model's fields say; `UserError` if there is none.
    With several processes all must call it; the first one writes.
    """
    from safetensors.numpy import save_file

    kind, c = _family_of(model)
    front_end = c.pop(_FRONT_END, None)
    ids = () if model.backbone is None else ("bos_token_id", "eos_token_id", "pad_token_id")
    c = {**dict.fromkeys(ids), **c, **config}
    folder = pathlib.Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    params, family = _flatten(variables), FAMILIES[kind]
    prefix = family.prefix if model.decoders.get("text") or _head_of(model) not in ("none", "pooled") else ""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for row in family.tensors(describe(model)):
        values = [_host(params[path]) for path in row.paths]
        depth, experts = _counts(row, [v.shape for v in values])
        for name, index in row.indices(depth, experts):
            tensor = np.asarray(row.join([value[index] for value in values]), order="C")
            if size and size + tensor.nbytes > _SHARD:
                shards.append({})
                size = 0
            shards[-1][name.replace("@", prefix)] = tensor
            size += tensor.nbytes
    if jax.process_index() != 0:
        return
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        index = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    for name, shard in zip(names, shards):
        save_file(shard, folder / name, metadata={"format": "pt"})
    for name, content in (("config", c), (_FRONT_END, front_end)):
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _override(cfg: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Writes fields into the backbone of `config.model`, or, without one, into the encoders that have them."""
    blocks = [cfg["backbone"]] if cfg.get("backbone") else list(cfg["encoders"].values())
    if not cfg.get("backbone"):
        blocks += [block["backbone"] for block in blocks if "backbone" in block]
    tables = {**TABLES["encoders"], **TABLES["backbone"]}
    for field, value in fields.items():
        known = [block for block in blocks if field in tables[block["name"]].__dataclass_fields__]
        if not known:
            raise UserError(f"interop: no block of this model has a field {field!r}")
        for block in known:
            block[field] = value


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf; the paths of what has no gradient begin with `constants/`."""
    rest = {"constants": variables["constants"]} if "constants" in variables else {}
    return tree.flatten({**variables["params"], **rest})


def describe(model: VFM) -> dict[str, Any]:
    """All fields of all blocks, as `config.model` with nothing left to defaults: what the weight maps read."""
    tables = {kind: {cls: name for name, cls in table.items()} for kind, table in TABLES.items()}

    def fields(kind, block):
        own = block.__dataclass_fields__
        if type(block) not in tables[kind]:
            raise UserError(f"interop: {type(block).__name__} of model.{kind} is a block that no published family has")
        return {
            "name": tables[kind][type(block)],
            **{name: getattr(block, name) for name in own if name not in ("parent", "name")},
        }

    def backbone(block):
        b = fields("backbone", block)
        if "num_kv_heads" not in b:
            raise UserError(f"interop: model.backbone.name={b['name']!r} is one that no published family has")
        b["num_kv_heads"] = b["num_kv_heads"] or b["num_heads"]
        b["head_dim"] = b["head_dim"] or b["width"] // b["num_heads"]
        for name in ("qkv_bias", "out_bias", "mlp_bias", "norm_bias"):
            b[name] = b["use_bias"] if b[name] is None else b[name]
        b["key_bias"] = b["qkv_bias"] if b["key_bias"] is None else b["key_bias"]
        for name in ("depth", "num_heads", "mlp_dim"):
            if f"decoder_{name}" in b:
                b[f"decoder_{name}"] = b[f"decoder_{name}"] or b[name]
        if b["attention_scale"] == b["head_dim"] ** -0.5:
            b["attention_scale"] = None
        return b

    found: dict[str, Any] = {"centre": model.centre, "backbone": model.backbone and backbone(model.backbone)}
    found["alignment"] = model.alignment and dict(model.alignment)
    for kind in ("encoders", "input_projectors", "output_projectors", "decoders"):
        found[kind] = {name: fields(kind, block) for name, block in getattr(model, kind).items()}
    for name, block in found["encoders"].items():
        if block["name"] == "text_transformer":
            cfg = {"max_len": block["length"], **block["backbone"], "width": block["width"]}
            block["backbone"] = backbone(build_block(TABLES["backbone"], cfg, name, block["dtype"]))
    return found


def _meaning(model: VFM) -> dict[str, Any]:
    """What a description says about the function: fields that have no effect, and free ones, left out."""
    d = describe(model)
    d["backbone"] = d["backbone"] and _backbone_meaning(d["backbone"])
    if d["alignment"]:  # where training begins, and what bounds it
        for field in ("temperature", "max_scale"):
            d["alignment"].pop(field)
        d["alignment"]["bias"] = d["alignment"]["bias"] is not None
    for name, block in d["encoders"].items():
        if block["name"] == "ast":
            block.pop("num_samples")
            block["num_frames"] = model.encoders[name].length
        if block["name"] == "text_transformer":
            block["backbone"] = _backbone_meaning(block["backbone"])
            if block["pooling"] != "end":
                block.pop("end_id")
        if block["name"] == "vit" and block["positions"] != "rope":
            block.pop("rope_theta")
    for block in d["decoders"].values():
        if not block.get("transform"):
            block.pop("norm_epsilon", None)
    for kind in ("encoders", "input_projectors", "output_projectors", "decoders"):
        for block in d[kind].values():
            for field in _FREE:
                block.pop(field, None)
    return d


def _backbone_meaning(b: dict[str, Any]) -> dict[str, Any]:
    """The same of a backbone."""
    dead = [*_FREE, "cross", "causal", "use_bias"]
    if b["positions"] in ("learned", "sinusoidal"):
        dead.remove("max_len")
    else:
        dead.append("position_offset")
    if b["positions"] != "rope":
        dead += ["rope_theta", "rope_fraction", "rope_scaling", "rope_interleaved", "local_rope_theta"]
    if b["positions"] != "relative":
        dead += ["relative_buckets", "relative_max_distance"]
    if b["num_experts"] is None:
        dead += ["experts_per_token", "normalise_weights"]
    else:
        dead += ["gated", "mlp_bias"]
    if b["norm"] != "layernorm":
        dead.append("norm_bias")
    if b["window"] is None:
        dead += ["local_layers", "local_rope_theta"]
    elif all(b["local_layers"]):
        dead.append("local_layers")
    else:
        b["local_layers"] = tuple(np.resize(b["local_layers"], b["depth"]).tolist())
    return {field: value for field, value in b.items() if field not in dead}


def _family_of(model: VFM) -> tuple[str, dict[str, Any]]:
    """The family that can say what the model is, and its config.json."""
    d, head, meaning = describe(model), _head_of(model), _meaning(model)
    simple = set(model.decoders) <= {"text", "label"} and not model.output_projectors
    for kind, family in FAMILIES.items() if simple else ():
        if set(model.encoders) != set(family.encoders) or (model.backbone is None and family.encoders == ("text",)):
            continue
        architectures = [name for name, h in family.heads.items() if h == ("none" if head == "pooled" else head)]
        c = family.write(d, head) if architectures else None
        if c is None:
            continue
        c = {"architectures": architectures[:1], "model_type": kind, **c}
        if head == "classification":
            count = c.pop("num_labels")
            c["id2label"] = {str(n): f"LABEL_{n}" for n in range(count)}
            c["label2id"] = {label: int(n) for n, label in c["id2label"].items()}
        try:
            again = model_lib.build(family.read(json.loads(json.dumps(c)), head))
        except UserError:
            continue
        if _meaning(again) == meaning:
            return kind, c
    what = type(model.backbone).__name__ if model.backbone is not None else f"encoders {', '.join(model.encoders)}"
    raise UserError(f"interop: no family can express this model ({what}); supported: {', '.join(FAMILIES)}")


def _head_of(model: VFM) -> str:
    text, label = model.decoders.get("text"), model.decoders.get("label")
    if text is not None and label is not None:
        return "pretraining"
    if text is not None:
        return "mlm" if text.transform else "lm"
    if label is not None:
        return "pooled" if label.num_classes is None else "classification"
    return "none"


def _head(c: Mapping[str, Any], kind: str, family: Family, names) -> str:
    architectures = c.get("architectures") or []
    if not architectures:
        head = next(h for h in _USUAL if h in family.heads.values())
    elif architectures[0] in family.heads:
        head = family.heads[architectures[0]]
    else:
        raise unknown("architecture", architectures[0], family.heads, f"config.json of a {kind!r} model")
    if head == "none" and any(name.endswith("pooler.dense.weight") for name in names):
        return "pooled"
    return head


def _tied(model: VFM) -> bool:
    return bool(getattr(model.decoders.get("text"), "tied", False))


class _Parts:
    """A parameter under way: the pieces of it that this process's devices hold."""

    def __init__(self, shape, sharding_, dtype):
        self.shape, self.sharding, self.dtype = tuple(shape), sharding_, dtype
        self.devices = sharding_.addressable_devices_indices_map(self.shape)
        self.pieces: dict[tuple, np.ndarray] = {}
        self.filled = False

    def fill(self, index: tuple[int, ...], value: np.ndarray) -> None:
        """Writes the value of one layer (and expert) into the pieces that hold a part of it."""
        self.filled = True
        for where in self.devices.values():
            spans = tuple(slice(*s.indices(n)) for s, n in zip(where, self.shape))
            key = tuple((s.start, s.stop) for s in spans)
            if key not in self.pieces:
                self.pieces[key] = np.empty([s.stop - s.start for s in spans], self.dtype)
            lead = spans[: len(index)]
            if all(s.start <= i < s.stop for i, s in zip(index, lead)):
                at = tuple(i - s.start for i, s in zip(index, lead))
                self.pieces[key][at] = value[spans[len(index) :]].astype(self.dtype)

    def array(self) -> jax.Array:
        def piece(where):
            spans = (slice(*s.indices(n)) for s, n in zip(where, self.shape))
            return self.pieces[tuple((s.start, s.stop) for s in spans)]

        arrays = [jax.device_put(piece(where), device) for device, where in self.devices.items()]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _counts(row: Tensor, shapes) -> tuple[int, int]:
    """Layers and experts of the parameters of a row."""
    depth = shapes[0][0] if "{i}" in row.name else 1
    return depth, shapes[0][1] if "{e}" in row.name else 1


def _place(row: Tensor, family: Family, files: Files, parts, shapes, used: set[str]) -> None:
    """Reads the tensors of one row of the weight map into their parameters."""
    for path in row.paths:
        if path not in shapes:
            raise UserError(f"interop: the weight map names the parameter {path}, which the model does not have")
    lead = ("{i}" in row.name) + ("{e}" in row.name)
    wanted = [tuple(shapes[path].shape[lead:]) for path in row.paths]
    depth, experts = _counts(row, [shapes[path].shape for path in row.paths])
    # A layout may reshape, which any tensor with as many numbers would pass.
    long = lambda shape: [n for n in shape if n != 1]
    stored = long(row.join([np.zeros(shape, np.float32) for shape in wanted]).shape)
    for name, index in row.indices(depth, experts):
        name = files.find(name, family.prefix)
        used.add(name)
        tensor = files.read(name)
        try:
            values = row.split(tensor, wanted) if long(tensor.shape) == stored else []
            fits = all(value.shape == shape for value, shape in zip(values, wanted, strict=True))
        except ValueError:
            fits = False
        if not fits:
            raise UserError(
                f"{files.folder}: the tensor {name} has shape {tensor.shape}, which does not fit "
                f"{', '.join(f'{path} {shape}' for path, shape in zip(row.paths, wanted))}"
            )
        for path, value in zip(row.paths, values):
            parts[path].fill(index, value)


def _host(leaf) -> np.ndarray:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True) if jax.process_count() > 1 else np.asarray(leaf)
