"""`python -m experiments.study --config=configs/NAME.py[:ARG] --workdir=DIR [--config.a.b=value ...]`: a grid of runs.

The config names its study in `config.study.module`, a module with three pure functions:

    runs(settings) -> [{"a.b": value, …}, …]    overrides of the config, one for each run; settings: `config.study`
    summarize(records) -> [{column: value}, …]  the table; a value is text, a number, or a `records.Spread`
    figure(table) -> matplotlib figure

and, if it likes, three more:

    expectations(table) -> [{column: value}, …]            what was expected beforehand, and whether it held
    pictures(records, folder) -> {name: (caption, figure)} what the runs in folder/runs drew, for the report alone
    files(records) -> {name: bytes}                        what others read, such as a fitted law

and whose docstring says what is measured. An override replaces a field, or a whole section. The records that these
functions get are those of all runs of the grid, and perhaps of others that were made in the folder before.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from experiments import main, records
from vfm.errors import UserError, unknown
from vfm.workdir import identity, plain, prepare, record

USAGE = """usage: python -m experiments.study --config=configs/NAME.py[:ARG] --workdir=DIR [--config.a.b=value ...]

Makes all runs of a study, one after the other, then its table and figure. Finished runs are skipped, and the same
command goes on with a run that was interrupted. A grid that has grown makes only what is new. The command may be
started several times in one DIR, on one machine or many: the processes share the runs, and none is made twice.

  --config=FILE[:ARG]     config file with a section `study`, and the variant that its get_config takes
  --config.a.b=value      sets a field of the config, for all runs
  --config.study.x=value  sets what the study varies
  --config.study.together=K  trains up to K runs that differ only in seed and learning rate in one program, which is
                          faster on an accelerator and slower on a CPU (default 1)
  --config.mode=train     (default) makes the runs; plan: lists them, with parameters and FLOPs, and trains nothing;
                          report: only makes table and figure again, from DIR/records.jsonl alone
  --workdir=DIR           gets records.jsonl (one line per finished run), table.md, report.html, figures/, runs/
  --verbosity=N, --help   as of experiments.main

Bad input ends in one line on stderr and status 2, Ctrl-C in status 130."""
PACKAGES = ("jax", "flax", "optax", "numpy", "scikit-learn")


def study(config: ConfigDict, workdir: str) -> list[dict]:
    """Makes the runs of a study that are not finished, and its table and figure; returns the records."""
    if config.mode not in MODES:
        raise unknown("mode", config.mode, MODES, "config.mode of a study")
    if not config.get("study"):
        raise UserError("the config has no section 'study'; experiments.main is the command for a single run")
    return MODES[config.mode](config, workdir, _module(config.study))


def _module(settings: ConfigDict) -> ModuleType:
    name = settings.get("module", "")
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"config.study.module={name!r} cannot be imported: {error}") from error
    for function in ("runs", "summarize", "figure"):
        if not callable(getattr(module, function, None)):
            raise UserError(f"config.study.module={name!r} has no function {function}; see experiments/study.py")
    return module


def resolve(base: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """A locked copy of a config with other values. Raises UserError for fields that it has not, and other types."""
    config = base.copy_and_resolve_references()
    config.lock()
    for field, value in overrides.items():
        section = config
        *path, name = field.split(".")
        for part in path:
            section = section.get(part) if isinstance(section, ConfigDict) else None
        if not isinstance(section, ConfigDict) or name not in section:
            known = section if isinstance(section, ConfigDict) else config
            raise unknown("field", field, known, "the overrides of a run")
        try:
            section[name] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"config.{field}={value!r} of a run: {error}") from error
    return config


def run_name(config: ConfigDict) -> str:
    """The name of a run: a hash of all fields of its config that say what it is."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _grid(config: ConfigDict, module: ModuleType) -> tuple[ConfigDict, dict[str, tuple[dict, ConfigDict]]]:
    """The config without its study, and {name: (overrides, config)} of all runs."""
    base = config.copy_and_resolve_references()
    with base.unlocked():
        settings = base.study
        del base.study
        base.mode = "train"
    found = {}
    for overrides in module.runs(settings):
        resolved = resolve(base, overrides)
        name = run_name(resolved)
        if name in found:
            raise UserError(f"the study has two runs with the same config: {_shown(overrides)}")
        found[name] = (overrides, resolved)
    if not found:
        raise UserError("the study has no runs; see config.study")
    return base, found


