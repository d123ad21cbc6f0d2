"""The folder of one run: config.json, metrics.jsonl, checkpoints/, results.json, report.html, figures/."""

import json
import pathlib
import tempfile
from typing import Any

from vfm.errors import UserError
from vfm.report import write_json

# These say what to do with a run, not what the run is; they may change between starts in one folder.
FREE = ("mode", "generate", "plan", "distributed", "eval.checkpoint", "allow_changed_config")
ABSENT = object()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {'a.b.c': value}, sorted; tuples as lists, as in JSON. An empty section is a value, {}."""
    if not hasattr(config, "items") or not config:
        return {prefix[:-1]: plain(config)}
    items = sorted((str(name), value) for name, value in config.items())
    return {key: value for name, item in items for key, value in flat(item, f"{prefix}{name}.").items()}


def plain(config: Any) -> Any:
    """What JSON gives back: sorted dicts with string keys, lists; other values as they are."""
    if hasattr(config, "items"):
        return {str(name): plain(config[name]) for name in sorted(config, key=str)}
    if hasattr(config, "tolist"):  # NumPy
        config = config.tolist()
    return [plain(item) for item in config] if isinstance(config, tuple | list) else config


def identity(config: Any) -> dict[str, Any]:
    """The fields of `flat` that say what a run is: without those of FREE, an `init` that loads nothing, and a
    `frozen` that freezes nothing."""
    fields = flat(config)
    free = list(FREE)
    if not (fields.get("init.path") or fields.get("init.match")):
        free.append("init")
    if not fields.get("optimizer.frozen"):
        free.append("optimizer.frozen")
    is_free = lambda key: any(f"{key}.".startswith(f"{name}.") for name in free)
    return {key: value for key, value in fields.items() if not is_free(key)}


def differences(old: Any, new: Any) -> list[str]:
    """One text per field that differs between two configs, sorted; fields of FREE do not count."""
    old, new, found = identity(old), identity(new), []
    for key in sorted({*old, *new}):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        # True and 1 are equal in Python, and mean something else in a config.
        if before == after and isinstance(before, bool) == isinstance(after, bool):
            continue
        if before is ABSENT:
            found.append(f"{key} is new, {after!r}")
        elif after is ABSENT:
            found.append(f"{key} is gone, was {before!r}")
        else:
            found.append(f"{key} was {before!r}, is {after!r}")
    return found


def begun(path: pathlib.Path) -> bool:
    """Whether a run, or one of a study, has left anything here; not where it was planned, or failed to start."""
    left = ("metrics.jsonl", "records.jsonl", "results.json", "tokenizer", "checkpoints/*")
    return any(any(folder.glob(name)) for folder in (path, *path.glob("runs/*")) for name in left)


def prepare(workdir: str, config: Any, *, write: bool) -> pathlib.Path:
    """Makes the folder and writes config.json; refuses a folder whose config differs, naming the fields.

    Where nothing has `begun`, another config takes the place of the one that is there. `config.allow_changed_config`
    lets a changed config through; it is not written here but by `record`, once it is known to work. What FREE lists
    may always change. `write` is False on all processes but the first. Raises `UserError` for a folder that cannot be
    written and for a config that JSON cannot hold.
    """
    if "://" in workdir:
        raise UserError(f"--workdir={workdir} must be a folder of a (shared) file system")
    path = pathlib.Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if write:
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from None
    file = path / "config.json"
    if file.exists():
        try:
            different = differences(dict(json.loads(file.read_bytes())), config)
        except (ValueError, TypeError, OSError):
            raise UserError(f"{file} is not the JSON of a config; remove it or choose another --workdir") from None
        if different and not begun(path):
            if write:
                record(path, config)
        elif different and not config.get("allow_changed_config", False):
            raise UserError(
                f"{path} holds a run with another config ({'; '.join(different)}). Choose another --workdir, "
                "or pass --config.allow_changed_config to continue it with this one"
            )
    elif write:
        record(path, config)
    return path


def record(path: pathlib.Path, config: Any) -> None:
    """Writes config.json, unless it says the same but for what FREE lists."""
    file = path / "config.json"
    if file.exists() and not differences(json.loads(file.read_bytes()), config):
        return
    try:
        write_json(file, plain(config))
    except TypeError as error:  # names the field
        raise UserError(str(error)) from None
