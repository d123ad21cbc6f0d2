import gzip
import hashlib
import json
import os
import random
import tracemalloc

import numpy as np
import pytest

from vfm.data.prepare import Leaks, Options, check, prepare
from vfm.data.prepare.minhash import shingles
from vfm.data.sources import build_source
from vfm.errors import UserError

ONE = {"split": "none"}


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(folder, *splits):
    splits = splits or ("train", "validation", "test")
    return [json.loads(line) for split in splits for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def words(rng, n):
    return [f"w{int(rng.paretovariate(0.6)) % 20000}" for _ in range(n)]


def texts(n, seed=0, length=80):
    rng = random.Random(seed)
    return [" ".join(words(rng, length)) for _ in range(n)]


def changed(text, share, rng):
    tokens = text.split()
    for place in rng.sample(range(len(tokens)), max(1, int(share * len(tokens)))):
        tokens[place] = f"x{rng.randrange(10**9)}"
    return " ".join(tokens)


def test_planted_near_duplicates_are_found_and_others_kept(tmp_path):
    rng = random.Random(0)
    base = texts(300, length=120)
    near = [changed(text, 0.01, rng) for text in base]  # about 0.92 alike
    far = [changed(text, 0.12, rng) for text in base]  # about 0.4 alike
    records = [{"text": t, "kind": k} for k, ts in {"base": base, "near": near, "far": far}.items() for t in ts]
    alike = lambda ts: [len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b)) for a, b in zip(base, ts)]
    assert min(alike(near)) > 0.85 and max(alike(far)) < 0.7
    card = prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out", Options())
    kept = [record["kind"] for record in read(tmp_path / "out")]
    found = 300 - kept.count("near")
    wrong = 600 - kept.count("base") - kept.count("far")
    assert found / 300 >= 0.95 and found / (found + wrong) >= 0.95
    near_step = next(step for step in card["steps"] if step["step"] == "near_dedup")
    assert sum(rule["records"] for rule in near_step["removed"].values()) == found + wrong
    assert card["total"]["records"] == len(kept) == 900 - found - wrong


def test_near_duplicates_in_chinese(tmp_path):
    rng = random.Random(0)
    han = [chr(c) for c in range(0x4E00, 0x5800)]
    poems = ["，".join("".join(rng.choices(han, k=5)) for _ in range(20)) for _ in range(50)]
    near = [poem[:40] + rng.choice(han) + poem[41:] for poem in poems]
    write(tmp_path / "a.jsonl", [{"text": t} for t in poems + near])
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", Options(**ONE))
    assert [record["text"] for record in read(tmp_path / "out", "data")] == poems


def test_what_is_kept_is_the_first_with_all_its_fields_and_clean_text(tmp_path):
    records = [
        {"id": 1, "text": "Cafe\u0301  au lait \r\n", "label": 2.5, "deep": {"a": [None, "x\ud800"]}},
        {"id": 2, "text": "CAFÉ au\u200b lait", "label": 3},
        {"id": 3, "text": " \u200b ", "label": 3},
    ]
    card = prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out", Options(**ONE))
    assert read(tmp_path / "out", "data") == [records[0] | {"text": "Café  au lait"}]
    steps = {step["step"]: step for step in card["steps"]}
    assert steps["clean"]["removed"]["min_chars"]["records"] == 1
    (example,) = steps["exact_dedup"]["removed"]["equal text"]["examples"]
    assert example["where"].endswith("a.jsonl:2") and example["same_as"].endswith("a.jsonl:1")
    assert steps["normalise"]["changed_records"] == 3


