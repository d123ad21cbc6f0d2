"""The runner of studies: what is made, what is skipped, what goes on, and what is rebuilt from the records."""

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time

import jax
import pytest

import vfm.run
from experiments import main, records
from experiments.study import USAGE, resolve, run_name, study
from tests import tiny, tiny_study
from vfm import tree
from vfm.errors import UserError
from vfm.plan import step_flops
from vfm.train import preemption


@pytest.fixture(autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


def config(rates=(0.1, 0.2), **changes):
    c = tiny.get_config("text")
    c.study = {"module": "tests.tiny_study", "rates": rates, "seeds": (0, 1)}
    c.title = "A tiny study"
    c.lock()
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture
def runs(monkeypatch):
    """(learning rate, seed, folder) of the runs that are made; they take no time, and their loss is rate + seed."""
    made = []

    def run(c, workdir):
        made.append((c.optimizer.learning_rate, c.seed, workdir))
        return {"test_loss": c.optimizer.learning_rate + c.seed, "step": c.train.steps, "train_seconds": 2.0}

    monkeypatch.setattr(vfm.run, "run", run)
    monkeypatch.setattr(
        "experiments.study._analytic",
        lambda c, folder: {"parameters.total": 10, "flops.step": 1000, "tokens": 4 * c.train.batch_size},
    )
    return made


def test_every_run_leaves_one_record_and_finished_ones_are_skipped(tmp_path, runs, capsys):
    found = study(config(), str(tmp_path))
    assert [(rate, seed) for rate, seed, _ in runs] == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert lines == found and len({line["run"] for line in lines}) == 4
    assert [workdir for *_, workdir in runs] == [str(tmp_path / "runs" / line["run"]) for line in lines]
    last = lines[-1]
    assert last["overrides"] == {"optimizer.learning_rate": 0.2, "seed": 1} and last["seed"] == 1
    assert (last["parameters"], last["flops"], last["tokens"]) == (10, 1000 * tiny.STEPS, 64 * tiny.STEPS)
    assert last["metrics"] == {"test_loss": 1.2, "step": tiny.STEPS} and last["seconds"] == 2.0
    assert set(last["versions"]) == {"python", "jax", "flax", "optax", "numpy", "scikit-learn"}
    assert last["config"]["optimizer"]["learning_rate"] == 0.2 and "study" not in last["config"]
    table = "| rate | loss |\n| --- | --- |\n| 0.1 | 0.60 ± 0.71 |\n| 0.2 | 0.70 ± 0.71 |\n"
    assert capsys.readouterr().out.startswith(table) and (tmp_path / "table.md").read_text().endswith(table)
    assert "0.60 ± 0.71" in (tmp_path / "report.html").read_text() and (tmp_path / "figures/study.png").exists()
    study(config(), str(tmp_path))
    assert len(runs) == 4 and "is finished" in capsys.readouterr().err


def test_a_grid_that_has_changed_makes_only_what_is_new(tmp_path, runs, capsys):
    study(config(), str(tmp_path))
    # What another grid has left is kept, and is not in the table.
    found = study(config((0.3, 0.2)), str(tmp_path))
    assert {run["overrides"]["optimizer.learning_rate"] for run in found} == {0.2, 0.3} and len(found) == 4
    assert "2 of 6 runs of" in capsys.readouterr().err
    assert len(study(config((0.1, 0.2, 0.3)), str(tmp_path))) == 6
    assert [rate for rate, *_ in runs[4:]] == [0.3, 0.3]
    with pytest.raises(UserError, match="another config .train.steps was 20, is 21"):
        study(config(**{"train.steps": 21}), str(tmp_path))
    assert len(runs) == 6


def test_table_and_figure_come_from_the_records_alone(tmp_path, runs, capsys):
    study(config(), str(tmp_path / "a"))
    wanted, line = (tmp_path / "a" / "table.md").read_text(), capsys.readouterr().out.splitlines()[0]
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "records.jsonl", tmp_path / "b")
    # The other fields of the config do not matter.
    study(config(mode="report", **{"train.steps": 21}), str(tmp_path / "b"))
    assert (tmp_path / "b" / "table.md").read_text() == wanted and line in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"records.jsonl", "table.md", "report.html", "figures"}
    with pytest.raises(UserError, match="has no record of a run; --config.mode=train makes the runs"):
        study(config(mode="report"), str(tmp_path / "c"))