def _shown(overrides: Mapping[str, Any]) -> str:
    """Overrides in one line; of a section, what it chooses by name."""
    value = lambda v: v.get("name", "…") if isinstance(v, Mapping) else v
    return ", ".join(f"{field}={value(v)}" for field, v in overrides.items()) or "the config itself"


def _train(config: ConfigDict, workdir: str, module: ModuleType) -> list[dict]:
    """Makes the runs that are not finished yet, and appends a record for each; then the report."""
    import jax

    from vfm import distributed
    from vfm.run import join

    base, grid = _grid(config, module)
    for _, resolved in grid.values():  # before the first run, and not after hours of others
        if (start := resolved.get("init", {}).get("path", "")) and not Path(start).expanduser().is_dir():
            raise UserError(f"config.init.path={start!r} of a run of the study is not a folder")
    join(base)
    folder = prepare(workdir, base, write=distributed.is_main())
    if distributed.is_main():
        record(folder, base)
    if not jax.config.jax_compilation_cache_dir:  # runs that differ in their seed have the same programs
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    progress = _Progress(folder / "records.jsonl", grid)
    together = _together(config.study)
    for wait in (False, True):  # first what nobody works at, then what others have left
        for number, (name, (overrides, _)) in enumerate(grid.items(), start=1):
            line = f"run {number} of {len(grid)}, {name} ({_shown(overrides)})"
            with contextlib.ExitStack() as claims:
                ours = claims.enter_context(_claim(folder / "runs" / name / "lock", wait))
                if distributed.gather(name in progress.finished())[0]:
                    if not wait:
                        _say(f"{line} is finished")
                    continue
                if not ours:
                    _say(f"{line} is another process's")
                    continue
                _say(f"{line}{progress.left()}")
                group = [name]
                if together > 1:
                    group += _companions(name, progress, folder, claims, together - 1)
                if not _make(group, grid, progress.path, folder):
                    _say("the study is not finished")
                    return records.read(progress.path)
            jax.clear_caches()  # the next run has other programs
    return _report(config, workdir, module) if distributed.is_main() else []


def _make(names: list[str], grid: Mapping[str, Any], path: Path, folder: Path) -> bool:
    """Makes runs, trained together if there are several, and appends their records; False if it was stopped."""
    from vfm import distributed
    from vfm.run import run
    from vfm.train import together

    if len(names) > 1:
        folders = [str(folder / "runs" / name) for name in names]
        try:
            if not together.train([grid[name][1] for name in names], folders):
                return False
        except UserError as error:
            raise UserError(f"runs {', '.join(names)}: {error}") from error
    for name in names:
        overrides, resolved = grid[name]
        try:
            results = run(resolved, str(folder / "runs" / name))
            if not results:
                return False
            if distributed.is_main():
                records.append(path, _record(name, overrides, resolved, results, folder / "runs" / name))
        except UserError as error:
            raise UserError(f"run {name} ({_shown(overrides)}): {error}") from error
    return True


