"""The one exception for input that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one line: what is wrong, where, and what would be right.

    `experiments.main` prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not in a list: names the nearest one and lists all."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    place = f" in {where}" if where else ""
    return UserError(f"unknown {kind} {name!r}{place}{hint} Known: {', '.join(known) or 'none'}")
