import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

from tests import tiny
from tests.encoders import fitting
from vfm import sharding, tree
from vfm.data.graphs import pack_graph
from vfm.encoders import GraphEncoder
from vfm.encoders.graph import STYLES, distances
from vfm.errors import UserError

V, F = 7, 2
every_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with tiny.quick_compilation():
        yield


@functools.cache
def built(style, **fields):
    """(encoder, parameters, jitted call (parameters, graphs) -> (features, out))."""
    model = GraphEncoder(**{"num_nodes": V, "num_features": F, "width": 16, "mlp_dim": 32, "style": style, **fields})
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *model.item_shape)), train=False))
    rng, shapes = np.random.default_rng(5), shapes["params"]
    draw = lambda path, leaf: jnp.asarray(rng.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32)
    params = jax.tree.map(draw, tree.paths(shapes), shapes)
    return model, params, jax.jit(lambda params, x: model.apply({"params": params}, x, train=False))


def a_graph(seed, nodes=5, num_nodes=V, density=0.3):
    """A random directed graph with weights."""
    rng = np.random.default_rng(seed)
    edges = np.argwhere(rng.random((nodes, nodes)) < density)
    weights = rng.uniform(0.5, 1.5, len(edges))
    return pack_graph(rng.normal(size=(nodes, F)), edges, num_nodes, weights=weights, directed=True)


def reorder(item, order):
    """The same graph with its nodes, and its padding, in another order."""
    fixed = item.shape[1] - item.shape[0]
    return np.concatenate([item[order, :fixed], item[order][:, fixed + np.asarray(order)]], axis=1)


