import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import flops
from vfm.backbones import DecoderOnly
from vfm.encoders import ViT


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    "equation, shapes, expected",
    [
        ("mk,kn->mn", [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        ("bmk,bkn->bmn", [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
        ("btnk,bsnk->bnts", [(2, 3, 4, 5), (2, 7, 4, 5)], 2 * 2 * 4 * 3 * 7 * 5),
        ("k,k->", [(9,), (9,)], 2 * 9),
    ],
)
def test_products(equation, shapes, expected):
    assert flops.count(lambda *xs: jnp.einsum(equation, *xs), *(shape(*s) for s in shapes)) == expected


@pytest.mark.parametrize(
    "stride, groups, dilation, padding, out, rel",
    [
        (1, 1, 1, "SAME", 12, 0),
        (1, 1, 1, "VALID", 10, 0.15),  # the backward pass pads
        (2, 1, 1, "SAME", 6, 0),
        (3, 2, 1, "VALID", 4, 0),
        (1, 3, 2, "SAME", 12, 0),
    ],
)
def test_convolution(stride, groups, dilation, padding, out, rel):
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, padding, rhs_dilation=(dilation,) * 2, feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip

    x, w = shape(4, 12, 12, 6), shape(3, 3, 6 // groups, 18)
    assert conv(jnp.zeros(x.shape), jnp.zeros(w.shape)).shape == (4, out, out, 18)
    forward = 2 * (4 * out * out * 18) * (3 * 3 * 6 // groups)
    assert flops.count(conv, x, w) == forward
    # Backward: a convolution for each operand, and no work on the holes of a strided one's gradient.
    both = flops.count(jax.grad(lambda x, w: jnp.square(conv(x, w)).sum(), (0, 1)), x, w)
    assert both == pytest.approx(3 * forward, rel=rel)


def test_gradient_of_a_chain_costs_three_times_the_forward_pass():
    def chain(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.square(x).sum()

    ws, x = [shape(16, 16)] * 5, shape(4, 16)
    one = 2 * 4 * 16 * 16
    assert flops.count(chain, ws, x) == 5 * one
    assert flops.count(jax.grad(chain), ws, x) == 5 * 3 * one - one  # x needs no gradient
    assert flops.count(jax.grad(chain, (0, 1)), ws, x) == 5 * 3 * one


def test_scan_cond_while_and_calls():
    x, one = shape(8, 8), 2 * 8**3
    times = lambda n: lambda x: jax.lax.fori_loop(0, n, lambda _, c: c @ c, x)
    assert flops.count(times(6), x) == 6 * one
    assert flops.count(lambda x: jax.lax.fori_loop(0, jnp.int32(5), lambda _, c: c @ c, x), x) == 5 * one
    assert flops.count(times(0), x) == 0
    loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 3, c[1] @ c[1]), (0, x))[1]
    assert flops.count(loop, x) == 4 * one
    unknown = lambda x: jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c @ c, x)
    assert flops.count(unknown, x) == one
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    assert flops.count(lambda i, x: jax.lax.switch(i, branches, x), 0, x) == 2 * one
    nested = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jax.jit(times(3))(c), None), x, length=4)[0])
    assert flops.count(nested, x) == 12 * one
    assert flops.count(jax.checkpoint(lambda x: x @ x), x) == one
    assert flops.count(lambda x: jax.lax.map(lambda row: row @ row, x), shape(5, 8, 8)) == 5 * one

    square = jax.custom_vjp(lambda x: x @ x)
    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    assert flops.count(square, x) == one
    assert flops.count(jax.grad(lambda x: square(x).sum()), x) == 2 * one  # its own value is not needed


def test_only_what_a_result_needs_is_counted():
    x, one = shape(8, 8), 2 * 8**3

    def body(carry, _):
        a, b, c = carry
        return (a @ a, b @ b + c, c @ c), (a @ b).sum()  # b needs c, but nothing needs the rest

    def last(x, which):
        carry, sums = jax.lax.scan(body, (x, x, x), length=3)
        return (*carry, sums)[which]

    assert flops.count(lambda x: last(x, 0), x) == 3 * one
    assert flops.count(lambda x: last(x, 1), x) == 6 * one
    assert flops.count(lambda x: last(x, 3), x) == 12 * one
    assert flops.count(lambda x: (x @ x, jnp.sin(x))[1], x) == 0


