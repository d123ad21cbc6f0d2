"""`experiments.certify`: the table it writes, what fails it, and the functions it compares."""

import pytest

from experiments import certify
from vfm.parity import certificates, functions, tokenizer_files
from vfm.parity.certificates import Check


@pytest.mark.parametrize("name", ["attention", "transformer_layer", "cross_entropy", "adamw_step", "relative_buckets"])
def test_functions_equal_the_oracle(name):
    pytest.importorskip("torch")
    if name == "relative_buckets":
        pytest.importorskip("transformers")
    (tolerance,) = (c.tolerance for c in certificates.checks() if c.run is getattr(functions, name))
    assert getattr(functions, name)() <= tolerance


@pytest.mark.parametrize("library", ["tokenizers", "tiktoken"])
def test_tokenizers_equal_the_oracle(monkeypatch, library):
    pytest.importorskip(library)
    monkeypatch.setattr(tokenizer_files, "VOCABULARY", 400)
    assert tokenizer_files.ids("cl100k", library) == 0
    if library == "tokenizers":
        assert tokenizer_files.merges("cl100k") == 0


def broken():
    raise ValueError("no\nsuch weight")


@pytest.mark.parametrize(
    "check, status, cell",
    [
        (Check("near", ("jax",), 1e-3, lambda: 5e-4), 0, "| near | jax "),
        (Check("far", ("jax",), 1e-5, lambda: 5e-4), 1, "| 5.0e-04 | 1e-05 | FAIL |"),
        (Check("broken", ("jax",), 1e-5, broken), 1, "| – | 1e-05 | ValueError: no such weight |"),
        (Check("absent", ("no_such_package",), 1e-5, broken), 0, "no_such_package is not installed"),
    ],
    ids=lambda value: value.what if isinstance(value, Check) else "",
)
def test_the_table_and_the_status(monkeypatch, tmp_path, capsys, check, status, cell):
    monkeypatch.setattr(certificates, "checks", lambda: [check])
    file = tmp_path / "docs" / "certificates.md"
    assert certify.cli([f"--output={file}"]) == status
    assert cell in file.read_text(encoding="utf-8")
    assert check.what in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, message",
    [("--only=[", "is not a regular expression"), ("--only=zzz", "matches no check"), ("--onyl=a", "only")],
)
def test_bad_flags_are_one_line(capsys, flag, message):
    assert certify.cli([flag]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
