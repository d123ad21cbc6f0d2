import json

import numpy as np
import pytest
from ml_collections import ConfigDict, FieldReference

from vfm import workdir
from vfm.errors import UserError

CONFIG = {
    "title": "Ä",
    "mode": "train",
    "train": {"steps": 5, "rate": 1e-3, "big": 1e30, "none": None, "on": True},
    "tasks": ("a->b", "c->d"),
    "grid": ((1, 2), (3.0, (4,))),
    "empty": {},
    "rows": ({"b": 1, "a": (2,)},),
}


def config(**changes):
    c = ConfigDict(CONFIG)
    with c.unlocked():
        for name, value in changes.items():
            holder, _, field = name.rpartition("__")
            (c[holder] if holder else c)[field] = value
    return c.lock()


def prepare(path, c=None, **options):
    return workdir.prepare(str(path), config() if c is None else c, **{"write": True, **options})


def work(path):
    """Prepares a folder in which something has been done since."""
    path = prepare(path)
    (path / "metrics.jsonl").write_text("{}\n")
    return path


def refused(path, c):
    with pytest.raises(UserError) as error:
        prepare(path, c)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_config_json_holds_what_json_can_and_is_stable(tmp_path):
    path = prepare(tmp_path / "a" / "b")
    text = (path / "config.json").read_text()
    found = json.loads(text)
    assert found["train"] == CONFIG["train"] and type(found["train"]["on"]) is bool
    assert found["tasks"] == ["a->b", "c->d"] and found["grid"] == [[1, 2], [3.0, [4]]]
    assert found["empty"] == {} and found["rows"] == [{"a": [2], "b": 1}] and found["title"] == "Ä"
    assert list(found["rows"][0]) == ["a", "b"]
    assert list(found) == sorted(found) and list(found["train"]) == sorted(found["train"])
    # The order in which fields were set leaves no trace, and what was read back is the same config.
    turned = ConfigDict({name: CONFIG[name] for name in reversed(CONFIG)})
    assert prepare(tmp_path / "c", turned) and (tmp_path / "c" / "config.json").read_text() == text
    assert workdir.differences(found, config()) == []
    before = (path / "config.json").stat().st_mtime_ns
    assert prepare(path) == path and (path / "config.json").stat().st_mtime_ns == before


def test_references_and_numpy_values_are_written_as_their_values(tmp_path):
    folder = FieldReference("here")
    c = ConfigDict({"a": {"dir": folder}, "b": {"dir": folder}, "n": np.float32(0.5), "x": np.arange(3)})
    c.a.dir = "there"
    found = json.loads((prepare(tmp_path, c) / "config.json").read_text())
    assert found == {"a": {"dir": "there"}, "b": {"dir": "there"}, "n": 0.5, "x": [0, 1, 2]}
    assert prepare(tmp_path, c)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"train__steps": 6}, "train.steps was 5, is 6"),
        ({"train__none": "x"}, "train.none was None, is 'x'"),
        ({"train__on": 1}, "train.on was True, is 1"),
        ({"tasks": ("a->b",)}, "tasks was ['a->b', 'c->d'], is ['a->b']"),
        ({"grid": ((1, 2), (3.0, (5,)))}, "grid was [[1, 2], [3.0, [4]]], is [[1, 2], [3.0, [5]]]"),
        ({"train__new": {"deep": 2}}, "train.new.deep is new, 2"),
        ({"empty": {"x": 1}}, "empty is gone, was {}; empty.x is new, 1"),
        ({"train": 3}, "train is new, 3; train.big is gone, was 1e+30; train.none is gone, was None"),
        ({"train__rate": 0.1, "train__steps": 7}, "(train.rate was 0.001, is 0.1; train.steps was 5, is 7)"),
    ],
)
def test_another_config_is_refused_with_the_fields_that_differ(tmp_path, changes, told):
    work(tmp_path)
    before = (tmp_path / "config.json").read_text()
    c = ConfigDict(CONFIG | {name: value for name, value in changes.items() if "__" not in name})
    for name, value in changes.items():
        if "__" in name:
            c.train = c.train.to_dict() | {name.split("__")[1]: value}
    message = refused(tmp_path, c)
    assert told in message and "--config.allow_changed_config" in message and str(tmp_path) in message
    assert (tmp_path / "config.json").read_text() == before
    assert message.count(" was ") + message.count(" is new") <= 8  # nothing but what differs
    c.allow_changed_config = True
    path = prepare(tmp_path, c)
    assert (tmp_path / "config.json").read_text() == before  # until it is known to work
    workdir.record(path, c)
    assert workdir.differences(json.loads((tmp_path / "config.json").read_text()), c) == []
    with pytest.raises(UserError, match="another config"):
        prepare(tmp_path)  # the new one is the config of the folder now


