"""Parameter trees by path: flatten, count, digest, and tables of (regex, value) that must cover every path.

A path joins the keys of the nested dicts with '/', such as `encoders_image/block/attention/query/kernel`.
Paths are public API: sharding, freezing, adapters, loading and checkpoints all match on them.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vfm.errors import UserError

SEPARATOR = "/"


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)


def paths(tree):
    """A tree of the same structure whose leaves are their own paths, 'a/b/c'."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: _path(keys), tree)


def flatten(tree) -> dict[str, Any]:
    """Path → leaf, in the order of `jax.tree.leaves`. Takes dicts, FrozenDicts and any other pytree; the
    leaves may be arrays or ShapeDtypeStructs. Empty sub-trees have no leaf and vanish."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Nested dicts from path → leaf; the inverse of `flatten` for trees of dicts.

    Raises UserError where one path is both a leaf and the parent of another.
    """
    tree: dict = {}
    leaves = set(flat)
    for path, leaf in flat.items():
        *parents, name = path.split(SEPARATOR)
        for depth in range(1, len(parents) + 1):
            parent = SEPARATOR.join(parents[:depth])
            if parent in leaves:
                raise UserError(f"{parent!r} is a leaf and also the parent of {path!r}")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def count(tree) -> int:
    """The number of scalars (parameters) in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """The size of all leaves in bytes, over all devices and without counting replicas."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _host(leaf) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def digest(tree, regex: str = ".*") -> str:
    """SHA-256 (hex) of the paths, dtypes, shapes and bytes of the leaves whose whole path matches `regex`.

    Equal digests mean bitwise equal leaves, whatever their sharding: this proves that frozen parameters did
    not move and that a resumed run equals an uninterrupted one. With many processes all of them must call it.
    Raises UserError when no path matches.
    """
    pattern = _compile(regex, "digest")
    selected = {path: leaf for path, leaf in flatten(tree).items() if pattern.fullmatch(path)}
    if not selected:
        raise UserError(f"digest: {regex!r} matches no parameter path")
    sha = hashlib.sha256()
    for path in sorted(selected):
        array = _host(selected[path])
        sha.update(f"{path}\0{array.dtype.name}\0{array.shape}\0".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _compile(regex: str, what: str) -> re.Pattern:
    try:
        return re.compile(regex)
    except re.error as error:
        raise UserError(f"{what}: {regex!r} is not a regular expression: {error}") from None


def match(tree, rules: Sequence[tuple[str, Any]], what: str, *, allow_unused: bool = False):
    """For every leaf the value of the first row whose regex matches its whole path (re.fullmatch).

    Args:
      tree: parameters or their shapes.
      rules: rows (regex, value), the most special first.
      what: what the table is for, such as 'optimizer.weight_decay'; it opens every error message.
      allow_unused: accept rows that match no path. For tables that ship with the code and serve every model;
        rows that a user wrote should all match something, or they are typos.

    Returns: a tree of the same structure with the values in place of the leaves.

    Raises UserError for a path that no row matches, and for a row that matches no path (the last row may be
    an idle catch-all '.*').
    """
    rules = [tuple(row) for row in rules]
    for row in rules:
        if len(row) != 2 or not isinstance(row[0], str):
            raise UserError(f"{what}: {row!r} is not a pair (regex, value)")
    rows = [(_compile(regex, what), value) for regex, value in rules]
    used = [False] * len(rows)
    listed = ", ".join(repr(regex) for regex, _ in rules) or "none"

    def find(keys, _):
        path, first = _path(keys), None
        for i, (pattern, _value) in enumerate(rows):
            if pattern.fullmatch(path):
                used[i] = True
                first = i if first is None else first
        if first is None:
            raise UserError(f"{what}: no row matches the parameter {path!r}. Rows: {listed}")
        return rows[first][1]

    matched = jax.tree_util.tree_map_with_path(find, tree)
    for i, (regex, _) in enumerate(rules):
        if not (used[i] or allow_unused or (regex == ".*" and i == len(rules) - 1)):
            raise UserError(f"{what}: the row {regex!r} matches no parameter. Paths: {_some_paths(tree)}")
    return matched


def _some_paths(tree, limit: int = 8) -> str:
    known = list(flatten(tree))
    return ", ".join(known[:limit]) + (f", … ({len(known)} in all)" if len(known) > limit else "")
