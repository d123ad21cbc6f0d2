"""The command line: flags -> config -> run, and the exit status."""

import concurrent.futures
import logging
import subprocess
import sys
from pathlib import Path

import absl.logging
import pytest

from experiments import command_line
from experiments.main import cli
from vfm.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIG = """
from ml_collections import ConfigDict

def get_config(arg="small"):
    return ConfigDict({
        "arg": arg, "steps": 5, "rate": 0.5, "name": "", "on": True, "off": False, "weights": (1.0, 2.0),
        "tasks": ("a->b",), "none": None, "list": [1], "empty": (), "train": {"ema": {"decay": 0.9}},
    })
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def runs(monkeypatch):
    """What `vfm.run.run` is called with; put an exception in to have it raised."""
    import vfm.run

    calls = []

    def run(config, workdir):
        if calls and isinstance(calls[0], BaseException):
            raise calls.pop(0)
        calls.append((config, workdir))

    monkeypatch.setattr(vfm.run, "run", run)
    return calls


def parse(file, *flags):
    return command_line.parse([f"--config={file}", "--workdir=w", *flags])


def test_config_and_workdir_reach_the_run(file, runs):
    assert cli([f"--config={file}:big", "--workdir", "there", "--config.train.ema.decay=0.5"]) == 0
    assert cli([f"--config={file}", "--workdir=here"]) == 0  # nothing is left of the call before
    (first, there), (second, here) = runs
    assert (first.arg, first.train.ema.decay, there) == ("big", 0.5, "there")
    assert (second.arg, second.train.ema.decay, here) == ("small", 0.9, "here")
    with pytest.raises((AttributeError, KeyError)):
        first.stpes = 3  # locked
    with pytest.raises((AttributeError, KeyError)):
        first.train.ema.dacay = 3


@pytest.mark.parametrize(
    "flags, field, value",
    [
        (["--config.steps=7"], "steps", 7),
        (["-config.steps=7"], "steps", 7),
        (["--config.steps", "7"], "steps", 7),
        (["--config.steps=6", "--config.steps=7"], "steps", 7),
        (["--config.rate=2"], "rate", 2.0),
        (["--config.rate=1e-4"], "rate", 1e-4),
        (["--config.name="], "name", ""),
        (["--config.name=a=b c"], "name", "a=b c"),
        (["--config.off"], "off", True),
        (["--config.off=true"], "off", True),
        (["--noconfig.on"], "on", False),
        (["--config.on=false"], "on", False),
        (["--config.weights=3"], "weights", (3,)),
        (["--config.weights=1,2.5"], "weights", (1, 2.5)),
        (["--config.weights=()"], "weights", ()),
        (["--config.tasks=a->c"], "tasks", ("a->c",)),
        (["--config.tasks=('x','y->z')"], "tasks", ("x", "y->z")),
        (["--config.empty=word"], "empty", ("word",)),
    ],
)
def test_values(file, flags, field, value):
    found = parse(file, *flags).config[field]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.stpes=3"], ["unknown config field 'config.stpes'; did you mean 'config.steps'?", "config: arg,"]),
        (["--config.train.decay=3"], ["'config.train.decay'", "'config.train.ema.decay'?", "config.train: ema."]),
        (["--config.steps.x=3"], ["unknown config field 'config.steps.x'"]),
        (["--config.=3"], ["unknown config field 'config.'"]),
        (["--noconfig.no"], ["unknown config field 'config.no'"]),
        (["--config.train.ema=3"], ["config.train.ema is a section", "--config.train.ema.decay"]),
        (["--config.train={'x': 1}"], ["config.train is a section", "--config.train.ema"]),
        (["--config.none=3"], ["config.none is None in the config file", "set it in the file"]),
        (["--config.list=3"], ["config.list is [1] in the config file"]),
        (["--config.steps=1.5"], ["--config.steps=1.5", "expected int, such as 5"]),
        (["--config.weights=a,b"], ["--config.weights: 'a,b' is not float", "(1.0, 2.0)"]),
        (["--config.tasks=('x', 3)"], ["--config.tasks: 3 is not str"]),
        (["--config.tasks=('x', "], ["--config.tasks="]),
        (["--noconfig.steps"], ["noconfig.steps"]),
        (["--config.steps"], ["Missing value", "--config.steps"]),
        (["--verbosity=loud"], ["--verbosity=loud"]),
        (["--", "--config.steps=3"], ["'--config.steps=3'"]),
    ],
)
def test_refused_flags(file, flags, words):
    with pytest.raises(UserError) as error:
        parse(file, *flags)
    assert not (missing := [word for word in words if word not in str(error.value)]), f"{missing} not in {error.value}"


def test_help_is_no_error(capsys):
    assert cli(["--help"]) == 0
    out, err = capsys.readouterr()
    assert "--config=FILE[:ARG]" in out and "--workdir=DIR" in out and err == ""


def in_a_thread():
    def work():
        raise UserError("record 7\nof file.jsonl is broken")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(work).result()


def wrapped():
    try:
        in_a_thread()
    except UserError as error:
        error.add_note("frames of a library were left out")
        raise RuntimeError("the worker failed") from error


@pytest.mark.parametrize("fail", [in_a_thread, wrapped])
def test_user_errors_are_one_line_wherever_they_come_from(fail, file, monkeypatch, capsys):
    import vfm.distributed
    import vfm.run

    left = []
    monkeypatch.setattr(vfm.run, "run", lambda *_: fail())
    monkeypatch.setattr(vfm.distributed, "close", left.append)
    assert cli([f"--config={file}", "--workdir=w"]) == 2
    assert capsys.readouterr().err == "error: record 7 of file.jsonl is broken\n"
    assert left == [2]  # the other processes are told


@pytest.fixture
def usual_logging():
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    logging.root.removeHandler(absl.logging.get_absl_handler())
    absl.logging.set_verbosity(absl.logging.WARNING)


def test_traceback_of_bad_input_on_request(file, runs, capsys, usual_logging):
    runs.append(UserError("no such split"))
    assert cli([f"--config={file}", "--workdir=w", "--verbosity=1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith("error: no such split\n")


def test_bugs_keep_their_traceback(file, runs):
    bug = KeyError("bug")
    runs.append(bug)
    with pytest.raises(KeyError) as error:
        cli([f"--config={file}", "--workdir=w"])
    assert error.value is bug

    def while_telling():
        try:
            raise UserError("bad input")
        except UserError:
            return {}["bug"]

    with pytest.raises(KeyError) as error:
        while_telling()
    runs[:] = [error.value]  # a bug on the way out of bad input is a bug
    with pytest.raises(KeyError):
        cli([f"--config={file}", "--workdir=w"])


@pytest.mark.parametrize("wrap", [False, True])
def test_ctrl_c_is_one_line_and_status_130(wrap, file, runs, capsys):
    error = KeyboardInterrupt()
    if wrap:  # such as the import of an extension that is interrupted
        error, error.__cause__ = ImportError("initialization failed"), error
    runs.append(error)
    assert cli([f"--config={file}", "--workdir=w"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command resumes from the last checkpoint\n"


def test_flags_are_checked_without_loading_jax():
    code = """
import sys
from experiments.main import cli
status = cli(["--config=configs/digits.py", "--workdri=x"])
sys.exit("jax was imported" if "jax" in sys.modules else status)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: Unknown command line flag 'workdri'"), done.stderr
