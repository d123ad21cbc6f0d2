"""Tokenizers: text to ids and back."""

from vfm.data.construct import construct
from vfm.tokenizers.byte import ByteTokenizer

TOKENIZERS = {"byte": ByteTokenizer}


def build(cfg) -> ByteTokenizer:
    """The tokenizer that `cfg.name` names, with the rest of `cfg` as its fields."""
    return construct("tokenizer", TOKENIZERS, cfg)
