"""Stages of training: parameters that start from those of another model, and proof that the frozen ones stay.

The section `config.init`:

    path        folder of a run, or of published weights (config.json and *.safetensors); "": a random start
    checkpoint  of a run: "latest", "best" or a step
    match       rows, the first that matches a whole parameter path wins: a regex, for parameters of the same path
                there; (regex, path there), where \\1 stands for the regex's first group; (regex, path there or "" for
                the same, folder), with a folder of its own. (): every parameter

Parameters without a row keep their random start. A row is never passed over in silence: a parameter that it asks for
and that is not there, or has another shape, is refused.
"""

import difflib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vfm import tokenizers, tree
from vfm.errors import UserError, unknown
from vfm.interop import huggingface
from vfm.report import write_json
from vfm.train.checkpoint import Checkpointer

FIELDS = ("path", "checkpoint", "match")
RECORD = "parameters.json"


class Wanted(NamedTuple):
    """One leaf of the state and where it is to come from."""

    collection: str  # of the model's variables: "params", "batch_stats", …
    path: str
    folder: str
    theirs: str


def wanted(cfg: Mapping[str, Any], variables: Mapping[str, Any]) -> list[Wanted]:
    """What `config.init` asks for, of the model's variables {"params": …} or their shapes; no folder is opened.

    Rows speak of parameters. Other collections (batch statistics, constants) follow the parameters' rows by path.
    Raises `UserError` for unknown fields, rows of another form, and rows that match nothing.
    """
    for field in cfg:
        if field not in FIELDS:
            raise unknown("field", field, FIELDS, "config.init")
    folder, given = cfg.get("path", ""), tuple(cfg.get("match", ()))
    if not folder and not given:
        return []
    rows = [_row(row, folder) for row in given or (".*",)]
    table = [(regex, n) for n, (regex, _, _) in enumerate(rows)] + [(".*", -1)]
    found = []
    for collection, leaves in variables.items():
        matched = tree.match(leaves, table, "config.init.match", allow_unused=collection != "params")
        for path, n in tree.flatten(matched).items():
            if n >= 0:
                regex, theirs, source = rows[n]
                found.append(Wanted(collection, path, source, _expand(regex, path, theirs)))
    return found


def _row(row, folder: str) -> tuple[str, str, str]:
    """(regex, path there or "", folder)"""
    parts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, tuple | list) else ()
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, str) for part in parts):
        raise UserError(f"config.init.match: {row!r} is neither a regex, (regex, path), nor (regex, path, folder)")
    regex, theirs, source = (*parts, *("", "", folder)[len(parts) :])
    if not source:
        raise UserError(f"config.init.match: the row {row!r} has no folder; set config.init.path")
    return regex, theirs, source


def _expand(regex: str, path: str, theirs: str) -> str:
    try:
        return re.fullmatch(regex, path).expand(theirs) if theirs else path
    except (re.error, IndexError) as error:
        raise UserError(f"config.init.match: {theirs!r} cannot be filled in for {regex!r}: {error}") from None


def begin(experiment, state) -> tuple[Any, dict[str, Any]]:
    """(the state as `config.init` has it, the record of where its parameters come from).

    The average and what the objective keeps beside the model (a teacher) start from the loaded parameters too. The
    record: {"loaded": {path: "folder, step: path there"}, "random": [path], "frozen": see `frozen`}.
    """
    config, abstract = experiment.config, experiment.abstract_state
    leaves: dict[tuple[str, str], Any] = {}
    record: dict[str, Any] = {"loaded": {}, "random": []}
    for folder in dict.fromkeys(item.folder for item in experiment.initial):
        items = [item for item in experiment.initial if item.folder == folder]
        shapes = [_leaf(abstract, item) for item in items]
        found, name = _read(folder, items, shapes, experiment)
        for item, leaf in zip(items, found, strict=True):
            leaves[item.collection, item.path] = leaf
            if item.collection == "params":
                record["loaded"][item.path] = f"{name}: {item.theirs}"

    def replaced(collection: str, branch):
        return jax.tree.map(lambda path, leaf: leaves.get((collection, path), leaf), tree.paths(branch), branch)

    if leaves:
        params = replaced("params", state.params)
        variables = {name: replaced(name, branch) for name, branch in state.variables.items()}
        more = getattr(experiment.loss_fn, "variables", None)
        if more is not None:
            shardings = {name: experiment.shardings.variables[name] for name in jax.eval_shape(more, params)}
            variables |= jax.jit(more, out_shardings=shardings)(params)
        # A copy: the average must not share its buffer with parameters that are donated.
        average = jax.tree.map(jnp.copy, params) if jax.tree.leaves(state.ema) else state.ema
        state = state.replace(params=params, variables=variables, ema=average)
    record["random"] = [path for path in tree.flatten(state.params) if path not in record["loaded"]]
    return state, record | frozen(config.optimizer.get("frozen") or (), state.params)


