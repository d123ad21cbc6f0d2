"""The folder of one run: config.json, metrics.jsonl, checkpoints/, results.json, report.html, figures/."""

import json
import os
import pathlib
import tempfile
from typing import Any

from vfm.errors import UserError
from vfm.report import write_json

# These sections say what to do with a run, not what the run is; they may change between starts in one folder.
FREE = ("mode", "generate", "allow_changed_config", "plan")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {'a.b.c': value}; tuples as lists, as in JSON."""
    if hasattr(config, "items"):
        return {key: value for name, item in config.items() for key, value in flat(item, f"{prefix}{name}.").items()}
    if isinstance(config, (tuple, list)):
        config = [list(item) if isinstance(item, tuple) else item for item in config]
    return {prefix[:-1]: config}


def prepare(workdir: str, config: Any, *, write: bool) -> pathlib.Path:
    """Makes the folder and writes config.json; refuses a folder whose config differs, naming the fields.

    `config.allow_changed_config` lets a changed config through (the new one is written). `write` is False on all processes
    but the first. Raises `UserError` for a folder that cannot be written.
    """
    path = pathlib.Path(workdir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if write:
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error.strerror or error}") from None
    new, file = flat(config), path / "config.json"
    if file.exists():
        try:
            old = flat(json.loads(file.read_text()))
        except ValueError:
            raise UserError(f"{file} is not JSON; remove it or choose another --workdir") from None
        different = [f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
                     for key in sorted({*old, *new})
                     if old.get(key, "absent") != new.get(key, "absent") and key.split(".")[0] not in FREE]
        if different and not config.get("allow_changed_config", False):
            raise UserError(f"{path} holds a run with another config ({'; '.join(different)}). Choose another --workdir, "
                            "or pass --config.allow_changed_config to continue it with this one")
        if not different:
            return path
    if write:
        write_json(os.fspath(file), json.loads(json.dumps(config.to_dict())))
    return path