def test_steps_can_be_switched_off(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": " a  b "}, {"text": "a b"}, {"text": ""}])
    off = Options(unicode="none", whitespace="keep", clean="none", exact_dedup=False, near_dedup=0, **ONE)
    prepare([path], tmp_path / "out", off)
    assert [record["text"] for record in read(tmp_path / "out", "data")] == [" a  b ", "a b", ""]


def test_dedup_within_fields(tmp_path):
    rng = random.Random(0)
    text = texts(1)[0]
    rows = [(text, "a"), (text, "b"), (changed(text, 0.01, rng), "a"), (changed(text, 0.01, rng), "c")]
    path = write(tmp_path / "a.jsonl", [{"text": t, "task": k} for t, k in rows])
    prepare([path], tmp_path / "out", Options(dedup_within="task", **ONE))
    assert [record["task"] for record in read(tmp_path / "out", "data")] == ["a", "b", "c"]
    prepare([path], tmp_path / "all", Options(**ONE))
    assert len(read(tmp_path / "all", "data")) == 1
    # Texts that stay because their tasks differ are on one side of the split all the same.
    path = write(tmp_path / "b.jsonl", [{"text": t, "task": k} for t in texts(100) for k in "ab"])
    card = prepare([path], tmp_path / "split", Options(dedup_within="task", split="train=0.5,test=0.5"))
    assert card["total"]["records"] == 200 and card["leak_check"]["leaks"] == 0
    sides = [{record["text"] for record in read(tmp_path / "split", split)} for split in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1]


def test_splits_are_deterministic_disjoint_and_of_the_sizes_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(2000, length=12)])
    options = Options(split="train=0.8,validation=0.1,test=0.1")
    card = prepare([path], tmp_path / "out", options)
    sizes = {name: split["records"] for name, split in card["splits"].items()}
    assert abs(sizes["train"] - 1600) < 75 and abs(sizes["test"] - 200) < 60
    # A text keeps its split when others come and go.
    subset = write(tmp_path / "b.jsonl", read(tmp_path / "out", "test")[:50] + read(tmp_path / "out", "train")[:50])
    prepare([subset], tmp_path / "again", options)
    assert read(tmp_path / "again", "test") == read(tmp_path / "out", "test")[:50]


