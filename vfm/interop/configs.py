"""What the readers and writers of config.json share: activations, rotary scalings, windows, heads."""

from collections.abc import Mapping
from typing import Any

from vfm.errors import UserError, unknown
from vfm.layers.positions import SCALINGS

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
}


def activation(name: str, kind: str) -> str:
    """Our name of an activation."""
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS, f"config.json of a {kind!r} model")
    return _ACTIVATIONS[name]


def activation_name(name: str, tanh: str) -> str:
    """The name in config.json; `tanh`: what this family calls the tanh form of GELU."""
    return tanh if name == "gelu_tanh" else {"relu_squared": "relu2"}.get(name, name)


def refuse(c: Mapping[str, Any], kind: str, **allowed: Any) -> None:
    """Refuses options of a config.json that have another value than the one that this library implements."""
    for field, value in allowed.items():
        found = c.get(field, value)
        if found != value and not (not found and not value):
            raise UserError(f"config.json: a {kind!r} model with {field}={found!r} is not supported, only {value!r}")


def single(name: str, c, backbone, text, decoder, label, pad: int | None = None) -> dict[str, Any]:
    """`config.model` of a model of text alone, in which `decoder` and `label` may be None. pad: see `TextEncoder`."""
    vocabulary = {"vocab_size": c["vocab_size"]}
    text = {**text, "pad_id": pad}
    decoders = {} if decoder is None else {"text": {"name": "text", **vocabulary, **decoder}}
    if label is not None:
        decoders["label"] = {"name": "classifier", **label}
    return {
        "centre": "text",
        "encoders": {"text": {"name": "text", **vocabulary, "width": backbone["width"], **text}},
        "backbone": {"name": name, **backbone},
        "decoders": decoders,
    }


def num_labels(c: Mapping[str, Any]) -> int:
    """Classes of a classification head."""
    return len(c["id2label"]) if c.get("id2label") else c.get("num_labels", 2)


def label_decoder(c: Mapping[str, Any], head: str) -> dict[str, Any] | None:
    """The decoder of labels on the last token, if the head is one."""
    return {"num_classes": num_labels(c), "pooling": "last", "use_bias": False} if head == "classification" else None


def rope(c: Mapping[str, Any], fraction: float = 1.0) -> dict[str, Any]:
    """Fields of rotary positions, from `rope_parameters` or from `rope_theta` and `rope_scaling` of older files."""
    given = dict(c.get("rope_parameters") or {})
    local = None
    if "full_attention" in given or "sliding_attention" in given:  # one set for each type of layer
        sliding = given.get("sliding_attention") or {}
        given = dict(given.get("full_attention") or {})
        if sliding and {k: v for k, v in sliding.items() if v is not None} != given:
            if sliding.get("rope_type", "default") != "default":
                raise UserError("config.json: scaled rotary positions in sliding layers are not supported")
            local = sliding.get("rope_theta", 10_000.0)
    elif c.get("rope_local_base_freq") is not None:
        local = c["rope_local_base_freq"]
    theta = given.pop("rope_theta", c.get("rope_theta", 10_000.0))
    fraction = given.pop("partial_rotary_factor", c.get("partial_rotary_factor", fraction))
    scaling = {**(c.get("rope_scaling") or {}), **given}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fields = {
        "positions": "rope",
        "rope_theta": float(theta),
        "rope_fraction": float(1.0 if fraction is None else fraction),
        "local_rope_theta": None if local is None else float(local),
        "rope_scaling": None,
    }
    if kind in ("default", None):
        return fields
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in SCALINGS:
        raise unknown("rope_type", kind, ("default", *SCALINGS), "config.json")
    longest = c["max_position_embeddings"]
    original = scaling.pop("original_max_position_embeddings", None) or c.get("original_max_position_embeddings")
    found: dict[str, Any] = {"type": kind}
    if kind in ("linear", "dynamic", "yarn", "llama3") or (kind == "longrope" and scaling.get("factor")):
        found["factor"] = float(scaling.pop("factor", 1.0))
    if kind == "longrope":
        if c.get("original_max_position_embeddings"):
            found["factor"] = longest / original
        found |= {name: tuple(scaling.pop(name)) for name in ("short_factor", "long_factor")}
    if kind == "dynamic":
        found["original_max_len"] = longest
        original = None
    elif kind != "linear":
        found["original_max_len"] = original or longest
    names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    names += ("low_freq_factor", "high_freq_factor")
    found |= {name: scaling.pop(name) for name in names if scaling.get(name) is not None}
    rest = {name: value for name, value in scaling.items() if value is not None and name not in names}
    if rest:
        raise UserError(f"config.json: unknown field {next(iter(rest))!r} of rotary scaling {kind!r}")
    if kind in ("linear", "dynamic"):  # here max_position_embeddings is the length before scaling
        fields["max_len"] = int(longest * found["factor"])
    return {**fields, "rope_scaling": found}


