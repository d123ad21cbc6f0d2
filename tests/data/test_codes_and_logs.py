"""Sounds as codes, parts of a data set, and written logs."""

import re

import numpy as np
import pytest

from vfm import data
from vfm.data.interleave import Layout
from vfm.data.logs import Logs
from vfm.data.waveform import mu_law
from vfm.errors import UserError
from vfm.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPEECH = {"name": "speech", "duration": 0.25, "sizes": {"train": 3, "validation": 1}}
SOUNDS = {"name": "waveform", "source": SPEECH}


def build(cfg, split="train", length=128):
    return data.build(cfg, split, layout=Layout(length), tokenizer=TOKENIZER)


def test_mu_law_is_that_of_g711_at_its_ends_and_finer_near_zero():
    """256 codes, symmetric, monotone; half of them within 1/16 of full scale (ln 16 of ln 256)."""
    x = np.linspace(-1, 1, 2001)
    codes = mu_law(x).astype(int)
    assert codes[[0, -1]].tolist() == [0, 255] and (np.diff(codes) >= 0).all()
    assert np.abs(codes + codes[::-1] - 255).max() <= 1
    assert mu_law(np.array([1 / 255 * (256**0.5 - 1)]))[0] == pytest.approx(128 + 64, abs=1)
    assert mu_law(np.array([3.0, -3.0])).tolist() == [255, 0]


def test_rows_of_a_sound_hold_all_of_it_but_the_rest_at_its_end():
    rows = build(SOUNDS)
    audio = rows.source[1]["audio"]
    assert rows.rows == 2000 // 127 and len(rows) == 3 * rows.rows
    found = [rows.example(rows.rows + i) for i in range(rows.rows)]
    codes = np.concatenate([row["tokens"][1:] for row in found]) - len(TOKENIZER.special)
    np.testing.assert_array_equal(codes, mu_law(audio)[: len(codes)])
    for row in found:
        assert row["tokens"][0] == TOKENIZER.bos_id and row["loss_mask"].sum() == 127
        np.testing.assert_array_equal(row["targets"][:127], row["tokens"][1:])
    blank = data.blank(SOUNDS, layout=Layout(128), tokenizer=TOKENIZER)
    assert {name: (x.shape, x.dtype) for name, x in blank.items() if hasattr(x, "shape")} == {
        name: (x.shape, x.dtype) for name, x in found[0].items() if hasattr(x, "shape")
    }


def test_sounds_that_make_no_rows_are_refused():
    with pytest.raises(UserError, match="config.data.length=4096 holds 4095 samples; the sounds have 2000"):
        build(SOUNDS, length=4096)
    with pytest.raises(UserError, match="the source gives image, label, no 'audio'"):
        build({"name": "waveform", "source": {"name": "digits"}})
    with pytest.raises(UserError, match="config.tokenizer.name=byte"):
        data.build(SOUNDS, "train", layout=Layout(128), tokenizer=object())


def test_a_smaller_subset_is_a_part_of_a_larger_one():
    of = {"name": "waveform"}
    part = lambda rows, split="train": build({"name": "subset", "of": of, "source": SPEECH, "rows": rows}, split)
    few, many, all_ = part({"train": 5}), part({"train": 20}), part({})
    assert (len(few), len(many), len(all_)) == (5, 20, 45)
    assert few.index.tolist() == many.index[:5].tolist() != list(range(5))
    np.testing.assert_array_equal(few.example(2, None)["tokens"], all_.dataset.example(few.index[2], None)["tokens"])
    assert len(part({"train": 5}, "validation")) == 15  # all of a split that is not named
    with pytest.raises(UserError, match="rows.train=46 must be from 0 to the 45 rows of the split"):
        part({"train": 46})
    with pytest.raises(UserError, match="unknown split 'valid'"):
        part({"valid": 1})


def test_logs_are_a_function_of_split_and_index_and_their_sums_add_up():
    logs = Logs("train", sizes={"train": 5}, lines=200)
    text = logs[3]["text"]
    assert text == Logs("train", sizes={"train": 9}, lines=200)[3]["text"] != logs[4]["text"]
    assert text != Logs("validation", sizes={"validation": 5}, lines=200)[3]["text"]
    lines = text.splitlines()
    assert len(lines) == 200
    times = [line.split()[1] for line in lines]
    assert times == sorted(times)
    total, began = {}, {}
    for line in lines:
        if opened := re.search(r"opened for (\S+) from (\S+)", line):
            total.setdefault(opened.groups(), []).append(0)
        if get := re.search(r"http: (\S+) (\S+) GET \S+ (\d+) (\d+) total=(\d+)", line):
            user, address, status, size, summed = get.groups()
            before = total[user, address]  # only who has opened a session makes requests, and from where that was
            assert int(summed) - (int(size) if status == "200" else 0) in before
            before.append(int(summed))
        if job := re.search(r"(\S+) job: (\w+ #\d+) (started|finished after (\d+) ms)", line):
            began.setdefault(job[2], line) if job[3] == "started" else began.pop(job[2])
    assert total
    with pytest.raises(UserError, match="lines=0 and sizes.train=2000 must be at least 1"):
        Logs("train", lines=0)
