"""The encoder of a run that is over, with its parameters, as a network of features for something else."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.blocks import TABLES, build_block
from vfm.errors import UserError
from vfm.train.checkpoint import Checkpointer


def open_encoder(folder: str | pathlib.Path, name: str, where: str) -> tuple[dict[str, Any], nn.Module]:
    """(config of the run, its encoder of the modality `name`). Raises `UserError` for a folder that has none."""
    path = pathlib.Path(folder).expanduser()
    try:
        config = json.loads((path / "config.json").read_bytes())
        cfg, _ = config["model"]["encoders"][name], config["train"]["ema"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{where}={str(folder)!r} is not the folder of a run whose model has encoders.{name}") from None
    return config, build_block(TABLES["encoders"], cfg, f"{where}: model.encoders.{name}")


def restore_encoder(
    folder: str | pathlib.Path,
    config: Mapping[str, Any],
    encoder: nn.Module,
    name: str,
    place: jax.sharding.Sharding,
    checkpoint: str = "latest",
) -> dict[str, Any]:
    """The variables {"params": …, …} that the encoder has in a run: of its average where it keeps one, as in its own
    evaluation.

    encoder: that of `open_encoder`, or one that differs in what has no parameters. place: where the arrays go.
    """
    example = jnp.zeros((1, *encoder.item_shape), getattr(encoder, "item_dtype", "float32"))
    shapes = dict(jax.eval_shape(lambda: encoder.init(jax.random.key(0), example, train=False)))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    branch, block = "ema" if config["train"]["ema"] else "params", f"encoders_{name}"
    wanted: dict[str, Any] = {branch: {block: shapes.pop("params")}}
    if shapes:
        wanted["variables"] = {kind: {block: leaves} for kind, leaves in shapes.items()}
    with Checkpointer(pathlib.Path(folder).expanduser() / "checkpoints", read_only=True) as checkpointer:
        step = int(checkpoint) if checkpoint.isdecimal() else checkpoint
        found, _ = checkpointer.restore_partial(wanted, step)
    return {kind: leaves[block] for kind, leaves in {"params": found[branch], **found.get("variables", {})}.items()}