def test_no_group_is_on_two_sides(tmp_path):
    records = [{"text": text, "patient": n % 200} for n, text in enumerate(texts(1000, length=12))]
    path = write(tmp_path / "a.jsonl", records)
    card = prepare([path], tmp_path / "out", Options(group_field="patient", split="train=0.7,test=0.3"))
    sides = [{record["patient"] for record in read(tmp_path / "out", split)} for split in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200
    assert card["splits"]["train"]["groups"] == len(sides[0]) and card["leak_check"]["leaks"] == 0
    # By text instead, groups are torn apart, and the check says so.
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", read(tmp_path / "out", split)[:100] + records[:3])
    files = [(split, str(tmp_path / f"{split}.jsonl")) for split in ("train", "test")]
    (pair,) = check(files, Options(group_field="patient"))["pairs"]
    assert pair["groups"] == len({record["patient"] for record in records[:3]}) and pair["equal"] >= 3


def test_leaks_stop_the_command_unless_allowed(tmp_path):
    rng = random.Random(0)
    base = texts(200)
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in base + [changed(t, 0.01, rng) for t in base]])
    options = {"near_dedup": 0.0, "split": "train=0.5,test=0.5"}
    with pytest.raises(Leaks, match=r"test and train share \d+ near-duplicates \(such as .*a.jsonl:\d+ and") as error:
        prepare([path], tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    card = prepare([path], tmp_path / "out", Options(allow_leaks=True, **options))
    sides = [[record["text"] for record in read(tmp_path / "out", split)] for split in ("train", "test")]
    (pair,) = card["leak_check"]["pairs"]
    assert pair["near"] == error.value.report["pairs"][0]["near"] and pair["equal"] == 0
    train = [shingles(text) for text in sides[0]]
    alike = lambda a, b: len(a & b) / len(a | b)
    truth = sum(max(alike(shingles(text), other) for other in train) >= 0.8 for text in sides[1][:60])
    report = check([("train", str(tmp_path / "out/train.jsonl")), ("test", _head(tmp_path / "out/test.jsonl", 60))])
    assert truth > 10 and abs(report["leaks"] - truth) <= 1
    assert prepare([path], tmp_path / "green", Options(near_dedup=0.8))["leak_check"]["leaks"] == 0
    prepare([path], tmp_path / "unchecked", Options(leak_check=False, **options))


def _head(path, n):
    head = path.with_name("head.jsonl")
    head.write_text("".join(path.open().readlines()[:n]))
    return str(head)


def test_equal_texts_fall_into_one_split_even_without_deduplication(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": t.upper()} for t in texts(200)] + [{"text": t} for t in texts(200)])
    card = prepare([path], tmp_path / "out", Options(exact_dedup=False, near_dedup=0))
    assert card["total"]["records"] == 400 and card["leak_check"]["leaks"] == 0


def test_preparing_the_output_again_removes_nothing(tmp_path):
    rng = random.Random(0)
    base = texts(150) + [" ".join(["spam"] * 60)] * 2
    records = [{"text": t} for t in base + [changed(t, rng.choice([0.01, 0.05, 0.1]), rng) for t in base]]
    options = Options(unicode="NFKC", whitespace="collapse", clean="gopher,min_stop_words=off")
    first = prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "one", options)
    assert sum(len(step["removed"]) for step in first["steps"]) >= 2
    # The files in another order make no difference.
    files = [str(tmp_path / "one" / f"{split}.jsonl") for split in ("test", "train", "validation")]
    second = prepare(files, tmp_path / "two", options)
    assert not any(step["removed"] for step in second["steps"])
    for name, split in first["splits"].items():
        assert second["splits"][name]["sha256"] == split["sha256"]


def test_output_is_read_by_the_jsonl_source(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"{t}\u2028\r\n我"} for t in texts(60, length=9)])
    for compress, ending in ((False, ""), (True, ".gz")):
        out = tmp_path / f"out{ending}"
        card = prepare([path], out, Options(compress=compress, controls=False))
        for split in ("train", "validation"):
            paths = {name: f"{name}.jsonl{ending}" for name in card["splits"]}
            source = build_source({"name": "jsonl", "dir": str(out), "paths": paths}, split)
            assert len(source) == card["splits"][split]["records"] and source[0]["text"].endswith("我")
    packed = (tmp_path / "out.gz" / "train.jsonl.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # neither name nor time in the header: equal data give equal files


def test_gzip_and_worker_processes_change_nothing(tmp_path):
    records = [{"text": t, "source": f"s{n % 3}"} for n, t in enumerate(texts(4500, length=9))]
    plain, packed = write(tmp_path / "a.jsonl", records), write(tmp_path / "a.jsonl.gz", records)
    cards = [
        prepare([path], tmp_path / name, Options(workers=workers))
        for name, path, workers in (("one", plain, 1), ("two", packed, 2))
    ]
    for key in ("splits", "sources", "steps", "total"):
        assert cards[0][key] == cards[1][key]
    assert [cards[n]["inputs"][0]["sha256"] for n in range(2)] == [
        hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("a.jsonl", "a.jsonl.gz")
    ]


def test_malformed_lines_stop_the_command_or_are_counted(tmp_path):
    rows = [
        '{"text": "fine"}',
        "",
        '{"text": "cut',
        '["list"]',
        '{"txt": "x"}',
        '{"text": 3}',
        '{"text": null}',
        '"\xff"',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(rows).encode("latin-1"))
    with pytest.raises(UserError, match="a.jsonl:3: not a line of JSON.*--skip_malformed"):
        prepare([str(path)], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    card = prepare([str(path)], tmp_path / "out", Options(skip_malformed=True, **ONE))
    removed = card["steps"][0]["removed"]
    assert sum(entry["records"] for entry in removed.values()) == 6 and card["total"]["records"] == 1
    assert removed["no field 'text'"]["examples"][0]["where"].endswith("a.jsonl:5")


def test_lone_surrogates_anywhere_in_a_record(tmp_path):
    bad = "x\ud800"
    rows = [
        {"text": f"{n} {bad}", "source": bad, "licence": bad, "patient": bad, "task": bad, bad: bad} for n in range(3)
    ]
    rows.append(rows[0] | {"text": f"{bad} {'long ' * 20}"})
    path = write(tmp_path / "a.jsonl", rows)
    options = Options(clean="max_chars=50", group_field="patient", dedup_within="task")
    card = prepare([path], tmp_path / "out", options)
    assert card["total"]["records"] == 3 and list(card["sources"]) == ["x?"]
    assert [record[bad] for record in read(tmp_path / "out")] == [bad] * 3


def test_a_source_for_each_record_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"t{n}", "url": f"u{n}"} for n in range(1100)])
    with pytest.raises(UserError, match="more than 1000 values.*--source_field"):
        prepare([path], tmp_path / "out", Options(source_field="url"))


def test_a_pattern_names_several_files_of_a_split(tmp_path):
    for n, text in enumerate(texts(4)):
        write(tmp_path / f"{'test' if n > 2 else 'train'}{n}.jsonl", [{"text": text}, {"text": texts(3)[0]}])
    (pair,) = check([("train", str(tmp_path / "train*.jsonl")), ("test", str(tmp_path / "test3.jsonl"))])["pairs"]
    assert pair["equal"] == 1 and pair["records"] == 2 and pair["examples"][0]["train"].endswith("train0.jsonl:1")


def test_missing_group_or_label_is_malformed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "patient": 1, "label": "x"}, {"text": "b"}])
    for options in ({"group_field": "patient"}, {"label_field": "label", "label_noise": "flag"}):
        with pytest.raises(UserError, match="a.jsonl:2: no field"):
            prepare([path], tmp_path / "out", Options(**options))


