"""The judge knows real digits it has not seen, and no more than its labels say."""

import numpy as np
import pytest

from vfm.data.image import Digits
from vfm.errors import UserError
from vfm.evaluate.judge import Judge


def test_it_classifies_unseen_digits_and_nothing_with_shuffled_labels():
    train, test = Digits("train"), Digits("test")
    judge = Judge(train.images, train.labels)
    assert judge.accuracy(test.images, test.labels) >= 0.95
    assert judge.accuracy(test.images, (test.labels + 1) % 10) < 0.05
    shuffled = Judge(train.images, np.random.default_rng(0).permutation(train.labels))
    assert shuffled.accuracy(test.images, test.labels) < 0.3


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least two classes"):
        Judge(np.zeros((3, 8, 8, 1)), np.zeros((3,), int))
