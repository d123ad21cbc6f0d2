"""Texts that tokenizers are tried on: the fixtures where they are, and mixed text that is made here."""

import functools
import inspect
import json
import pathlib
import random
import string
import textwrap

FIXTURES = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "tokenizers"

STRINGS = (
    "", " ", "   ", "\n", "\r\n\r\n", " \t\n x", "a", "Hello, world!", "  two  spaces  ",
    "I'll say it's O'Neill's, WE'VE", "don't DON'T don’t ſ 'ſ",
    "x = {'a': [1, 22, 333, 4444]}  # comment\n\tif x:\n\t\treturn\n", "1234567890 ½ ² Ⅷ ٣٤ 一二",
    "naïve café \u0301e\u0301 n\u0303", "你好，世界！这是一个测试。", "日本語テキスト ｶﾞ", "한국어 문장 한",
    "Привет, мир", "שלום עולם", "مرحبا", "हिन्दी नमस्ते", "ไทย",
    "🎈🎉 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪", "𝕳𝖊𝖑𝖑𝖔 𐐷 𠀀𠮷", "\x00\x01\x1c\x1f\x7f\x85",
    "\u200b\u200d\ufeff\u2028\u2029\u3000", "<s> </s> <unk> [MASK] [CLS] <|endoftext|> <pad> <mask>",
    "tabs\t\tand  spaces", "a\xa0b\u2003c\u202fd", "▁ ▁▁ a▁b", "ﬁ ﬃ ™ © ① Å Å ª º ㎏ ½ \u0344 ﷺ",
    "ªb\u0301 ﬁ\u0301", "İstanbul ǅ ẞ ΑΣ", "🇩\U000e0067 \u0897 \U00016d40 \u1c89 \u32ff ꟲ", "Zürich Straße",
    "http://example.org/?q=a%20b&c=d#e", "а\u0306 й", "=" * 33 + "-" * 70, "a" * 300, "!?" * 40,
)  # fmt: skip


def references(folder: str, name: str = "references.json") -> list[dict]:
    return json.loads((FIXTURES / folder / name).read_text(encoding="utf-8"))


def code_points(seed: int, count: int) -> str:
    """Random characters of all planes, with ordinary ones between them."""
    rng = random.Random(seed)
    planes = ((0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))
    fill = ("", "", " ", "  ", "\n", "a", "Z", "'s", "1", "."), (0.3, 0.2, 0.1, 0.05, 0.05, 0.1, 0.05, 0.05, 0.05, 0.05)
    return "".join(chr(rng.randrange(*rng.choice(planes))) + rng.choices(*fill)[0] for _ in range(count))


@functools.cache
def mixed(size: int, seed: int = 0) -> str:
    """About `size` bytes: code, prose, Chinese, emoji, numbers, rare characters and long runs of spaces."""
    rng = random.Random(seed)
    code = inspect.getsource(textwrap) + inspect.getsource(random) + inspect.getsource(string)
    lines = code.splitlines(keepends=True)
    parts, total = [], 0
    while total < size:
        kind = rng.randrange(8)
        if kind < 3:
            start = rng.randrange(len(lines))
            part = "".join(lines[start : start + rng.randrange(1, 30)])
        elif kind == 3:
            part = "".join(chr(rng.randrange(0x4E00, 0x5200)) for _ in range(rng.randrange(1, 60))) + "，。\n"
        elif kind == 4:
            part = "".join(rng.choice("🎈🎉👩‍👧🏳️‍🌈🇩🇪😀 ") for _ in range(rng.randrange(1, 20)))
        elif kind == 5:
            part = " " * rng.randrange(1, 200) + rng.choice(("\n", "\t", "x", ""))
        elif kind == 6:
            part = f"{rng.random() * 10 ** rng.randrange(12):f} {rng.randrange(10**9)} "
        else:
            part = code_points(rng.randrange(1 << 30), rng.randrange(1, 30))
        parts.append(part)
        total += len(part.encode())
    return "".join(parts)
