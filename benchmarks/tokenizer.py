"""Tokenizer against Hugging Face `tokenizers` and tiktoken: `nice -n 19 python -m benchmarks.tokenizer [FILE ...]`.

FILE: plain text or .jsonl (field "text"), also with .gz; without files, the sources of Python's standard library. The
texts are shuffled; up to 20 MB train a vocabulary of 8192 with the GPT-2 pattern, and up to 5 MB others are encoded,
text by text: cold with a new tokenizer that has seen no text, warm after it has seen these. All in one run and in turn,
on one core, with one thread each; the figures are CPU seconds and MB per CPU second (best of REPETITIONS; training
once). Exits with status 1 if the ids or merges differ, or if a target is missed.
"""

import json
import os
import random
import sys
import time

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # read when they are imported

from vfm import tokenizers as ours  # noqa: E402
from vfm.errors import UserError  # noqa: E402
from vfm.tokenizers import corpus, formats, split  # noqa: E402

TRAIN, ENCODE = 20_000_000, 5_000_000
VOCAB_SIZE = 8192
REPETITIONS = 5
TARGETS = {  # what, ours / theirs at least
    ("training speed", "tokenizers"): 1.0,
    ("encoding, cold", "tokenizers"): 1.5,
    ("encoding, warm", "tokenizers"): 3.0,
    ("encoding, warm", "tiktoken"): 0.7,
}


def texts(files: list[str]) -> tuple[list[str], list[str]]:
    """Texts to train on, and others to encode."""
    if files:
        found = list(corpus.read(files, split.Splitter("gpt2")))
    else:
        from vfm.data.sources import build_source

        found = [item["text"] for item in build_source({"name": "stdlib"}, "train")]
    random.Random(0).shuffle(found)
    total = sum(len(text.encode()) for text in found)
    train, encode, size = [], [], 0
    for text in found:
        size += len(text.encode())
        if size <= min(TRAIN, 0.8 * total):
            train.append(text)
        elif size <= min(TRAIN, 0.8 * total) + ENCODE:
            encode.append(text)
    return train, encode


def cpu(function) -> tuple[float, object]:
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def _column(figure: float | None) -> str:
    return f"{'-' if figure is None else f'{figure:.2f}':>12}"


def main(files: list[str]) -> int:
    import tiktoken
    import tokenizers

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    train, encode = texts(files)
    if not train or not encode:
        raise UserError("the files hold too few texts")
    size = {
        name: sum(len(text.encode()) for text in part) / 1e6 for name, part in (("train", train), ("encode", encode))
    }
    print(f"text: {', '.join(files) or 'standard library of Python'}")
    print(
        f"{size['train']:.1f} MB in {len(train)} texts to train on, {size['encode']:.1f} MB in {len(encode)} to encode"
    )

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    their_seconds, _ = cpu(lambda: theirs.train_from_iterator(train, trainer))
    our_seconds, mine = cpu(lambda: ours.train_bpe(train, vocab_size=VOCAB_SIZE, special=()))
    written = json.loads(theirs.to_str())
    same = [tuple(pair) for pair in written["model"]["merges"]] == mine.model.listed_merges()

    speed: dict[tuple[str, str], float] = {
        ("training speed", "vfm"): size["train"] / our_seconds,
        ("training speed", "tokenizers"): size["train"] / their_seconds,
    }
    ranks = {mine.decode_bytes([i]): i for i in range(mine.vocab_size)}
    ids = {}
    for _ in range(REPETITIONS):
        new = {
            "vfm": formats.from_json(json.loads(theirs.to_str())),
            "tokenizers": tokenizers.Tokenizer.from_str(theirs.to_str()),
            "tiktoken": tiktoken.Encoding("new", pat_str=split.GPT2, mergeable_ranks=ranks, special_tokens={}),
        }
        run = {
            "vfm": lambda new=new: list(new["vfm"].encode_batch(encode)),
            "tokenizers": lambda new=new: [part.ids for part in new["tokenizers"].encode_batch_fast(encode)],
            "tiktoken": lambda new=new: [new["tiktoken"].encode_ordinary(text) for text in encode],
        }
        for what in ("encoding, cold", "encoding, warm"):
            for name, function in run.items():
                seconds, ids[name] = cpu(function)
                speed[what, name] = max(speed.get((what, name), 0.0), size["encode"] / seconds)
    same = same and ids["vfm"] == ids["tokenizers"] == ids["tiktoken"]

    names = ("vfm", "tokenizers", "tiktoken")
    print(f"training: vfm {our_seconds:.2f} s, tokenizers {their_seconds:.2f} s")
    print(f"{'MB per CPU second':<20}" + "".join(f"{name:>12}" for name in names))
    for what in ("training speed", "encoding, cold", "encoding, warm"):
        print(f"{what:<20}" + "".join(_column(speed.get((what, name))) for name in names))
    missed = not same
    for (what, name), least in TARGETS.items():
        ratio = speed[what, "vfm"] / speed[what, name]
        missed = missed or ratio < least
        print(f"{what}: vfm / {name} = {ratio:.2f} (at least {least})")
    print(f"merges and ids: {'identical' if same else 'DIFFERENT'}")
    return int(missed)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
