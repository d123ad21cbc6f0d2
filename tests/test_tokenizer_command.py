import io
import subprocess
import sys

import pytest

from experiments import tokenizer as command
from vfm import tokenizers


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, the cat sat\n" * 50)
    return path


def test_train_encode_decode(tmp_path, text, capsys, monkeypatch):
    out = tmp_path / "out"
    assert command.cli(["train", f"--out={out}", "--vocab_size=265", str(text), "--special=<pad>,<eos>"]) == 0
    assert "265 ids written" in capsys.readouterr().err
    loaded = tokenizers.load(out)
    assert loaded.vocab_size == 265 and loaded.eos_id == 1
    assert command.cli(["encode", f"--tokenizer={out}", "the cat<eos>", "mat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [" ".join(map(str, loaded.encode(part))) for part in ("the cat<eos>", "mat")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat<eos>\n"))
    assert command.cli(["encode", f"--tokenizer={out}", "--allow_special"]) == 0
    ids = capsys.readouterr().out.split()
    assert ids[-1] == "1"
    assert command.cli(["decode", f"--tokenizer={out}", *ids]) == 0
    assert capsys.readouterr().out == "the cat\n"


def test_train_from_a_config(tmp_path, capsys):
    out = tmp_path / "out"
    assert command.cli(["train", f"--out={out}", "--config=configs/lm.py:smoke", "--vocab_size=800"]) == 0
    loaded = tokenizers.load(out)
    assert loaded.vocab_size == 800 and loaded.special == {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    assert len(loaded.encode("self")) == 1


def test_usage(capsys):
    assert command.cli(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: python -m experiments.tokenizer")
    assert command.cli([]) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("trian", ("'trian'", "did you mean 'train'")),
        ("train FILE", ("--out",)),
        ("train --out=OUT", ("--config", "text files")),
        ("train --out=OUT --config=configs/lm.py FILE", ("not both",)),
        ("train --out=OUT FILE --vocab_size=100", ("vocab_size=100", "259")),
        ("train --out=OUT FILE --vocab_size=x", ("vocab_size", "x")),
        ("train --out=OUT FILE --pattern=gpt2x( ", ("gpt2x(",)),
        ("train --out=OUT /nowhere.txt", ("/nowhere.txt", "does not exist")),
        ("train --out=FILE FILE --vocab_size=260", ("cannot write", "text.txt")),
        ("train --out=OUT --config=configs/nowhere.py", ("configs/nowhere.py",)),
        ("train --out=OUT --config=configs/digits.py", ("data.source",)),
        ("encode x", ("--tokenizer",)),
        ("encode --tokenizer=/nowhere x", ("/nowhere", "does not exist")),
        ("encode --tokeniser=/nowhere x", ("tokeniser",)),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, text, capsys, arguments, words):
    arguments = arguments.replace("OUT", str(tmp_path / "out")).replace("FILE", str(text)).split()
    assert command.cli(arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), captured.err
    assert "Traceback" not in captured.err


def test_as_a_program(tmp_path, text):
    run = [sys.executable, "-m", "experiments.tokenizer", "train", f"--out={tmp_path / 'o'}", "--vocab_size=262", text]
    done = subprocess.run([*map(str, run), "--workers=1"], capture_output=True, text=True)
    assert done.returncode == 0 and "262 ids written" in done.stderr
