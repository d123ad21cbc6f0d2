"""How text is corrupted for pretraining: pure functions of token ids and a random generator, in NumPy.

`ids` are int[n], one piece of text. Functions that give the parts of a training example return arrays by the names of
the batch (`tokens`, `targets`, `loss_mask`, …), as long as they need to be: padding and packing come later.
"""

from collections.abc import Callable, Sequence

import numpy as np

UNITS = ("token", "word", "span")


def stochastic_round(x: float, rng: np.random.Generator) -> int:
    """A whole number next to x >= 0, whose mean is x: rates stay exact on short texts."""
    return int(np.floor(x + rng.random()))


def place(lengths: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """First tokens of spans of these lengths (0 is allowed) in n tokens, uniformly among all ways to place them.

    Spans stay in the order of `lengths`, and at least one token stands between two of them. Needs
    sum(lengths) + len(lengths) - 1 <= n.
    """
    free = n - int(lengths.sum())
    gaps = np.sort(rng.choice(free + 1, len(lengths), replace=False))  # tokens outside spans before each span
    return gaps + np.cumsum(lengths) - lengths


def _fit(lengths: np.ndarray, n: int) -> np.ndarray:
    """The lengths without those at the end for which n tokens have no room."""
    lengths = np.minimum(lengths, n)
    fits = np.cumsum(lengths) + np.arange(len(lengths)) <= n
    return lengths[: int(fits.sum())]


def poisson_positive(mean: float, rng: np.random.Generator) -> int:
    """A draw from Poisson(mean) under the condition that it is not 0."""
    while not (length := int(rng.poisson(mean))):
        pass
    return length


# ------------------------------------------------------------------------------------ BERT


def mask_tokens(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    random_ids: np.ndarray,
    maskable: np.ndarray,
    rate: float = 0.15,
    unit: str = "token",
    word_starts: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Masked-language-model corruption (Devlin et al. 2019, section 3.1).

    A share `rate` of the maskable tokens becomes a target: 80 % of them are replaced by `mask_id`, 10 % by a random one
    of `random_ids`, 10 % stay. maskable: bool[n], False at special tokens. unit: what is chosen: a "token"; a "word"
    (whole-word masking; word_starts: bool[n]), never more tokens than the rate allows; or a "span" of Geometric(0.2)
    tokens, 10 at most, replaced as one (SpanBERT, Joshi et al. 2020).
    Returns tokens, targets int32[n] (the original ids) and loss_mask float32[n].
    """
    n, candidates = len(ids), np.flatnonzero(maskable)
    count = min(stochastic_round(rate * len(candidates), rng), len(candidates))
    chosen, group = np.zeros(n, bool), np.arange(n)
    if unit == "token":
        chosen[rng.choice(candidates, count, replace=False)] = True
    elif unit == "word":
        word = np.cumsum(word_starts)
        numbers, sizes = np.unique(word[candidates], return_counts=True)
        taken, left = [], count
        for i in rng.permutation(len(numbers)):
            if sizes[i] <= left:
                taken.append(numbers[i])
                left -= sizes[i]
        chosen = np.isin(word, taken) & maskable
    else:
        lengths = np.zeros(0, int)
        while lengths.sum() < count:
            lengths = np.append(lengths, min(rng.geometric(0.2), 10, count - lengths.sum()))
        lengths = _fit(lengths, len(candidates))
        for start, length in zip(place(lengths, len(candidates), rng), lengths):
            chosen[candidates[start : start + length]] = True
            group[candidates[start : start + length]] = candidates[start]
    draw = rng.random(n)[group]
    tokens = np.where(chosen & (draw < 0.8), mask_id, ids)
    swapped = chosen & (draw >= 0.8) & (draw < 0.9)
    tokens[swapped] = rng.choice(random_ids, int(swapped.sum()))
    return {
        "tokens": tokens.astype(np.int32),
        "targets": ids.astype(np.int32),
        "loss_mask": chosen.astype(np.float32),
    }


def split_in_two(sentence_starts: np.ndarray, rng: np.random.Generator) -> int:
    """Where the second of two segments begins: a random sentence but the first, else any token but the first."""
    choices = np.flatnonzero(sentence_starts[1:]) + 1
    return int(rng.choice(choices)) if len(choices) else int(rng.integers(1, len(sentence_starts)))


def sentence_pair(
    ids: np.ndarray,
    sentence_starts: np.ndarray,
    rng: np.random.Generator,
    *,
    method: str,
    other: Callable[[np.random.Generator], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, int]:
    """Two segments (a, b, label) of at most n tokens together, half of each label.

    label 0: b follows a in the text. label 1 with method "nsp" (Devlin et al. 2019): b comes from another document, the
    beginning of other(rng); with "sop" (ALBERT, Lan et al. 2020): the two segments change places.
    """
    at = split_in_two(sentence_starts, rng)
    a, b, label = ids[:at], ids[at:], int(rng.integers(2))
    if label and method == "sop":
        a, b = b, a
    elif label:
        b = other(rng)[: len(b)]
    return a, b, label


# ------------------------------------------------------------------------------------ T5


def random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths int[segments], each at least 1, that add up to `items`; all such lists are equally likely."""
    cuts = np.sort(rng.choice(items - 1, segments - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def noise_counts(n: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(noise tokens, spans) of span corruption on n >= 2 tokens."""
    noise = min(max(round(n * rate), 1), n - 1)
    return noise, min(max(round(noise / mean_span), 1), noise, n - noise)


def span_corruption_lengths(n: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """(input length, target length) of span corruption on n >= 2 tokens, each with its end-of-sequence token."""
    noise, spans = noise_counts(n, rate, mean_span)
    return n - noise + spans + 1, noise + spans + 1


def span_corruption(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    sentinels: Sequence[int],
    eos_id: int,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Span corruption (T5, Raffel et al. 2020, section 3.1.4): (inputs, targets), each with eos_id at its end.

    round(rate · n) tokens are noise, in round(noise / mean_span) spans. The lengths of the spans, and of what stands
    between them, are uniform over all ways to cut; text comes first. In the inputs each span is one sentinel; the
    targets are each sentinel with its span. `sentinels` are the ids in the order of use.
    """
    noise, spans = noise_counts(len(ids), rate, mean_span)
    kept_lengths = random_segmentation(len(ids) - noise, spans, rng)
    noise_lengths = random_segmentation(noise, spans, rng)
    inputs, targets, at = [], [], 0
    for kept, lost, sentinel in zip(kept_lengths, noise_lengths, sentinels[:spans], strict=True):
        inputs += [ids[at : at + kept], [sentinel]]
        targets += [[sentinel], ids[at + kept : at + kept + lost]]
        at += kept + lost
    return tuple(np.concatenate([*parts, [eos_id]]).astype(np.int32) for parts in (inputs, targets))


# ------------------------------------------------------------------------------------ BART


def permute_sentences(ids: np.ndarray, sentence_starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sentences in random order (BART, Lewis et al. 2020, section 2.2)."""
    sentences = np.split(ids, np.flatnonzero(sentence_starts[1:]) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def infilling_spans(n: int, rate: float, mean_span: float) -> int:
    """The most spans that `text_infilling` draws on n tokens."""
    return int(np.ceil(rate * n / mean_span))


def text_infilling(
    ids: np.ndarray, rng: np.random.Generator, *, mask_id: int, rate: float = 0.3, mean_span: float = 3.0
) -> np.ndarray:
    """Text infilling (BART, Lewis et al. 2020, section 2.2): each span is replaced by one mask.

    Span lengths are Poisson(mean_span); a span of length 0 puts a mask between two tokens. There are so many spans that
    on average a share `rate` of the tokens is gone (BART: 30 %); on texts too short for the spans drawn, fewer.
    """
    n = len(ids)
    spans = stochastic_round(rate * n / mean_span, rng)
    lengths = _fit(rng.poisson(mean_span, spans), n)
    pieces, at = [], 0
    for start, length in zip(place(lengths, n, rng), lengths):
        pieces += [ids[at:start], [mask_id]]
        at = start + length
    return np.concatenate([*pieces, ids[at:]]).astype(np.int32)


# ------------------------------------------------------------------------------------ GLM


def blank_count(n: int, rate: float, mean_span: float) -> int:
    """How many spans `token_blanks` may use on n tokens: the expected number and four standard deviations."""
    mean = rate * n / (mean_span / -np.expm1(-mean_span))
    return int(np.ceil(mean + 4 * np.sqrt(mean))) + 1


def token_blanks(n: int, rng: np.random.Generator, rate: float = 0.15, mean_span: float = 3.0) -> np.ndarray:
    """Spans int[S, 2] (start, length): positive Poisson lengths until at least rate · n tokens are blank.

    GLM (Du et al. 2022, section 2.1). A draw of more than `blank_count` spans is drawn again.
    """
    while True:
        lengths: list[int] = []
        while sum(lengths) < rate * n or not lengths:
            lengths.append(min(poisson_positive(mean_span, rng), n))
        if len(lengths) <= blank_count(n, rate, mean_span) and sum(lengths) + len(lengths) - 1 <= n:
            sizes = np.asarray(lengths)
            return np.stack([place(sizes, n, rng), sizes], axis=1)


def sentence_blanks(sentence_starts: np.ndarray, rng: np.random.Generator, rate: float, most: int) -> np.ndarray:
    """Spans int[S, 2] (start, length): whole sentences at random until rate · n tokens are blank, or `most` spans.

    GLM's sentence-level objective (Du et al. 2022, section 2.1).
    """
    n = len(sentence_starts)
    starts = np.concatenate([[0], np.flatnonzero(sentence_starts[1:]) + 1])
    sizes = np.diff(starts, append=n)
    order = rng.permutation(len(starts))
    enough = int(np.searchsorted(np.cumsum(sizes[order]), rate * n)) + 1
    chosen = np.sort(order[: min(enough, most)])
    return np.stack([starts[chosen], sizes[chosen]], axis=1)


def document_blank(n: int, rng: np.random.Generator) -> np.ndarray:
    """One span int[1, 2] (start, length) at the end of the text, of 50 % to 100 % of it.

    GLM's document-level objective (Du et al. 2022, section 2.1; at the end as in GLM-130B, Zeng et al. 2023).
    """
    length = int(rng.integers((n + 1) // 2, n + 1))
    return np.asarray([[n - length, length]])


def blank_infilling(
    ids: np.ndarray, spans: np.ndarray, rng: np.random.Generator, *, mask_id: int, start_id: int, end_id: int
) -> dict[str, np.ndarray]:
    """Autoregressive blank infilling with 2-D positions (GLM, Du et al. 2022, figure 2).

    spans: int[S, 2] (start, length) in the order of the text. Part A is the text with one mask per span. Part B is the
    spans in random order, each behind `start_id`; its targets are the span and then `end_id`. Part A sees itself only
    (`prefix` is True there); part B sees part A and what stands before it in part B.
    Returns arrays of n - blank + S + blank + S elements: tokens, targets, loss_mask (1 in part B), prefix,
    positions (place in part A; in part B that of the span's mask) and block_positions (0 in part A; 1, 2, … in a span).
    """
    part_a, masks, at = [], [], 0
    size = 0  # of part A so far
    for start, length in spans:
        part_a += [ids[at:start], [mask_id]]
        size += start - at + 1
        masks.append(size - 1)
        at = start + length
    part_a = np.concatenate([*part_a, ids[at:]])
    tokens, targets, positions, blocks = [part_a], [part_a], [np.arange(len(part_a))], [np.zeros(len(part_a))]
    for i in rng.permutation(len(spans)):
        start, length = spans[i]
        span = ids[start : start + length]
        tokens.append(np.concatenate([[start_id], span]))
        targets.append(np.concatenate([span, [end_id]]))
        positions.append(np.full(length + 1, masks[i]))
        blocks.append(np.arange(1, length + 2))
    tokens, targets, positions, blocks = (
        np.concatenate(parts).astype(np.int32) for parts in (tokens, targets, positions, blocks)
    )
    prefix = np.arange(len(tokens)) < len(part_a)
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": (~prefix).astype(np.float32),
        "prefix": prefix,
        "positions": positions,
        "block_positions": blocks,
    }


# ------------------------------------------------------------------------------------ prefix LM, XLNet


def prefix_lm(ids: np.ndarray, following: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Prefix language modelling (Raffel et al. 2020, section 3.2.1): a random split into prefix and what is predicted.

    following: the tokens behind ids[0], ids[1], …; one fewer than ids where the text ends. At least one token is in the
    prefix and, if there is a choice, at least one is predicted. Returns tokens, targets, loss_mask, prefix.
    """
    n = len(ids)
    prefix = np.arange(n) < rng.integers(1, max(len(following), 1) + 1)
    targets = np.zeros(n, np.int32)
    targets[: len(following)] = following
    predicts = np.arange(n) < len(following)
    predicts[: int(prefix.sum()) - 1] = False
    return {
        "tokens": ids.astype(np.int32),
        "targets": targets,
        "loss_mask": predicts.astype(np.float32),
        "prefix": prefix,
    }


def permutation_order(maskable: np.ndarray, rng: np.random.Generator, predict: float = 1 / 6) -> np.ndarray:
    """Factorisation order int32[n] of permutation language modelling (XLNet, Yang et al. 2019, sections 2.2, 2.3).

    A random order of the maskable tokens, of which the last share `predict` (1/K) is predicted: 0 for the tokens that
    are only context, 1, 2, … for the targets in the order of their prediction. A content stream sees the tokens of its
    own number or lower ones, a query stream those of lower numbers: the context sees itself, as in XLNet's own code.
    """
    candidates = np.flatnonzero(maskable)
    count = min(stochastic_round(predict * len(candidates), rng), len(candidates))
    order = np.zeros(len(maskable), np.int32)
    order[rng.choice(candidates, count, replace=False)] = np.arange(1, count + 1)
    return order