def test_what_to_do_with_a_run_may_change(tmp_path):
    c = ConfigDict(CONFIG | {"eval": {"checkpoint": "latest", "limit": 3}, "generate": {"text": ""}})
    prepare(tmp_path, c)
    (tmp_path / "results.json").write_text("{}")
    before = (tmp_path / "config.json").read_text()
    c.mode, c.generate.text, c.eval.checkpoint = "generate", "seven", "best"
    c.plan = {"anything": (1,)}
    prepare(tmp_path, c)
    assert (tmp_path / "config.json").read_text() == before
    c.eval.limit = 4
    assert "(eval.limit was 3, is 4)" in refused(tmp_path, c)


def test_fields_that_load_and_freeze_nothing_are_as_if_they_were_not_there(tmp_path):
    """So that runs and records from before there were such fields stay what they are."""
    silent = {"init": {"path": "", "checkpoint": "latest", "match": ()}, "optimizer": {"frozen": ()}}
    c = ConfigDict({**CONFIG, **silent})
    assert workdir.identity(c) == workdir.identity(config())
    assert workdir.differences(config(), c) == []
    said = c.copy_and_resolve_references()
    said.init.path, said.optimizer.frozen = "elsewhere", ("backbone/.*",)
    told = workdir.differences(config(), said)
    assert [line.split()[0] for line in told] == ["init.checkpoint", "init.match", "init.path", "optimizer.frozen"]


def test_a_folder_in_which_nothing_was_done_takes_another_config(tmp_path):
    """After a start that failed, or a plan; but not of a run that has a checkpoint, nor of a study of which one has."""
    held = lambda: json.loads((tmp_path / "config.json").read_text())["train"]["steps"]
    prepare(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    prepare(tmp_path, config(train__steps=6), write=False)
    assert held() == 5
    prepare(tmp_path, config(train__steps=6))
    assert held() == 6
    for left in ("checkpoints/2", "runs/a/checkpoints/2", "tokenizer", "runs/a/metrics.jsonl"):
        (tmp_path / left).mkdir(parents=True)
        assert "train.steps was 6, is 5" in refused(tmp_path, config())
        (tmp_path / left).rmdir()
    assert prepare(tmp_path) and held() == 5


def test_other_processes_do_not_write(tmp_path):
    assert prepare(tmp_path / "a", write=False) == tmp_path / "a"
    assert list((tmp_path / "a").iterdir()) == []
    work(tmp_path / "a")
    with pytest.raises(UserError, match="seed is new, 1"):
        prepare(tmp_path / "a", ConfigDict(CONFIG | {"seed": 1}), write=False)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file cannot be written: File exists" in refused(tmp_path / "file", config())
    assert "file/x cannot be written: Not a directory" in refused(tmp_path / "file" / "x", config())
    assert "File name too long" in refused(tmp_path / ("x" * 300), config())
    assert "must be a folder" in refused("gs://bucket/run", config())
    for content in (b"{", b"[1]", b"3", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json is not the JSON of a config" in refused(tmp_path, config())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "config.json is not the JSON of a config" in refused(tmp_path, config())


def test_values_that_json_cannot_hold_are_named(tmp_path):
    assert "train.rate is inf" in refused(tmp_path, config(train__rate=float("inf")))
    assert "title is a type" in refused(tmp_path, ConfigDict(CONFIG | {"title": int}))
    assert not (tmp_path / "config.json").exists()