def rope_parameters(b: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The inverse of `rope`: `rope_parameters` of config.json."""
    found: dict[str, Any] = {"rope_theta": b["rope_theta"], "rope_type": "default"}
    top: dict[str, Any] = {}
    if b["rope_fraction"] != 1:
        found["partial_rotary_factor"] = top["partial_rotary_factor"] = b["rope_fraction"]
    if b["rope_scaling"] is not None:
        scaling = dict(b["rope_scaling"])
        found["rope_type"] = scaling.pop("type")
        original = scaling.pop("original_max_len", None)
        if found["rope_type"] in ("linear", "dynamic"):
            top["max_position_embeddings"] = original or round(b["max_len"] / scaling["factor"])
        if found["rope_type"] == "longrope" and kind == "phi3":
            top["original_max_position_embeddings"] = original
        if original is not None and found["rope_type"] != "dynamic":
            found["original_max_position_embeddings"] = original
        found |= {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": b["local_rope_theta"] or b["rope_theta"]}
        return {"rope_parameters": {"full_attention": found, "sliding_attention": local}, **top}
    return {"rope_parameters": found, **top}


# Layers with local attention where config.json does not list them: i -> whether layer i has it.
_PATTERNS = {
    "gemma2": lambda i: i % 2 == 0,
    "gemma3_text": lambda i: (i + 1) % 6 != 0,
    "olmo3": lambda i: (i + 1) % 4 != 0,
}
_SWITCHED = ("qwen2", "qwen3", "qwen3_moe")  # a window only with use_sliding_window


def window(c: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Fields of local attention."""
    size, depth = c.get("sliding_window"), c["num_hidden_layers"]
    if kind in _SWITCHED and not c.get("use_sliding_window", False):
        size = None
    if size is None or (kind not in (*_PATTERNS, *_SWITCHED) and kind not in _WINDOWED):
        return {"window": None, "local_layers": (True,)}
    if c.get("layer_types"):
        local = tuple(name == "sliding_attention" for name in c["layer_types"])
    elif kind == "gemma3_text" and (every := c.get("sliding_window_pattern", c.get("_sliding_window_pattern"))):
        local = tuple((i + 1) % every != 0 for i in range(depth))
    elif kind in _PATTERNS:
        local = tuple(map(_PATTERNS[kind], range(depth)))
    elif kind in _SWITCHED and kind != "qwen3_moe":
        local = tuple(i >= c.get("max_window_layers", 28) for i in range(depth))
    else:
        local = (True,)
    if not any(local):
        return {"window": None, "local_layers": (True,)}
    return {"window": size, "local_layers": (True,) if all(local) else local}


_WINDOWED = ("mistral", "mixtral", "starcoder2", "phi3")


def window_fields(b: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The inverse of `window`."""
    local = [b["local_layers"][i % len(b["local_layers"])] and b["window"] is not None for i in range(b["depth"])]
    found: dict[str, Any] = {"sliding_window": b["window"]}
    if kind in _SWITCHED:
        found |= {"use_sliding_window": b["window"] is not None, "max_window_layers": 0 if all(local) else b["depth"]}
    if kind in _PATTERNS or kind in ("qwen2", "qwen3"):
        found["layer_types"] = ["sliding_attention" if x else "full_attention" for x in local]
        if b["window"] is None and kind in _PATTERNS:
            found["sliding_window"] = b["max_len"]
    return found
