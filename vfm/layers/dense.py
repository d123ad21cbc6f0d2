"""The matrix product of dense layers."""

import math

import jax


def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **rest):
    """`jax.lax.dot_general` for `nn.Dense` and `nn.DenseGeneral`, as one product of two matrices.

    All leading dimensions of `lhs` become rows. XLA on CPU transposes around products of higher rank: a feed-forward
    layer and its gradient take 1.5 times as long there. A sequence that is cut over devices stays as it is, for its
    rows are not contiguous.
    """
    (left, right), batch = dimension_numbers
    lead = lhs.ndim - len(left)
    plain = (
        batch == ((), ())
        and tuple(left) == tuple(range(lead, lhs.ndim))
        and tuple(right) == tuple(range(len(right)))
        and jax.sharding.get_abstract_mesh().shape.get("context", 1) == 1
    )
    rest = {"precision": precision, "preferred_element_type": preferred_element_type, **rest}
    if not plain:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **rest)
    size = math.prod(lhs.shape[lead:])
    product = jax.lax.dot_general(lhs.reshape(-1, size), rhs.reshape(size, -1), (((1,), (0,)), ((), ())), **rest)
    return product.reshape(*lhs.shape[:lead], *rhs.shape[len(right) :])