def resume(experiment, state, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on. Other rows of frozen parameters than at its start are counted from here."""
    rows = list(experiment.config.optimizer.get("frozen") or ())
    if record.get("frozen", {}).get("rows", []) == rows:
        return record
    return {name: value for name, value in record.items() if name != "frozen"} | frozen(rows, state.params)


def model_variables(experiment) -> dict[str, Any]:
    """The shapes of the model's own variables in the state: without what the objective keeps."""
    state = experiment.abstract_state
    own = jax.eval_shape(getattr(experiment.loss_fn, "variables", lambda params: {}), state.params)
    return {"params": state.params, **{name: leaf for name, leaf in state.variables.items() if name not in own}}


def _leaf(state, item: Wanted) -> jax.ShapeDtypeStruct:
    branch = state.params if item.collection == "params" else state.variables[item.collection]
    return tree.flatten(branch)[item.path]


def _read(folder: str, items: list[Wanted], shapes: list, experiment) -> tuple[list[jax.Array], str]:
    """The leaves in the shapes, dtypes and shardings asked for, and the name of their source."""
    path = pathlib.Path(folder).expanduser()
    if (path / "checkpoints").is_dir():
        found, name = _read_run(path, items, shapes, experiment)
    elif (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        _, variables = huggingface.load(str(path), mesh=experiment.mesh, rules=experiment.rules)
        found, name = {name: tree.flatten(branch) for name, branch in variables.items()}, str(path)
    else:
        raise UserError(
            f"config.init: {path} is neither the folder of a run (checkpoints/) nor one of published weights "
            "(config.json and *.safetensors)"
        )
    taken, leaves = set(), []
    for item, shape in zip(items, shapes, strict=True):
        known = found.get(item.collection, {})
        if item.theirs not in known:
            near = difflib.get_close_matches(item.theirs, known, n=1)
            raise UserError(
                f"config.init: {path} has no parameter {item.theirs!r} for {item.path!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"it has {_blocks(known) or 'none'}")
            )
        leaf = known[item.theirs]
        if leaf.shape != shape.shape:
            raise UserError(
                f"config.init: {item.path} has shape {shape.shape}, but {item.theirs} in {path} has {leaf.shape}"
            )
        # What is donated once must not be another leaf's buffer too.
        leaf = jnp.copy(leaf) if (item.collection, item.theirs) in taken else leaf
        taken.add((item.collection, item.theirs))
        leaves.append(jax.device_put(leaf.astype(shape.dtype), shape.sharding))
    return leaves, name


def _read_run(path: pathlib.Path, items: list[Wanted], shapes: list, experiment):
    """({collection: {path: array}}, name) of a run: of its average where it keeps one, as in its evaluation."""
    checkpoint = experiment.config.init.get("checkpoint", "latest")
    try:
        config = json.loads((path / "config.json").read_bytes())
        tokenizer, averaged = dict(config["tokenizer"]), bool(config["train"]["ema"])
        best = {"best_metric": config["checkpoint"]["best_metric"] or None}
        best["best_mode"] = config["checkpoint"]["best_mode"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"config.init: {path / 'config.json'} is not the config of a run") from None
    if any(item.path.startswith(("encoders_text/", "decoders_text/")) for item in items):
        _check_tokenizer(path, tokenizer, experiment.tokenizer)
    branch = "ema" if averaged else "params"
    place = lambda item: (
        f"{branch}/{item.theirs}" if item.collection == "params" else (f"variables/{item.collection}/{item.theirs}")
    )
    abstract = tree.unflatten({place(item): shape for item, shape in zip(items, shapes, strict=True)})
    step = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    with Checkpointer(path / "checkpoints", read_only=True, **best) as checkpointer:
        restored, step = checkpointer.restore_partial(abstract, step)
    found: dict[str, dict] = {}
    restored = tree.flatten(restored)
    for item in items:
        found.setdefault(item.collection, {})[item.theirs] = restored[place(item)]
    return found, f"{path}, step {step}"


def _check_tokenizer(path: pathlib.Path, cfg: Mapping[str, Any], ours) -> None:
    """Refuses tables of tokens whose ids mean something else here. One whose files are gone cannot be compared."""
    try:
        theirs = tokenizers.load(path / "tokenizer") if (path / "tokenizer").is_dir() else tokenizers.build(cfg)
    except UserError:
        return
    for i in range(min(ours.vocab_size, theirs.vocab_size)):
        if ours.decode_bytes([i]) != theirs.decode_bytes([i]):
            raise UserError(
                f"config.init: id {i} is {theirs.decode_bytes([i])!r} in {path}, and {ours.decode_bytes([i])!r} in "
                "config.tokenizer; use the same tokenizer (one that was trained: config.tokenizer.name=file, "
                f"config.tokenizer.path={path / 'tokenizer'})"
            )


# ------------------------------------------------------------------------------------ frozen parameters


def frozen(rows: Iterable[str], params) -> dict[str, Any]:
    """{"frozen": {"rows", "parameters", "sha256"}} of the parameters that the regexes match; {} without any."""
    rows = list(rows)
    leaves = _frozen(rows, params)
    if not leaves:
        return {}
    return {"frozen": {"rows": rows, "parameters": tree.count(leaves), "sha256": tree.digest(leaves)}}


def _frozen(rows: list[str], params) -> dict[str, Any]:
    patterns = [re.compile(row) for row in rows]
    return {path: leaf for path, leaf in tree.flatten(params).items() if any(p.fullmatch(path) for p in patterns)}


def verify(record: Mapping[str, Any], *branches) -> None:
    """Raises `RuntimeError` if the frozen parameters of the record are others now, in any of the branches."""
    if "frozen" not in record:
        return
    before = record["frozen"]
    for params in branches:
        now = frozen(before["rows"], params).get("frozen", {})
        if now != before:
            raise RuntimeError(
                f"frozen parameters moved: {before['rows']} had SHA-256 {before['sha256'][:12]} at the start of the "
                f"run and have {now.get('sha256', 'none')[:12]} now"
            )


# ------------------------------------------------------------------------------------ the record on disk


def write(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Writes the record of a run that loaded or froze something."""
    if record.get("loaded") or "frozen" in record:
        write_json(folder / RECORD, record)


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The record of a run that was begun; {} if there is none."""
    try:
        return dict(json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def tell(record: Mapping[str, Any]) -> list[str]:
    """The record in lines: what was loaded from where, what stayed random, what is frozen."""
    lines, by_source = [], {}
    for path, source in record.get("loaded", {}).items():
        by_source.setdefault(source.rpartition(": ")[0], []).append(path)
    for source, paths in by_source.items():
        lines.append(f"loaded {len(paths)} parameter arrays from {source}: {_blocks(paths)}")
    if lines:
        lines.append(f"{len(record['random'])} at their random start: {_blocks(record['random']) or 'none'}")
    if "frozen" in record:
        about = record["frozen"]
        lines.append(f"{about['parameters']:,} parameters are frozen (SHA-256 {about['sha256'][:12]})")
    return lines


def _blocks(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.split(tree.SEPARATOR)[0] for path in paths}))
