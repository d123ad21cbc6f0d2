"""Unicode normalisation, control characters, white space, and text out of HTML."""

import re
import unicodedata
from html.parser import HTMLParser

from vfm.errors import unknown

FORMS = ("NFC", "NFKC", "NFD", "NFKD", "none")
WHITESPACE = ("trim", "collapse", "keep")

_SURROGATE = re.compile("[\ud800-\udfff]")
_NEWLINE = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Control characters but tab and newline; zero-width and direction marks, soft hyphen, byte order mark,
# non-characters. Joiners (U+200C, U+200D) stay: Persian, Indic scripts and emoji are spelled with them.
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufdd0-\ufdef"
    "\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_LINE_ENDS = re.compile(r"[ \t]+(?=\n)")
_EMPTY_LINES = re.compile(r"\n{3,}")
_SPACES = re.compile(r"[ \t]+")


def normalise(
    text: str, unicode: str = "NFC", controls: bool = True, whitespace: str = "trim", html: bool = False
) -> str:
    """One standard spelling of `text`; applied twice it changes nothing more (but for `html`).

    Lone surrogates, which UTF-8 cannot hold, always become U+FFFD. html: tags out, entities decoded (`strip_html`).
    controls: removes control, zero-width and direction characters, and makes every line break a newline. unicode:
    normalisation form (Unicode Standard Annex 15), "NFKC" also unites full-width, ligature and circled forms.
    whitespace: "trim" makes Unicode spaces plain and cuts line ends and more than one empty line; "collapse" also
    makes runs of spaces and tabs one space; "keep" changes nothing.
    """
    if not text.isascii():
        text = _SURROGATE.sub("\ufffd", text)
    if html:
        text = strip_html(text)
    if controls:
        text = _CONTROL.sub("", _NEWLINE.sub("\n", text))
    if unicode != "none":
        text = unicodedata.normalize(unicode, text)
    if whitespace == "keep":
        return text
    text = _SPACE.sub(" ", text)
    if whitespace == "collapse":
        text = _SPACES.sub(" ", text).replace("\n ", "\n")
    return _EMPTY_LINES.sub("\n\n", _LINE_ENDS.sub("", text)).strip(" \t\n")


def check(unicode: str, whitespace: str) -> None:
    """Refuses names that `normalise` does not know."""
    if unicode not in FORMS:
        raise unknown("Unicode form", unicode, FORMS, where="the option `unicode`")
    if whitespace not in WHITESPACE:
        raise unknown("treatment of white space", whitespace, WHITESPACE, where="the option `whitespace`")


def identity(text: str) -> str:
    """What two texts share that count as exact duplicates: NFKC, case-folded, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", _CONTROL.sub("", text)).casefold().split())


_BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|caption|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|h[1-6r]"
    "|head|header|li|main|nav|ol|option|p|pre|section|select|summary|table|tbody|t[dhr]|tfoot|thead|title|ul"
)
_SILENT = frozenset({"script", "style", "template"})


class _Text(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag, attrs):
        self.silent += tag in _SILENT
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_startendtag(self, tag, attrs):
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.silent = max(0, self.silent - (tag in _SILENT))
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.silent:
            self.parts.append(data)


def strip_html(text: str) -> str:
    """The text of HTML by the standard library's parser: block tags become line breaks, scripts and styles go."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)
