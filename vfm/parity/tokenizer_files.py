"""Parity of the BPE tokenizer with Hugging Face `tokenizers` and tiktoken, on the standard library's source text."""

import base64
import functools
import pathlib
import tempfile

VOCABULARY = 1024


@functools.cache
def _texts(split: str, limit: int) -> tuple[str, ...]:
    from vfm.data.documents import Stdlib

    documents = Stdlib(split, limit=limit)
    return tuple(documents[i]["text"] for i in range(len(documents)))


@functools.cache
def _trained(pattern: str):
    from vfm import tokenizers

    return tokenizers.train_bpe(_texts("train", 60), vocab_size=VOCABULARY, pattern=pattern, special=())


def merges(pattern: str) -> float:
    """Share of the merges that are not those of `tokenizers` for the same texts, in order."""
    import tokenizers as hf

    from vfm.tokenizers.split import PATTERNS

    theirs = hf.Tokenizer(hf.models.BPE())
    split = hf.pre_tokenizers.Split(hf.Regex(PATTERNS[pattern]), "isolated")
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([split, level])
    trainer = hf.trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    theirs.train_from_iterator(_texts("train", 60), trainer)
    vocabulary = theirs.get_vocab()
    ours = _vocabulary(_trained(pattern))
    return sum(vocabulary.get(token) != i for token, i in ours.items()) / len(ours)


def _vocabulary(tokenizer) -> dict[str, int]:
    from vfm.tokenizers.formats import to_json

    return to_json(tokenizer)["model"]["vocab"]


def ids(pattern: str, library: str) -> float:
    """Share of held-out texts whose ids are not those of a library that reads our files."""
    from vfm import tokenizers

    trained = _trained(pattern)
    with tempfile.TemporaryDirectory() as folder:
        if library == "tokenizers":
            import tokenizers as hf

            tokenizers.save(folder, trained)
            encoder = hf.Tokenizer.from_file(str(pathlib.Path(folder) / "tokenizer.json"))
            encode = lambda text: encoder.encode(text, add_special_tokens=False).ids
        else:
            import tiktoken

            from vfm.tokenizers.split import PATTERNS

            file = pathlib.Path(folder) / "ranks.tiktoken"
            tokenizers.save_tiktoken(file, trained)
            lines = (line.split() for line in file.read_bytes().splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            encoder = tiktoken.Encoding("own", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
            encode = encoder.encode_ordinary
        texts = _texts("test", 40)
        return sum(trained.encode(text) != list(encode(text)) for text in texts) / len(texts)