def test_what_was_expected_and_what_the_runs_drew_stand_in_the_report(tmp_path, runs, monkeypatch, capsys):
    from matplotlib.figure import Figure

    from tests import tiny_study

    held = lambda table: [{"expected": "0.1 is best", "held": str(table[0]["loss"].mean < table[1]["loss"].mean)}]
    seen = []

    def pictures(records, folder):
        seen.append((len(records), folder))
        return {"drawn": ("What they drew", Figure())}

    monkeypatch.setattr(tiny_study, "expectations", held, raising=False)
    monkeypatch.setattr(tiny_study, "pictures", pictures, raising=False)
    study(config(), str(tmp_path))
    table = "| 0.2 | 0.70 ± 0.71 |\n\n| expected | held |\n| --- | --- |\n| 0.1 is best | True |\n"
    assert table in capsys.readouterr().out and table in (tmp_path / "table.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "0.1 is best" in page and "What they drew" in page and (tmp_path / "figures" / "drawn.png").exists()
    assert seen == [(4, tmp_path)]


def test_a_line_that_a_crash_has_torn_is_made_again(tmp_path, runs):
    path = tmp_path / "records.jsonl"
    study(config((0.1,)), str(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert len(study(config((0.1,)), str(tmp_path))) == 2
    assert [rate for rate, seed, _ in runs if seed == 1] == [0.1, 0.1] and path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="records.jsonl line 1 is not a JSON object with a run"):
        study(config((0.1,)), str(tmp_path))


def test_of_two_records_of_a_run_the_last_counts(tmp_path):
    for value in (1, 2):
        records.append(tmp_path / "records.jsonl", {"run": "a", "metrics": {"x": value}})
    assert records.read(tmp_path / "records.jsonl") == [{"run": "a", "metrics": {"x": 2}}]
    with pytest.raises(UserError, match="run b: loss is not finite"):
        records.append(tmp_path / "records.jsonl", {"run": "b", "metrics": {"x": 1, "loss": float("nan")}})


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    real, asked = vfm.run.run, []
    monkeypatch.setattr(vfm.run, "run", lambda c, workdir: real(c, workdir, jax.devices()[:1]))
    monkeypatch.setattr(preemption.Preemption, "requested", lambda self, step: step == 5 and not asked.append(step))
    fields = {"train.steps": 8, "checkpoint.every": 0, "eval.limit": 16, "eval.test_limit": 16, "study.seeds": (0,)}
    c = config((0.01,), **fields)
    assert study(c, str(tmp_path)) == [] and not (tmp_path / "records.jsonl").exists()
    assert "stopped at step 5 of 8" in (said := capsys.readouterr().err) and "the study is not finished" in said
    monkeypatch.setattr(preemption.Preemption, "requested", lambda self, step: False)
    (found,) = study(c, str(tmp_path))
    assert asked == [5] and "resuming at step 5 of 8" in capsys.readouterr().err
    folder = tmp_path / "runs" / found["run"]
    assert [record["step"] for record in tiny.history(folder) if record["split"] == "train"] == [3, 6, 8]
    results = json.loads((folder / "results.json").read_text())
    assert {**found["metrics"], "train_seconds": found["seconds"]} == results
    experiment = vfm.run.Experiment(resolve(c, {}))
    assert found["parameters"] == tree.count(experiment.abstract_state.params)
    assert found["flops"] == 8 * step_flops(experiment) and found["tokens"] == 8 * 16 * 16


def test_two_processes_share_a_grid_and_no_run_is_made_twice(tmp_path, monkeypatch, runs, capsys):
    second, fake = [], vfm.run.run

    def run(c, workdir):
        if not second:  # in the middle of the first run; a lock is held against other files, so a thread will do
            second.append(threading.Thread(target=study, args=(config(), str(tmp_path))))
            second[0].start()
            deadline = time.time() + 60
            while len(runs) < 3 and time.time() < deadline:
                time.sleep(0.01)
        return fake(c, workdir)

    monkeypatch.setattr(vfm.run, "run", run)
    assert len(study(config(), str(tmp_path))) == 4
    second[0].join(60)
    assert sorted((rate, seed) for rate, seed, _ in runs) == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert (runs[-1][0], runs[-1][1]) == (0.1, 0) and not second[0].is_alive()
    assert "is another process's" in capsys.readouterr().err and (tmp_path / "table.md").exists()


def test_runs_that_differ_in_seed_and_learning_rate_are_trained_together(tmp_path, monkeypatch, runs, capsys):
    groups = []
    monkeypatch.setattr("vfm.train.together.train", lambda configs, folders: not groups.append(folders))
    c = config()
    with c.unlocked():
        c.study.together = 3
    found = study(c, str(tmp_path))
    assert [len(group) for group in groups] == [3] and len(found) == 4  # the last one is alone
    assert groups[0] == [workdir for *_, workdir in runs[:3]] and len(set(groups[0])) == 3
    assert [(run["overrides"]["optimizer.learning_rate"], run["seed"]) for run in found] == [
        (0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)
    ]  # fmt: skip
    with records.claim(tmp_path / "runs" / found[0]["run"] / "lock", wait=False) as ours:
        assert ours
    c.study.together = 0
    with pytest.raises(UserError, match="config.study.together=0 must be a whole number >= 1"):
        study(c, str(tmp_path))


def test_a_companion_that_another_process_has_is_left_to_it(tmp_path, monkeypatch, runs):
    groups, names = [], [run_name(resolved) for resolved in resolved_grid(config())]
    monkeypatch.setattr("vfm.train.together.train", lambda configs, folders: not groups.append(folders))
    c = config()
    with c.unlocked():
        c.study.together = 4
    lock = tmp_path / "runs" / names[1] / "lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        other = threading.Timer(2.0, file.close)
        other.start()
        study(c, str(tmp_path))
        other.join()
    assert [sorted(folder.rpartition("/")[2] for folder in group) for group in groups] == [
        sorted(name for name in names if name != names[1])
    ]
    assert len(runs) == 4  # the one that was left over was made once its lock was free


def resolved_grid(c):
    plain = resolve(c, {})
    with plain.unlocked():
        del plain.study
    plain.mode = "train"
    return [resolve(plain, {"optimizer.learning_rate": rate, "seed": seed}) for seed in (0, 1) for rate in (0.1, 0.2)]


def test_a_grid_with_a_missing_cell_is_refused(tmp_path, runs):
    study(config(), str(tmp_path))
    path = tmp_path / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    message = "lacks 1 of 4 runs of the grid, the first: optimizer.learning_rate=0.2, seed=1"
    with pytest.raises(UserError, match=message):
        study(config(mode="report"), str(tmp_path))
    assert study(config((0.1,), mode="report"), str(tmp_path))  # what is asked for is there


def test_records_of_another_config_are_not_more_seeds(tmp_path, runs):
    found = study(config(), str(tmp_path))
    path = tmp_path / "records.jsonl"
    lines = path.read_text()
    one = json.loads(lines.splitlines()[0])
    other = json.dumps({**one, "run": "another"}) + "\n"
    path.write_text(other + lines)  # beside those of this config
    assert study(config(mode="report"), str(tmp_path)) == found
    path.write_text(lines.replace(one["run"], "older"))  # alone, of an earlier version
    assert len(study(config(mode="report"), str(tmp_path))) == 4
    path.write_text(other + lines.replace(one["run"], "older"))
    with pytest.raises(UserError, match="has 2 runs of other configs for optimizer.learning_rate=0.1, seed=0"):
        study(config(mode="report"), str(tmp_path))


def test_a_study_may_write_files_for_others(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(tiny_study, "files", lambda records: {"law.json": b"%d" % len(records)}, raising=False)
    study(config(), str(tmp_path))
    assert (tmp_path / "law.json").read_bytes() == b"4"


def test_the_lock_of_a_run_lasts_as_long_as_its_process(tmp_path):
    code = (
        "import pathlib, sys, time\nfrom experiments import records\n"
        "with records.claim(pathlib.Path(sys.argv[1]), wait=False) as ours:\n"
        "    print(ours, flush=True); time.sleep(600)"
    )
    path = tmp_path / "runs" / "a" / "lock"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "True\n"
            with records.claim(path, wait=False) as ours:
                assert not ours
        finally:
            process.kill()
    with records.claim(path, wait=True) as ours:
        assert ours


def test_a_torn_line_is_mended_without_losing_what_others_write(tmp_path, monkeypatch):
    path, mend = tmp_path / "records.jsonl", records.write_atomic
    path.write_bytes(b'{"run": "a"}\n{"run": "to')

    def slowly(*args):
        time.sleep(0.3)
        mend(*args)

    monkeypatch.setattr(records, "write_atomic", slowly)
    threads = [threading.Thread(target=records.append, args=(path, {"run": name})) for name in "bc"]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # the second comes while the first mends
    for thread in threads:
        thread.join()
    assert [record["run"] for record in records.read(path)] == ["a", "b", "c"]


def test_the_time_that_is_left_is_told(tmp_path, monkeypatch, runs, capsys):
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("experiments.study.time.time", lambda: next(clock))
    study(config(), str(tmp_path))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert "left" not in said[0] and [line.split("; ")[1] for line in said[1:4]] == [
        "about 3 min left",
        "about 2 min left",
        "about 1 min left",
    ]


def test_the_name_of_a_run_is_a_hash_of_what_it_is():
    a = {"seed": 0, "mode": "train", "model": {"width": 16, "taps": (1, 2)}, "generate": {"text": "a"}}
    assert run_name(a) == "1f9c0ac1b745"  # on every machine, with every version
    assert (
        run_name(dict(reversed(a.items()))) == run_name({**a, "mode": "plan", "generate": {"text": "b"}}) == run_name(a)
    )
    others = [{**a, "seed": 1}, {**a, "new": 0}, {**a, "model": {"width": 16, "taps": (2, 1)}}, {**a, "seed": False}]
    assert len({run_name(c) for c in (a, *others)}) == 5


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"optimiser.learning_rate": 0.1}, "unknown field 'optimiser.learning_rate'.*Known: .*optimizer"),
        ({"optimizer.rate": 0.1}, "unknown field 'optimizer.rate'.*Known: .*learning_rate"),
        ({"seed.x": 1}, "unknown field 'seed.x'"),
        ({"seed": "one"}, "config.seed='one' of a run"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        resolve(config(), overrides)


def test_an_override_replaces_a_section_and_leaves_the_base_alone():
    base = config()
    found = resolve(base, {"objective": {"name": "masked", "label": 0.5}, "data.source.limit": 3})
    assert found.objective.to_dict() == {"name": "masked", "label": 0.5} and found.is_locked
    assert (found.data.source.limit, base.data.source.limit, base.objective.name) == (3, 4, "next_token")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"study.module": "tests.tiny_studies"}, "config.study.module='tests.tiny_studies' cannot be imported"),
        ({"study.module": ""}, "config.study.module='' cannot be imported"),
        ({"study.module": "tests.tiny"}, "config.study.module='tests.tiny' has no function runs"),
        ({"study.rates": ()}, "the study has no runs"),
        ({"init": {"path": "runs/nowhere"}}, "config.init.path='runs/nowhere' of a run of the study is not a folder"),
        ({"study.rates": (0.1, 0.1)}, "two runs with the same config: optimizer.learning_rate=0.1, seed=0"),
        ({"mode": "evaluate"}, "unknown mode 'evaluate' in config.mode of a study.*Known: plan, report, train"),
        ({"data.source.name": "stdlibs"}, "run [0-9a-f]{12} .optimizer.learning_rate=0.1, seed=0.: unknown source"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        study(config(**changes), str(tmp_path))


def test_a_config_without_a_study_is_told_which_command_to_use(tmp_path, capsys):
    flags = ["--config=tests/tiny.py:text", f"--workdir={tmp_path}"]
    assert main.cli(flags, study, USAGE) == 2
    assert capsys.readouterr().err == (
        "error: the config has no section 'study'; experiments.main is the command for a single run\n"
    )
    assert main.cli(["--help"], study, USAGE) == 0 and capsys.readouterr().out.startswith(
        "usage: python -m experiments.s"
    )


def test_a_plan_lists_the_runs_and_writes_nothing(tmp_path, runs, capsys):
    study(config((0.1,)), str(tmp_path))
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    study(config(mode="plan"), str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [("finished" in line) for line in lines[2:6]] == [True, False, True, False]
    assert lines[-1] == "4 runs, 8e+04 FLOPs" and len(runs) == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "values, text",
    [
        ((2.0,), "2"),
        ((0.5, 0.5), "0.5"),
        ((1.0, 1.02), "1.010 ± 0.014"),
        ((100, 300), "200 ± 141"),
        ((1e6, 1e6), "1e+06"),
    ],
)
def test_spreads_show_two_digits_of_the_deviation(values, text):
    assert str(records.spread(values)) == text


def test_tables_in_markdown():
    rows = [{"a|b": "x\ny", "n": 1234567, "f": 0.123456, "s": records.spread([1.0])}]
    assert (
        records.markdown(rows) == "| a\\|b | n | f | s |\n| --- | --- | --- | --- |\n| x y | 1,234,567 | 0.1235 | 1 |\n"
    )