def test_rematerialisation_counts_again():
    def loss(policy):
        block = jax.checkpoint(lambda c, w: (jnp.tanh(jnp.tanh(c @ w) @ w), None), policy=policy)
        return lambda ws, x: jax.lax.scan(block, x, ws)[0].sum()

    ws, x = shape(7, 16, 16), shape(4, 16)
    one = 7 * 2 * 4 * 16 * 16
    keep, drop = jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.nothing_saveable
    assert flops.count(jax.grad(loss(keep)), ws, x) == 6 * one
    assert flops.count(jax.grad(loss(drop)), ws, x) == 8 * one  # both tanh need their values


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    for axes in (("a", "b"), ("a",)):  # over all axes, and over some
        product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, axis_names=set(axes),
                                in_specs=(spec(axes), spec()), out_specs=spec(axes))  # fmt: skip
        assert flops.count(product, shape(16, 8), shape(8, 4)) == 2 * 16 * 8 * 4


def test_ragged_products_cost_one_product():
    x, w, sizes = shape(16, 4), shape(3, 4, 5), jax.ShapeDtypeStruct((3,), jnp.int32)
    assert flops.count(jax.lax.ragged_dot, x, w, sizes) == 2 * 16 * 4 * 5
    grad = jax.grad(lambda x, w, sizes: jnp.square(jax.lax.ragged_dot(x, w, sizes)).sum(), (0, 1))
    assert flops.count(grad, x, w, sizes) == 3 * 2 * 16 * 4 * 5


def test_pallas_kernels_count_the_grid():
    from jax.experimental import pallas as pl

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def product(x, w):
        block = pl.BlockSpec((8, 16), lambda i: (i, 0))
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((32, 16), jnp.float32), grid=(4,),
                              in_specs=[block, pl.BlockSpec((16, 16), lambda i: (0, 0))], out_specs=block,
                              interpret=True)(x, w)  # fmt: skip

    assert flops.count(product, shape(32, 16), shape(16, 16)) == 2 * 32 * 16 * 16


def stack(depth, **fields):
    model = DecoderOnly(width=16, depth=depth, num_heads=4, mlp_dim=24, **fields)
    x = shape(2, 6, 16)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(x.shape), train=False))
    return lambda params, x: model.apply(params, x, train=True)[0], params, x


@pytest.mark.parametrize("kv_heads, gated", [(4, False), (2, True)])
def test_a_scanned_transformer_by_hand(kv_heads, gated):
    """8 layers cost 8 times 1 layer, and that is the formula of the textbook."""
    B, T, D, F, N, K = 2, 6, 16, 24, 4, 4
    projections = 2 * B * T * D * K * (2 * N + 2 * kv_heads)
    attention = 2 * 2 * B * N * T * T * K
    mlp = 2 * B * T * D * F * (3 if gated else 2)
    for depth in (1, 8):
        found = flops.count(*stack(depth, num_kv_heads=kv_heads, gated=gated))
        assert found == depth * (projections + attention + mlp)


def test_gradient_of_a_transformer():
    fn, params, x = stack(8)
    forward = flops.count(fn, params, x)
    backward = flops.count(jax.grad(lambda *args: jnp.square(fn(*args)).sum(), (0, 1)), params, x)
    assert backward == 3 * forward
    remat = stack(8, remat="full")[0]
    again = flops.count(jax.grad(lambda *args: jnp.square(remat(*args)).sum(), (0, 1)), params, x)
    assert 3.5 * forward < again < 4 * forward  # all but the last product of each branch


def test_xla_agrees_where_it_counts_right():
    """Without a scan XLA's own figure is right; it adds element-wise work, which is little at this width."""
    model = ViT(image_size=(16, 16), patch_size=4, width=128, depth=1, num_heads=4, mlp_dim=512)
    x = jnp.zeros((4, 16, 16, 1))
    params = jax.jit(lambda: model.init(jax.random.key(0), x, train=False))()
    fn = lambda params, x: model.apply(params, x, train=False)[0]
    found = flops.count(fn, params, x)
    theirs = jax.jit(fn).lower(params, x).compile().cost_analysis()
    theirs = theirs[0] if isinstance(theirs, list) else theirs
    assert theirs["flops"] == pytest.approx(found, rel=0.05)
    assert np.isfinite(found)
