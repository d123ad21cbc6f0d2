"""Training of byte-level BPE: texts -> counted words -> merges -> a model.

Source: Radford et al. 2019 (GPT-2), section 2.2.
"""

import collections
import concurrent.futures
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator

from vfm.errors import UserError
from vfm.tokenizers.bpe import BPE, BYTE_OF, byte_characters
from vfm.tokenizers.learning import EVERY, learn
from vfm.tokenizers.split import Splitter

log = logging.getLogger(__name__)
BATCH = 1 << 22  # characters that are counted at a time


def count_words(
    texts: Iterable[str], splitter: Splitter, workers: int = 0, report: Callable[[str], None] = log.info
) -> collections.Counter:
    """How often each word occurs in the texts, which are read once and never held in memory together.

    workers: processes that count; 0 counts in this one. Memory grows with the number of distinct words.
    """
    counts, characters, began, told = collections.Counter(), 0, time.monotonic(), time.monotonic()
    batches = _batches(texts, splitter)
    done = _in_workers(batches, splitter, workers) if workers > 0 else ((b, _count(b, splitter)) for b in batches)
    for batch, found in done:
        characters += sum(map(len, batch))
        if counts:
            counts.update(found)
        else:
            counts = found
        if time.monotonic() - told > EVERY:
            told = time.monotonic()
            rate = characters / 1e6 / (told - began)
            report(f"{characters / 1e6:.0f} M characters read ({rate:.1f} M/s), {len(counts)} distinct words")
    return counts


def _batches(texts: Iterable[str], splitter: Splitter) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"training of a tokenizer takes texts, found {type(text).__name__}")
        for block in splitter.blocks(text):
            batch.append(block)
            size += len(block)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _count(batch: list[str], splitter: Splitter) -> collections.Counter:
    counts = collections.Counter()
    for text in batch:
        counts.update(splitter.findall(text))
    return counts


def _in_workers(batches: Iterable[list[str]], splitter: Splitter, workers: int):
    """(batch, counts) in the order of the batches, with only a few of them in flight."""
    # Not forked: the parent may run threads, such as those of JAX.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: collections.deque = collections.deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_count, batch, splitter)))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    splitter: Splitter,
    special: tuple[str, ...],
    min_frequency: int = 0,
    workers: int = 0,
    report: Callable[[str], None] = log.info,
) -> BPE:
    """Byte-level BPE with the ids: special tokens in the order given, the 256 bytes, the merges. See `train_bpe`."""
    least = len(special) + 256
    if vocab_size < least:
        raise UserError(
            f"vocab_size={vocab_size} is too small: {len(special)} special tokens and 256 bytes need {least}"
        )
    if len(set(special)) != len(special):
        raise UserError(f"special tokens name one twice: {special}")
    counts = count_words(texts, splitter, workers, report)
    if not counts:
        raise UserError("training of a tokenizer: the texts are empty")
    report(f"{len(counts)} distinct words; learning {vocab_size - least} merges")
    # Bytes are numbered in the order of their characters, which is what `tokenizers` does and what breaks ties.
    names = [*special, *sorted(byte_characters())]
    ids = {name: i for i, name in enumerate(names)}
    first = {BYTE_OF[char]: ids[char] for char in byte_characters()}

    def join(a: int, b: int) -> int:
        token = names[a] + names[b]
        if ids.get(token, len(special)) < len(special):
            raise UserError(f"the special token {token!r} is also a word of the texts; choose one like <{token}>")
        if token not in ids:
            ids[token] = len(names)
            names.append(token)
        return ids[token]

    try:
        words = [[first[byte] for byte in word.encode("utf-8", "surrogateescape")] for word in counts]
    except UnicodeEncodeError as error:
        raise UserError(f"a text is not Unicode: {error.object!r} has half of a surrogate pair") from None
    merges = learn(words, list(counts.values()), vocab_size, join, min_frequency, report)
    if len(names) < vocab_size:
        log.warning("tokenizer: the texts allow a vocabulary of %d, not %d", len(names), vocab_size)
    return BPE(ids, [(names[a], names[b]) for a, b in merges])
