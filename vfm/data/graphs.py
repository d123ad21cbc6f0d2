"""Graphs as arrays of one shape, for `vfm.encoders.graph`."""

from collections.abc import Sequence

import numpy as np

from vfm.errors import UserError


def pack_graph(
    features: np.ndarray | None,
    edges: Sequence[tuple[int, int]] | np.ndarray,
    num_nodes: int,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    directed: bool = False,
) -> np.ndarray:
    """One graph as float32[V, 1 + F + V], V = num_nodes: node mask | node features | adjacency, padded with zeros.

    features: float[n, F] of the n nodes, n <= V; None: the graph has all V nodes, each with the one feature 1.
    edges: int[m, 2], pairs (from, to) of nodes; there may be none. weights: float[m], 1 by default; 0 is no edge.
    directed: else every edge goes both ways. adjacency[i, j] is the weight of the edge from i to j. An edge may be
    named more than once, with one weight.

    Raises `UserError` for a graph without nodes or with more than fit, for edges of nodes that do not exist or
    with two weights, and for numbers that are not finite.
    """
    features = np.ones((num_nodes, 1), np.float32) if features is None else np.asarray(features, np.float32)
    if features.ndim != 2:
        raise UserError(f"pack_graph: features must be [nodes, features], found shape {features.shape}")
    n, F = features.shape
    if not 0 < n <= num_nodes:
        raise UserError(f"pack_graph: the graph has {n} node(s); it must have from 1 to num_nodes={num_nodes}")
    edges = np.asarray(edges, np.int64).reshape(-1, 2) if len(edges) == 0 else np.asarray(edges)
    if edges.ndim != 2 or edges.shape[1] != 2 or not np.issubdtype(edges.dtype, np.integer):
        raise UserError(
            f"pack_graph: edges must be whole numbers [edges, 2], found {edges.dtype} of shape {edges.shape}"
        )
    outside = edges[((edges < 0) | (edges >= n)).any(axis=1)]
    if len(outside):
        raise UserError(
            f"pack_graph: the edge {tuple(outside[0].tolist())} names a node that is not one of 0 to {n - 1}"
        )
    weights = np.ones(len(edges), np.float32) if weights is None else np.asarray(weights, np.float32)
    if weights.shape != (len(edges),):
        raise UserError(f"pack_graph: weights of shape {weights.shape} for {len(edges)} edge(s); one number per edge")
    if not (np.isfinite(features).all() and np.isfinite(weights).all()):
        raise UserError("pack_graph: features and weights must be finite numbers")
    item = np.zeros((num_nodes, 1 + F + num_nodes), np.float32)
    item[:n, 0] = 1
    item[:n, 1 : 1 + F] = features
    adjacency = item[:, 1 + F :]
    i, j = edges.T
    adjacency[i, j] = weights
    if not directed:
        adjacency[j, i] = weights
    if len(other := np.flatnonzero(adjacency[i, j] != weights)):
        raise UserError(f"pack_graph: the edge {tuple(edges[other[0]].tolist())} is there twice, with two weights")
    return item
