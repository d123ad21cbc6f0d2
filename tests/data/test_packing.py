import numpy as np
import pytest

from vfm.data.packing import plan
from vfm.errors import UserError

LENGTHS = [3, 10, 1, 25, 7, 7, 2, 8, 1, 16]


@pytest.mark.parametrize("method", ["split", "first_fit"])
@pytest.mark.parametrize("length", [1, 5, 8, 64])
def test_every_token_is_in_exactly_one_row(method, length):
    packed = plan(LENGTHS, length, method)
    seen = [np.zeros(size, int) for size in LENGTHS]
    for index in range(len(packed)):
        row = packed.row(index)
        assert 0 < sum(size for _, _, size in row) <= length
        for document, start, size in row:
            assert size > 0 and start + size <= LENGTHS[document]
            seen[document][start : start + size] += 1
    assert all((counts == 1).all() for counts in seen)


def test_split_fills_every_row_but_the_last():
    packed = plan(LENGTHS, 8, "split")
    used = [sum(size for _, _, size in packed.row(i)) for i in range(len(packed))]
    assert used == [8] * 10 and sum(LENGTHS) == 80
    assert plan([3, 4], 5, "split").row(0) == [(0, 0, 3), (1, 0, 2)]
    assert plan([3, 4], 5, "split").row(1) == [(1, 2, 2)]


def test_first_fit_takes_the_first_row_with_room_and_cuts_no_document_that_fits():
    packed = plan([5, 6, 3, 2, 11], 8, "first_fit")
    rows = [packed.row(i) for i in range(len(packed))]
    assert rows == [[(0, 0, 5), (2, 0, 3)], [(1, 0, 6), (3, 0, 2)], [(4, 0, 8)], [(4, 8, 3)]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 500)
    found = plan(lengths, 64, "first_fit")
    room: list[int] = []
    for size in lengths:  # the plain quadratic method
        row = next((r for r, free in enumerate(room) if free >= size), len(room))
        if row == len(room):
            room.append(64)
        room[row] -= size
    assert [64 - sum(s for _, _, s in found.row(i)) for i in range(len(found))] == room


def test_bad_arguments():
    with pytest.raises(UserError, match="first_fit"):
        plan([3], 8, "first-fit")
    with pytest.raises(UserError, match="at least 1"):
        plan([3], 0, "split")