def test_packing():
    features = [[1, 2], [3, 4], [5, 6]]
    np.testing.assert_array_equal(
        pack_graph(features, [(0, 1), (2, 2)], 4),
        [[1, 1, 2, 0, 1, 0, 0], [1, 3, 4, 1, 0, 0, 0], [1, 5, 6, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
    )
    np.testing.assert_array_equal(
        pack_graph(features, [(0, 1), (1, 0), (1, 2)], 3, weights=[2, 3, 4], directed=True)[:, 3:],
        [[0, 2, 0], [3, 0, 4], [0, 0, 0]],
    )
    both = pack_graph(features, [(0, 1), (1, 0)], 3)  # both directions of an edge are one edge
    np.testing.assert_array_equal(both, pack_graph(features, [(1, 0)], 3))
    np.testing.assert_array_equal(pack_graph(None, [], 2), [[1, 1, 0, 0], [1, 1, 0, 0]])
    assert pack_graph(features, np.zeros((0, 2)), 3).dtype == np.float32


@pytest.mark.parametrize(
    "features, edges, options, message",
    (
        (np.zeros((0, 2)), [], {}, r"the graph has 0 node\(s\); it must have from 1 to num_nodes=3"),
        (np.zeros((4, 2)), [], {}, r"has 4 node\(s\)"),
        (np.zeros(3), [], {}, r"features must be \[nodes, features\], found shape \(3,\)"),
        (np.zeros((2, 2)), [(0, 1), (0, 2)], {}, r"the edge \(0, 2\) names a node that is not one of 0 to 1"),
        (np.zeros((2, 2)), [(-1, 0)], {}, r"the edge \(-1, 0\)"),
        (np.zeros((2, 2)), [(0.0, 1.0)], {}, "edges must be whole numbers"),
        (np.zeros((2, 2)), [(0, 1, 1)], {}, r"\[edges, 2\], found int64 of shape \(1, 3\)"),
        (np.zeros((2, 2)), [(0, 1)], {"weights": [1, 2]}, r"weights of shape \(2,\) for 1 edge"),
        (np.zeros((2, 2)), [(0, 1), (1, 0)], {"weights": [1, 2]}, r"the edge \(0, 1\) is there twice"),
        (np.full((2, 2), np.nan), [], {}, "must be finite"),
    ),
)
def test_what_is_no_graph_is_refused(features, edges, options, message):
    with pytest.raises(UserError, match=f"pack_graph: .*{message}"):
        pack_graph(features, edges, 3, **options)


@every_style
def test_the_order_of_the_nodes_does_not_matter(style):
    _, params, run = built(style)
    order = np.random.default_rng(1).permutation(V)
    items = np.stack([a_graph(0), a_graph(1, nodes=V), a_graph(2, density=0.9)])
    other = np.stack([reorder(item, order) for item in items])
    (y, out), (z, turned) = run(params, items), run(params, other)
    np.testing.assert_allclose(z, y[:, order], atol=1e-5)
    np.testing.assert_allclose(turned["pooled"], out["pooled"], atol=1e-5)
    assert float(jnp.abs(y[:, order] - y).max()) > 0.1

    @jax.jit
    @jax.grad
    def slope(items):
        return (run(params, items)[1]["pooled"] * jnp.linspace(-1, 1, 16)[None]).sum()

    found = np.stack([reorder(g, order) for g in np.asarray(slope(items))])
    np.testing.assert_allclose(slope(other), found, atol=1e-5)
    assert np.abs(found[:, :, 1 : 1 + F]).max() > 1e-2 and np.abs(found[:, :, 1 + F :]).max() > 1e-2


@every_style
def test_padding_changes_nothing(style):
    _, params, run = built(style)
    items = np.stack([a_graph(seed, nodes=4) for seed in range(3)])
    y, out = run(params, items)
    assert bool((y[:, 4:] == 0).all()) and bool((y[:, :4] != 0).any(axis=-1).all())
    np.testing.assert_array_equal(out["mask"], [[True] * 4 + [False] * 3] * 3)
    noise = np.random.default_rng(1).normal(size=items.shape).astype(np.float32)
    noise[:, :4, : 1 + F + 4] = items[:, :4, : 1 + F + 4]
    noise[:, 4:, 0] = 0
    for value in (noise, np.where(noise == items, items, np.nan)):
        z, changed = run(params, value)
        np.testing.assert_array_equal(z, y)
        np.testing.assert_array_equal(changed["pooled"], out["pooled"])
    smaller = jax.jit(
        lambda x: GraphEncoder(
            num_nodes=4, num_features=F, width=16, mlp_dim=32, style=style
        ).apply({"params": params}, x, train=False)
    )  # fmt: skip
    z, less = smaller(np.stack([a_graph(seed, nodes=4, num_nodes=4) for seed in range(3)]))
    np.testing.assert_allclose(z, y[:, :4], atol=1e-5)
    np.testing.assert_allclose(less["pooled"], out["pooled"], atol=1e-5)


@every_style
def test_graphs_without_edges_or_nodes(style):
    _, params, run = built(style, **({"aggregation": "mean"} if style == "message_passing" else {}))
    items = np.stack([pack_graph(np.ones((3, F)), [], V), np.zeros((V, 1 + F + V), np.float32), a_graph(0)])

    def loss(params, items):
        y, out = run(params, items)
        return (y * y).sum() + (out["pooled"] * jnp.linspace(-1, 1, 16)[None]).sum()

    (y, out), slopes = run(params, items), jax.jit(jax.grad(loss, argnums=(0, 1)))(params, items)
    for leaf in jax.tree.leaves((y, out, slopes)):
        assert bool(jnp.isfinite(leaf).all())
    assert bool((y[1] == 0).all()) and bool((y[0, :3] != 0).any(axis=-1).all())


@pytest.mark.parametrize("depth", (1, 2))
def test_messages_go_along_the_edges(depth):
    """Which node's features reach which, against powers of the adjacency."""
    _, params, run = built("message_passing", depth=depth)
    item = a_graph(3, nodes=V, density=0.2)
    slope = jax.jit(jax.jacobian(lambda x: run(params, jnp.asarray(item).at[:, 1 : 1 + F].set(x)[None])[0][0]))
    reaches = (np.abs(slope(item[:, 1 : 1 + F])) > 0).any(axis=(1, 3)).T  # from, to
    expected = np.linalg.matrix_power(np.eye(V) + (item[:, 1 + F :] != 0), depth) > 0
    np.testing.assert_array_equal(reaches, expected)
    assert not expected.all() and (expected != expected.T).any()


def test_a_mean_does_not_see_how_many_neighbours_there_are():
    star = lambda leaves: pack_graph(np.ones((leaves + 1, F)), [(0, leaf + 1) for leaf in range(leaves)], V)
    items = np.stack([star(2), star(4), star(5)])
    for fields in ({"aggregation": "mean"}, {}):  # the sum is the default
        _, params, run = built("message_passing", **fields)
        y, _ = run(params, items)
        assert bool(jnp.allclose(y[1:, 0], y[:1, 0], atol=1e-5)) == bool(fields)


def test_readouts():
    _, params, run = built("message_passing", readout="sum")
    items = np.stack([a_graph(seed) for seed in range(3)])
    y, out = run(params, items)
    np.testing.assert_allclose(out["pooled"], y.sum(axis=1), atol=1e-5)
    _, params, run = built("message_passing")
    y, out = run(params, items)
    np.testing.assert_allclose(out["pooled"], y[:, :5].mean(axis=1), atol=1e-5)


def test_distances_against_scipy():
    rng, most = np.random.default_rng(0), 3
    edges = rng.random((5, 9, 9)) < 0.15
    found = jax.jit(distances, static_argnums=1)(edges, most)
    for one, graph in zip(found, edges):
        expected = np.minimum(shortest_path(graph, unweighted=True), most + 1)
        np.testing.assert_array_equal(one, expected)
    assert set(np.unique(found)) == set(range(most + 2))


def test_distances_tell_what_messages_cannot():
    """A ring of six and two rings of three: every node has the same neighbourhood at any depth of message passing."""
    ring = lambda *nodes: list(zip(nodes, nodes[1:] + nodes[:1]))
    six, three = ring(0, 1, 2, 3, 4, 5), ring(0, 1, 2) + ring(3, 4, 5)
    items = np.stack([pack_graph(np.ones((6, F)), edges, V) for edges in (six, three, six)])
    gap = {}
    for style in STYLES:
        _, params, run = built(style)
        pooled = run(params, items)[1]["pooled"]
        gap[style] = float(jnp.abs(pooled[0] - pooled[1]).max())
    assert gap["message_passing"] < 1e-5 and gap["transformer"] > 1e-2


def test_parameters_of_a_transformer():
    """Each has a gradient, and a row in the sharding table; the other style is tested with all blocks."""
    model, params, _ = built("transformer")
    items = np.stack([a_graph(seed) for seed in range(4)])

    def loss(params):
        y, out = model.clone(dtype="bfloat16").apply({"params": params}, items, train=False)
        assert y.dtype == out["pooled"].dtype == jnp.bfloat16
        return ((y.sum(axis=1) + out["pooled"]) * jnp.linspace(-1, 1, 16)[None]).sum().astype(jnp.float32)

    for path, slope in tree.flatten({"encoders_g": jax.jit(jax.grad(loss))(params)}).items():
        assert len(sharding.parameter_names(path, slope.shape)) == slope.ndim
        assert bool(jnp.isfinite(slope).all()) and (path.endswith("key/bias") or float(jnp.abs(slope).max()) > 0), path


def test_wrong_fields_and_shapes_are_refused():
    item = jnp.zeros((1, V, 1 + F + V))
    for field, wrong, near in (("style", "transfomer", "transformer"), ("aggregation", "max", None)):
        with pytest.raises(UserError, match=f"unknown {field} '{wrong}' in GraphEncoder.*{near or 'Known: mean, sum'}"):
            GraphEncoder(num_nodes=V, num_features=F, **{field: wrong}).init(jax.random.key(0), item, train=False)
    with pytest.raises(UserError, match=r"GraphEncoder takes items of shape \(7, 10\), not \(7, 9\)"):
        built("transformer")[0].init(jax.random.key(0), item[..., :-1], train=False)


@pytest.mark.slow
@pytest.mark.parametrize("style", ("message_passing", "transformer"))
def test_it_learns_whether_two_nodes_are_connected(style):
    """Random graphs of 6 to 8 nodes, two of them marked, about as many connected as not."""
    N = 8

    def draw(rng, size):
        items, labels = [], []
        while len(items) < size:
            n, wanted = rng.integers(6, N + 1), len(items) % 2
            edges = np.argwhere(np.triu(rng.random((n, n)) < 0.2, 1))
            way = shortest_path(pack_graph(np.ones((n, 1)), edges, n)[:, 2:], unweighted=True)[0, 1]
            if np.isfinite(way) == wanted:
                item = pack_graph(np.eye(n)[:, :2] + [[0, 0.1]], edges, N)
                items.append(reorder(item, np.concatenate([rng.permutation(n), np.arange(n, N)]).astype(int)))
                labels.append(wanted)
        return np.stack(items), np.asarray(labels)

    model = GraphEncoder(num_nodes=N, num_features=2, style=style, width=32, depth=4, mlp_dim=64, readout="sum")
    train, held_out = draw(np.random.default_rng(0), 2000), draw(np.random.default_rng(2), 300)
    assert fitting.accuracy(model, train, held_out, steps=120, classes=2) >= 0.9
