"""Published weights of image generators: folders with config.json and safetensors in the layout of `diffusers`."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm import model as model_lib
from vfm import sharding, tree
from vfm.errors import UserError, unknown
from vfm.interop import autoencoder, dit
from vfm.interop.weights import Files, read_config
from vfm.model import VFM

# `_class_name` in config.json -> a module or object with
#   read(config.json, tensors) -> config.model
#   parameters(config.model, take) -> {path: array}; take(name) is a tensor of the folder
#   write(model) -> config.json, or None if this family cannot say what the model is
#   tensors(model, {path: array}) -> {name: array}; the paths of what has no gradient begin with `codebook/`
FAMILIES: dict[str, Any] = {"DiTTransformer2DModel": dit, **autoencoder.FAMILIES}
_FILE = "diffusion_pytorch_model.safetensors"


def load(
    path: str, *, mesh: jax.sharding.Mesh | None = None, rules: Mapping[str, Any] = sharding.RULES,
    param_dtype: str = "float32", dtype: str = "float32", **fields: Any,
) -> tuple[VFM, dict[str, Any]]:  # fmt: skip
    """The model of a folder, and its variables {"params": …}; arguments and errors as in `huggingface.load`. Every
    process reads all tensors into its memory first.

    fields: other values for fields of blocks that have them, such as remat="full" of a diffusion network.
    """
    folder = pathlib.Path(path).expanduser()
    c, opened = read_config(folder), Files(folder)
    files = {name: opened.read(name) for name in opened.names}
    kind = c.get("_class_name")
    if kind not in FAMILIES:
        raise unknown("_class_name", kind, FAMILIES, f"{folder / 'config.json'}")
    try:
        cfg = FAMILIES[kind].read(c, files, **fields)
    except KeyError as error:
        raise UserError(f"{folder}: {error} of a {kind!r} is missing") from None
    model = model_lib.build({**cfg, "dtype": dtype})
    shapes = tree.flatten(jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), 1))["params"])
    left = set(files)

    def take(name: str) -> np.ndarray:
        if name not in files:
            raise UserError(f"{folder}: the tensor {name} is missing")
        left.discard(name)
        return files[name]

    found = FAMILIES[kind].parameters(cfg, take)
    for place, shape in shapes.items():
        if place not in found:
            raise UserError(f"interop: the weight map of {kind!r} gives nothing for the parameter {place}")
        if found[place].shape != shape.shape:
            raise UserError(
                f"{folder}: the tensor for {place} has shape {found[place].shape}, but the model of config.json has "
                f"{shape.shape}"
            )
    if left:
        raise UserError(f"{folder}: {len(left)} tensor(s) have no place in a {kind!r}, the first: {min(left)}")
    mesh = sharding.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    where = tree.flatten(sharding.parameter_shardings(tree.unflatten(shapes), mesh, rules))
    put = lambda place: jax.device_put(found[place].astype(jnp.dtype(param_dtype)), where[place])
    return model, {"params": tree.unflatten({place: put(place) for place in shapes})}


def save(path: str, model: VFM, variables: Mapping[str, Any]) -> None:
    """Writes a folder that `diffusers` loads: config.json and safetensors with the parameters as they are.

    `UserError` if no family of the library can say what the model is. With several processes all must call it; the
    first one writes.
    """
    from jax.experimental import multihost_utils
    from safetensors.numpy import save_file

    written = {kind: family.write(model) for kind, family in FAMILIES.items()}
    kind = next((kind for kind, c in written.items() if c is not None), None)
    if kind is None:
        raise UserError(f"interop: none of {', '.join(FAMILIES)} can express this model")
    host = lambda x: multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)
    codebook = {"codebook": variables["codebook"]} if "codebook" in variables else {}
    params = {place: host(leaf) for place, leaf in tree.flatten({**variables["params"], **codebook}).items()}
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in FAMILIES[kind].tensors(model, params).items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})
    content = {"_class_name": kind, **written[kind]}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