def test_damaged_gzip_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, [{"text": t} for t in texts(300)])
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"a.jsonl.gz' cannot be read beyond line \d+"):
        prepare([str(path)], tmp_path / "out")


@pytest.mark.parametrize("records", [[], [{"text": ""}]])
def test_nothing_left_is_an_error(tmp_path, records):
    with pytest.raises(UserError, match="holds no record|no record is left: clean .min_chars. removed 1"):
        prepare([write(tmp_path / "a.jsonl", records)], tmp_path / "out")


def test_a_stopped_run_leaves_nothing_and_an_earlier_output_as_it_was(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(50)])
    prepare([path], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def stop(stage, done, total):
        if stage == "write":
            assert list(tmp_path.glob("*.partial"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "new", progress=stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([path], tmp_path / "out", Options(overwrite=True, compress=True), stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_a_killed_run_left_is_cleared(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(50)])
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "train.jsonl").write_text("half a li")
    prepare([path], tmp_path / "out")
    assert len(read(tmp_path / "out")) == 50 and not partial.exists()
    # Killed between the two renames of an overwrite: the earlier output comes back.
    (tmp_path / "out").rename(tmp_path / "out.old")
    with pytest.raises(UserError, match="exists; give another one, or --overwrite"):
        prepare([path], tmp_path / "out")
    assert len(read(tmp_path / "out")) == 50


def test_an_overwrite_that_is_cut_off_loses_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(50)])
    prepare([path], tmp_path / "out")
    rename, calls = os.rename, []

    def cut_off(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("power cut")
        rename(source, target)

    monkeypatch.setattr("vfm.data.prepare.folder.os.rename", cut_off)
    with pytest.raises(OSError, match="power cut"):
        prepare([path], tmp_path / "out", Options(overwrite=True, compress=True))
    monkeypatch.undo()
    with pytest.raises(UserError, match="--overwrite"):
        prepare([path], tmp_path / "out")
    assert len(read(tmp_path / "out")) == 50


def test_outputs_are_replaced_only_when_told_and_other_files_never(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(50)])
    prepare([path], tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        prepare([path], tmp_path / "out")
    prepare([path], tmp_path / "out", Options(overwrite=True, compress=True))
    assert {p.name for p in (tmp_path / "out").glob("train*")} == {"train.jsonl.gz"}
    with pytest.raises(UserError, match="is in the folder to overwrite"):
        prepare([str(tmp_path / "out" / "train.jsonl.gz")], tmp_path / "out", Options(overwrite=True))
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files .thesis.tex."):
        prepare([path], tmp_path / "out", Options(overwrite=True))


def test_two_processes_do_not_write_one_output(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts(5)])

    def second(stage, done, total):
        with pytest.raises(UserError, match="another process is writing"):
            prepare([path], tmp_path / "out")

    prepare([path], tmp_path / "out", progress=second)
    assert len(read(tmp_path / "out")) == 5