def _together(settings: ConfigDict) -> int:
    import jax

    count = settings.get("together", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UserError(f"config.study.together={count!r} must be a whole number >= 1")
    if count > 1 and jax.process_count() > 1:
        raise UserError(f"config.study.together={count} is for studies of one process, not of {jax.process_count()}")
    return count


def _companions(name: str, progress: "_Progress", folder: Path, claims: contextlib.ExitStack, most: int) -> list[str]:
    """Up to `most` runs that can be trained with one, are not finished, and no other process's; claims them."""
    from vfm.train.together import likeness

    found, wanted = [], likeness(progress.grid[name][1])
    for other, (_, resolved) in progress.grid.items():
        if len(found) < most and other != name and likeness(resolved) == wanted:
            with contextlib.ExitStack() as claim:
                ours = claim.enter_context(_claim(folder / "runs" / other / "lock", wait=False))
                if ours and other not in progress.finished():
                    claims.push(claim.pop_all())
                    found.append(other)
    return found


@contextlib.contextmanager
def _claim(path: Path, wait: bool) -> Iterator[bool]:
    """Whether a run is that of this process, or of the processes of this program, of which the first has the lock."""
    from vfm import distributed

    with records.claim(path, wait=wait) if distributed.is_main() else contextlib.nullcontext(False) as ours:
        yield distributed.gather(ours)[0]


class _Progress:
    """What of a grid is finished, by whatever process, and how long the rest will take at this pace."""

    def __init__(self, path: Path, grid: Mapping[str, Any]):
        self.path, self.grid, self.began = path, grid, time.time()
        self.before = len(self.finished())

    def finished(self) -> set[str]:
        return {found["run"] for found in records.read(self.path)} & {*self.grid}

    def left(self) -> str:
        """Text: the time left, once a run was finished since the start; else nothing."""
        now = len(self.finished())
        if now <= self.before:
            return ""
        minutes = (time.time() - self.began) / (now - self.before) * (len(self.grid) - now) / 60
        return f"; about {minutes:.0f} min left"


def _record(name: str, overrides: Mapping[str, Any], config: ConfigDict, results: dict, folder: Path) -> dict:
    """What is kept of a run. flops: of training, analytic; tokens: positions of text that the model was trained on;
    seconds: of training, all starts together."""
    import jax

    analytic, steps = _analytic(config, folder), config.train.steps
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "run": name,
        "overrides": plain(overrides),
        "seed": config.seed,
        "metrics": {key: value for key, value in results.items() if key != "train_seconds"},
        "parameters": analytic["parameters.total"],
        "flops": analytic["flops.step"] * steps,
        "tokens": analytic["tokens"] * steps,
        "seconds": results["train_seconds"],
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "config": plain(config),
    }


def _analytic(config: ConfigDict, folder: Path) -> dict[str, float]:
    """`plan.analytic` of a run, and the tokens of a step: those of encoder and decoder."""
    from vfm.experiment import Experiment
    from vfm.plan import abstract_batch, analytic

    experiment = Experiment(config)
    experiment.folder = folder
    batch = abstract_batch(experiment)
    tokens = sum(batch[name].size for name in ("tokens", "decoder_tokens") if name in batch)
    return {**analytic(experiment), "tokens": tokens}


def _plan(config: ConfigDict, workdir: str, module: ModuleType) -> list[dict]:
    """Prints all runs with their parameters and FLOPs; trains nothing and writes nothing."""
    finished = {found["run"] for found in records.read(Path(workdir) / "records.jsonl")}
    rows = []
    for name, (overrides, resolved) in _grid(config, module)[1].items():
        found = _analytic(resolved, Path(workdir) / "runs" / name)
        work = found["flops.step"] * resolved.train.steps
        state = "finished" if name in finished else ""
        row = {"run": name, "parameters": found["parameters.total"], "training FLOPs": float(work), "state": state}
        rows.append({**row, "overrides": _shown(overrides)})
    print(records.markdown(rows), end="")
    print(f"{len(rows)} runs, {sum(row['training FLOPs'] for row in rows):.4g} FLOPs")
    return []


