import json

import pytest

from experiments.prepare import Progress, cli, options, parse, usage
from vfm.data.prepare import Options


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "notes.jsonl"
    rows = [{"text": f"note number {n} about a thing", "patient": n % 7} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_command_line(data, tmp_path, capsys):
    assert cli([f"--input={tmp_path}/*.jsonl", f"--output={tmp_path}/out", "--group_field=patient", "--compress"]) == 0
    assert "40 of 40 records" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl.gz").exists() and (tmp_path / "out" / "DATA_CARD.md").exists()


def test_leaks_of_given_files_and_the_status(data, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "something else entirely", "patient": 9}\n')
    assert cli([f"--check=train={data},test={other}", "--group_field=patient"]) == 0
    other.write_text('{"text": "NOTE number 3 about a thing", "patient": 9}\n')
    assert cli([f"--check=train={data},test={other}"]) == 1
    assert "| test | 1 | train | 1 | 0 | 0 |" in capsys.readouterr().out


def test_a_failed_leak_check_is_one_line_and_status_1(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    text = " ".join(f"w{n}" for n in range(100))
    path.write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(30)))
    assert cli([f"--input={path}", f"--output={tmp_path}/out", "--near_dedup=0", "--split=train=0.5,test=0.5"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("leaks: test and train share") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--output=out"], "no input file"),
        (["--input={data}"], "--output is missing"),
        (["--input={data}", "--output=out", "--nere_dedup=0.8"], "Did you mean: near_dedup"),
        (["--input={data}", "--output=out", "--near_dedup=high"], "--near_dedup=high"),
        (["--input={data}", "--output=out", "--near_dedup=1.5"], "a similarity from 0 to 1, not 1.5"),
        (["--input={data}", "--output=out", "stray"], "'stray' belongs to no flag"),
        (["--input={data}s", "--output=out"], "did you mean"),
        (["--input={data},{data}", "--output=out"], "given twice"),
        (["--input=*.nothing", "--output=out"], "no file matches"),
        (["--input=.", "--output=out"], "is a folder"),
        (["--input={data}", "--output={data}"], "is a file; give a folder"),
        (["--input={data}", "--output=/proc/none/out"], "cannot be written"),
        (["--input={data}", "--output=out", "--unicode=NFX"], "unknown Unicode form 'NFX'"),
        (["--input={data}", "--output=out", "--whitespace=trims"], "did you mean 'trim'"),
        (["--input={data}", "--output=out", "--split=train"], "'train' is not NAME=SHARE"),
        (["--input={data}", "--output=out", "--split=train=1,train=1"], "'train' is given twice"),
        (["--input={data}", "--output=out", "--split=a/b=1"], "is not NAME=SHARE"),
        (["--input={data}", "--output=out", "--clean=gophr"], "did you mean 'gopher'"),
        (["--input={data}", "--output=out", "--label_noise=flag"], "needs the option `label_field`"),
        (["--input={data}", "--output=out", "--max_bits_per_char=2"], "needs the option `perplexity_sample`"),
        (["--input={data}", "--output=out", "--bad_words=nowhere.txt"], "cannot be read"),
        (["--input={data}", "--output=out", "--scripts=Latn"], "did you mean 'Latin'"),
        (["--input={data}", "--output=out", "--num_perm=1"], "must be at least 16"),
        (
            ["--input={data}", "--output=out", "--text_field=body"],
            "notes.jsonl:1: no field 'body'; it has patient, text",
        ),
        (["--check={data}"], "is not SPLIT=FILE"),
        (["--check=train={data}"], "needs two splits"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli([argument.format(data=data) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.jsonl"]


def test_ctrl_c_is_told_in_one_line(data, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.prepare.prepare", interrupt)
    assert cli([f"--input={data}", f"--output={tmp_path}/out"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written, and the same command starts again\n"


def test_help_names_every_option_and_a_file_may_hold_them(tmp_path, capsys):
    assert cli(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in Options.__dataclass_fields__) and text.strip() == usage().strip()
    assert max(map(len, text.splitlines())) <= 120
    assert cli(["--help_rules"]) == 0 and "max_repeated_10gram" in capsys.readouterr().out
    (tmp_path / "options.txt").write_text(
        "--near_dedup=0.7\n# a comment\n--noleak_check\n--clean=gopher,min_words=20\n"
    )
    read = options(parse([f"--flagfile={tmp_path}/options.txt", "--num_perm=64"]))
    assert read == Options(near_dedup=0.7, leak_check=False, clean="gopher,min_words=20", num_perm=64)


def test_progress_is_one_line_on_a_terminal_and_rare_lines_elsewhere(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("experiments.prepare.time.monotonic", lambda: now[0])
    for terminal in (True, False):
        monkeypatch.setattr("experiments.prepare.sys.stderr.isatty", lambda terminal=terminal: terminal)
        progress = Progress()
        for step in range(101):
            now[0] += 0.25
            progress("read", step * 10**6, 100 * 10**6)
        progress("leaks", 0, 1)
        progress.end()
        shown = capsys.readouterr().err
        assert "50%, 4.0 MB/s, 12 s left" in shown if terminal else shown.count("\n") == 2
        assert shown.count("\n") == 1 or not terminal