def test_texts_are_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("vfm.data.prepare.collect._BATCH", 1 << 15)
    rng = random.Random(0)
    peaks = []
    for n in (100, 600):
        lines = ({"text": " ".join(f"{rng.getrandbits(40):x}" for _ in range(400))} for _ in range(n))
        path = write(tmp_path / f"{n}.jsonl", lines)
        tracemalloc.start()
        prepare([path], tmp_path / f"out{n}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = (tmp_path / "600.jsonl").stat().st_size
    assert size > 2_000_000 and peaks[1] - peaks[0] < 0.25 * size


def test_perplexity_filter(tmp_path):
    rng = random.Random(0)
    say = lambda: " ".join(
        rng.choices(["the", "river", "house", "of", "my", "garden", "saw", "a", "window", "left"], k=25)
    )
    sample = write(tmp_path / "clean.jsonl", [{"text": say()} for _ in range(300)])
    rows = [{"text": say(), "ok": True} for _ in range(50)]
    rows += [{"text": "".join(rng.sample(say(), 60)), "ok": False} for _ in range(50)]
    path = write(tmp_path / "a.jsonl", rows)
    card = prepare([path], tmp_path / "out", Options(perplexity_sample=sample, **ONE))
    kept = [record["ok"] for record in read(tmp_path / "out", "data")]
    assert all(kept) and len(kept) >= 47
    clean = next(step for step in card["steps"] if step["step"] == "clean")
    assert clean["removed"]["perplexity"]["records"] == 100 - len(kept) and "perplexity" in clean["rules"]


def test_label_noise_is_flagged_or_removed(tmp_path):
    rng = random.Random(0)
    topics = {"med": "fever cough lungs dose", "law": "court judge appeal clause"}
    rows = []
    for n in range(400):
        topic = rng.choice(list(topics))
        text = " ".join(rng.choices(topics[topic].split(), k=4) + words(rng, 6))
        wrong = n % 20 == 0
        rows.append({"text": text, "label": next(t for t in topics if (t == topic) != wrong), "wrong": wrong})
    path = write(tmp_path / "a.jsonl", rows)
    options = {"label_field": "label", "near_dedup": 0, "leak_check": False, **ONE}
    prepare([path], tmp_path / "flag", Options(label_noise="flag", **options))
    flagged = read(tmp_path / "flag", "data")
    assert len(flagged) == 400
    assert sum(record["wrong"] == ("label_suspect" in record) for record in flagged) >= 396
    assert all(record["label_suspect"] != record["label"] for record in flagged if "label_suspect" in record)
    card = prepare([path], tmp_path / "remove", Options(label_noise="remove", **options))
    assert card["total"]["records"] == sum("label_suspect" not in record for record in flagged)


def test_hook(tmp_path, monkeypatch):
    (tmp_path / "my_hooks.py").write_text(
        "def mask(record):\n"
        "    if 'secret' in record['text']:\n        return None\n"
        "    return record | {'text': record['text'].replace('Ann', '[NAME]'), 'pos': ['NOUN']}\n"
        "def broken(record):\n    return record['nothing']\n"
        "def wrong(record):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "a.jsonl", [{"text": "Ann came"}, {"text": "a secret"}])
    prepare([path], tmp_path / "out", Options(hook="my_hooks:mask", **ONE))
    assert read(tmp_path / "out", "data") == [{"text": "[NAME] came", "pos": ["NOUN"]}]
    for hook, message in {
        "broken": "a.jsonl:1: hook 'my_hooks:broken': KeyError: 'nothing'",
        "wrong": "must return the record",
        "none": "must be MODULE:FUNCTION",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare([path], tmp_path / "x", Options(hook=f"my_hooks:{hook}"))


def test_the_card_adds_up_and_is_readable(tmp_path):
    rows = [
        {"text": f"{t} 中文", "source": f"s{n % 2}", "licence": ["MIT", "CC-BY-4.0"][n % 2]}
        for n, t in enumerate(texts(60) + texts(10))
    ]
    path = write(tmp_path / "a.jsonl", [*rows, {"text": "秦川雄帝宅，函谷壮皇居。"}])
    prepare([path], tmp_path / "out", Options(clean="basic,max_char_run=50"))
    card = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert card["records_in"] == 71 and card["total"]["records"] == 61
    for part in ("sources", "splits"):
        for size in ("records", "chars", "bytes"):
            assert sum(entry[size] for entry in card[part].values()) == card["total"][size]
    kept = read(tmp_path / "out")
    assert card["total"]["chars"] == sum(len(record["text"]) for record in kept)
    assert card["total"]["bytes"] == sum(len(record["text"].encode()) for record in kept)
    steps = {step["step"]: step["removed"] for step in card["steps"]}
    assert steps["exact_dedup"]["equal text"]["chars"] == sum(len(row["text"]) for row in rows[60:])
    assert card["sources"]["s1"]["licences"] == {"CC-BY-4.0": 30}
    assert card["sources"][path]["scripts"] == {"Han": 1}
    assert {name: card["versions"][name] for name in ("numpy",)} == {"numpy": np.__version__}
    for split, entry in card["splits"].items():
        data = (tmp_path / "out" / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and data.count(b"\n") == entry["records"], split
    text = (tmp_path / "out" / "DATA_CARD.md").read_text()
    assert "61 of 71 records" in text and "| exact_dedup | equal text | removed 10 |" in text and "max_char_run" in text
    for block in text.split("\n\n"):  # every row of a table has as many cells as its head
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines() if line[0] == "|"}) <= 1, block


def test_private_data_leave_no_trace_in_the_card(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "Ann has a fever"}] * 3 + [{"text": "Bob"}])
    prepare([path], tmp_path / "out", Options(examples=0, **ONE))
    for name in ("data_card.json", "DATA_CARD.md"):
        assert "fever" not in (tmp_path / "out" / name).read_text()
