import numpy as np
import pytest

from vfm.data.edges import edges
from vfm.data.sources import build_source
from vfm.errors import UserError


def test_edges_are_where_an_image_changes():
    image = np.zeros((6, 6, 3), np.float32)
    image[:, 3:] = 1
    found = edges(image)
    assert found.shape == (6, 6, 1) and found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], np.tile([0, 0, 1, 1, 0, 0], (6, 1)))
    np.testing.assert_allclose(edges(0.5 * image.swapaxes(0, 1))[..., 0], 0.5 * found[..., 0].T)


def test_records_keep_what_they_have():
    source, digits = build_source({"name": "edges", "source": {"name": "digits"}}, "test"), {"name": "digits"}
    item, theirs = source[3], build_source(digits, "test")[3]
    np.testing.assert_array_equal(item["image"], theirs["image"])
    np.testing.assert_array_equal(item["edges"], edges(theirs["image"]))
    assert len(source) == len(source.labels) and item["label"] == source.labels[3] and item["edges"].max() > 0.5


def test_images_are_needed():
    with pytest.raises(UserError, match="source 'edges' needs a source with images, not one with audio, label"):
        build_source({"name": "edges", "source": {"name": "dtmf"}}, "test")[0]
