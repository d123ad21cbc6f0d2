"""Encoder of graphs: message passing, or a Transformer over nodes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vfm.encoders import check_item
from vfm.errors import unknown
from vfm.layers.attention import make_mask
from vfm.layers.mlp import MLP
from vfm.layers.transformer import Transformer

STYLES = ("message_passing", "transformer")
AGGREGATIONS = ("sum", "mean")


class GraphEncoder(nn.Module):
    """Features of the nodes of a graph: float[B, V, 1 + F + V] -> (float[B, V, D], out).

    An item is node mask | node features | adjacency, as `vfm.data.graphs.pack_graph` makes it; adjacency[i, j] is the
    weight of the edge from i to j, 0: no edge. What stands at padding nodes does not matter, and their features are
    zero. Another order of the nodes gives the same features in that order, and the same `out["pooled"]`.

    Fields:
      num_nodes, num_features: V and F of an item
      style: "message_passing" (Gilmer et al. 2017): in each of `depth` layers a node adds an MLP of itself and of what
        comes in along its edges. "transformer": every node sees every other and one more token that stands for the
        graph, with embeddings of degrees and attention biases by distance and weight (Graphormer, Ying et al. 2021)
      aggregation, of message passing: "sum" of the neighbours times their weights, as in GIN (Xu et al. 2019, eq. 4.1),
        or their "mean", which does not see how many there are
      readout, of message passing: out["pooled"] is the "sum" or the "mean" of the nodes; with a Transformer it is the
        graph's token
      max_degree, max_distance, of a Transformer: larger degrees and distances count as equal

    out: pooled float[B, D] (finite for a graph without nodes); mask bool[B, V], the nodes that are there; layers
    float[L, B, V, D] after each layer, with the graph's token in front (V + 1) for a Transformer.
    """

    num_nodes: int = 16
    num_features: int = 4
    style: str = "message_passing"
    aggregation: str = "sum"
    readout: str = "mean"
    max_degree: int = 16
    max_distance: int = 8
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int, int]:
        return (self.num_nodes, 1 + self.num_features + self.num_nodes)

    @property
    def num_tokens(self) -> int:
        return self.num_nodes

    @nn.compact
    def __call__(self, graph: jax.Array, *, train: bool):
        check_item(self, graph)
        for field, known in (("style", STYLES), ("aggregation", AGGREGATIONS), ("readout", AGGREGATIONS)):
            if getattr(self, field) not in known:
                raise unknown(field, getattr(self, field), known, "GraphEncoder")
        mask = graph[:, :, 0] > 0
        features = jnp.where(mask[:, :, None], graph[:, :, 1 : 1 + self.num_features], 0)
        both = mask[:, :, None] & mask[:, None, :]
        adjacency = jnp.where(both, graph[:, :, 1 + self.num_features :], 0)
        x = nn.Dense(self.width, dtype=self.dtype, name="projection")(features)
        x = jnp.where(mask[:, :, None], x, 0)
        if self.style == "message_passing":
            x, pooled, layers = self._pass_messages(x, mask, adjacency, train)
        else:
            x, pooled, layers = self._attend(x, mask, adjacency, train)
        return x, {"pooled": pooled, "mask": mask, "layers": layers}

    def _pass_messages(self, x, mask, adjacency, train):
        incoming = adjacency.swapaxes(1, 2)
        if self.aggregation == "mean":
            total = jnp.abs(incoming).sum(axis=2, keepdims=True)
            incoming = incoming / jnp.where(total > 0, total, 1)
        stack = nn.scan(
            MessagePassing,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.mlp_dim, self.dropout, self.depth, self.dtype, name="layers")
        x, layers = stack(x, incoming.astype(x.dtype), mask, train)
        x = jnp.where(mask[:, :, None], nn.LayerNorm(dtype=self.dtype, name="norm")(x), 0)
        pooled = x.sum(axis=1, dtype=jnp.float32)
        if self.readout == "mean":
            pooled = pooled / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        return x, pooled.astype(x.dtype), layers

    def _attend(self, x, mask, adjacency, train):
        B, V, D = x.shape
        edges = adjacency != 0
        for name, axis in (("degree_out", 2), ("degree_in", 1)):
            degree = jnp.minimum(edges.sum(axis=axis), self.max_degree)
            init = nn.initializers.normal(0.02)
            table = nn.Embed(self.max_degree + 1, D, embedding_init=init, dtype=self.dtype, name=name)
            x = x + table(degree)
        token = self.param("graph_token", nn.initializers.normal(0.02), (1, D)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token[None], (B, 1, D)), x], axis=1)
        # A query i and a key j: how far it is from j to i, along the edges, and what the edge from j to i weighs.
        distance = distances(edges, self.max_distance).swapaxes(1, 2)
        to_graph = self.max_distance + 2  # one more kind of pair: those with the graph's token
        distance = jnp.pad(distance, ((0, 0), (1, 0), (1, 0)), constant_values=to_graph)
        weight = jnp.pad(adjacency.swapaxes(1, 2), ((0, 0), (1, 0), (1, 0)))
        table = nn.Embed(
            self.max_distance + 3, self.num_heads, embedding_init=nn.initializers.normal(0.1), name="relative_bias"
        )
        factor = self.param("edge_bias", nn.initializers.normal(0.1), (self.num_heads,))
        bias = table(distance) + weight[..., None] * factor[None, None, None, :]
        seen = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        index = jnp.arange(V + 1)
        x, out = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, mask=make_mask(index, index, causal=False, kv_mask=seen), bias=bias.transpose(0, 3, 1, 2), train=train)
        return jnp.where(mask[:, :, None], x[:, 1:], 0), x[:, 0], out["layers"]


class MessagePassing(nn.Module):
    """x + norm(MLP((1 + epsilon) x + the messages)), a residual layer of GIN (Xu et al. 2019, eq. 4.1).

    x: float[B, V, D]; incoming: float[B, V, V], row v the weights of what comes to v; mask: bool[B, V]. Returns the new
    x twice, as `nn.scan` wants. The norm stands behind the MLP: before it, it would hide how many messages came.
    """

    mlp_dim: int = 64
    dropout: float = 0.0
    depth: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, incoming, mask, train):
        epsilon = self.param("epsilon", nn.initializers.zeros, ()).astype(x.dtype)
        messages = jnp.einsum("bvu,bud->bvd", incoming, x)
        y = MLP(self.mlp_dim, depth=self.depth, dtype=self.dtype, name="mlp")((1 + epsilon) * x + messages, train=train)
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(y)
        y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
        x = jnp.where(mask[:, :, None], x + y, 0)
        return x, x


def distances(edges: jax.Array, most: int) -> jax.Array:
    """Edges on the way from i to j: bool[B, V, V] -> int32[B, V, V]; most + 1: it is longer, or there is none."""
    start = jnp.broadcast_to(jnp.eye(edges.shape[1], dtype=bool)[None], edges.shape)

    def step(reached, _):
        ways = jnp.einsum("bij,bjk->bik", reached.astype(jnp.float32), edges.astype(jnp.float32))
        more = reached | (ways > 0)
        return more, reached

    last, before = jax.lax.scan(step, start, None, length=most)
    # It was not reached in this many of the steps 0, 1, …, most.
    return (~before).sum(axis=0, dtype=jnp.int32) + ~last