def _report(config: ConfigDict, workdir: str, module: ModuleType) -> list[dict]:
    """Table and figure from records.jsonl alone."""
    from vfm.report import Report
    from vfm.train.logging import write_atomic

    folder = Path(workdir)
    found = records.read(folder / "records.jsonl")
    if not found:
        raise UserError(f"{folder / 'records.jsonl'} has no record of a run; --config.mode=train makes the runs")
    found = _of_grid(found, _grid(config, module)[1], folder / "records.jsonl")
    table = module.summarize(found)
    text = inspect.getdoc(module) or ""
    expected = module.expectations(table) if hasattr(module, "expectations") else []
    tables = [records.markdown(rows) for rows in (table, expected) if rows]
    write_atomic(folder / "table.md", "\n\n".join([f"# {config.title}", text, "\n".join(tables)]).encode())
    page = Report(config.title)
    page.text(text)
    page.table(list(table[0]), [[_plain(value) for value in row.values()] for row in table], _caption(found))
    if expected:
        page.table(list(expected[0]), [list(row.values()) for row in expected], "Expected beforehand, and found")
    page.figure("study", module.figure(table))
    for name, content in getattr(module, "files", lambda *_: {})(found).items():
        write_atomic(folder / name, content)
    for name, (caption, drawing) in getattr(module, "pictures", lambda *_: {})(found, folder).items():
        page.figure(name, drawing, caption)
    metrics = sorted({name for run in found for name in run["metrics"]})
    page.table(
        ("run", "overrides", "parameters", "FLOPs", "tokens", "seconds", *metrics),
        [
            (
                run["run"],
                _shown(run["overrides"]),
                run["parameters"],
                float(run["flops"]),
                run["tokens"],
                run["seconds"],
            )
            + tuple(run["metrics"].get(name, "") for name in metrics)
            for run in found
        ],
        "All runs",
    )
    path = page.write(folder)
    print("\n".join(tables), end="")
    print(f"wrote {folder / 'table.md'} and {path}")
    return found


def _of_grid(found: list[dict], grid: Mapping[str, tuple[dict, ConfigDict]], path: Path) -> list[dict]:
    """The records of a grid: not those that another grid, or another config, has left in the folder, which a mean over
    seeds would take for more of the same. Records are told by their overrides, so that those of an earlier version of
    the code, which has other fields and so other names of runs, can be read.

    Refuses a grid with a missing cell: a mean over fewer seeds would not show it either.
    """
    key = lambda overrides: json.dumps(plain(overrides), sort_keys=True)
    known: dict[str, list[dict]] = {}
    for run in found:
        known.setdefault(key(run["overrides"]), []).append(run)
    wanted = [overrides for overrides, _ in grid.values()]
    missing = [overrides for overrides in wanted if key(overrides) not in known]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(wanted)} runs of the grid, the first: {_shown(missing[0])}; "
            "--config.mode=train makes them, or ask for less by --config.study"
        )
    kept = []
    for overrides in wanted:
        runs = known[key(overrides)]
        ours = [run for run in runs if run["run"] in grid]
        if len(runs) > 1 and len(ours) != 1:
            raise UserError(f"{path} has {len(runs)} runs of other configs for {_shown(overrides)}; keep those of one")
        kept += ours or runs
    if len(kept) < len(found):
        _say(f"{len(found) - len(kept)} of {len(found)} runs of {path} are not of this grid, and are left out")
    names = {run["run"] for run in kept}
    return [run for run in found if run["run"] in names]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, records.Spread) else value


def _caption(found: list[dict]) -> str:
    """Where the numbers come from."""
    versions = sorted({", ".join(f"{name} {v}" for name, v in run["versions"].items()) for run in found})
    devices = sorted({run["device"] for run in found})
    return f"{len(found)} runs; mean ± standard deviation over seeds. {'; '.join(devices)}. {'; '.join(versions)}"


def _say(text: str) -> None:
    from vfm import distributed

    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


MODES = {"train": _train, "plan": _plan, "report": _report}


if __name__ == "__main__":
    sys.exit(main.cli(start=study, usage=USAGE))
