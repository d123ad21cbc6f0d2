import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import model as model_lib
from vfm import objectives, sharding, tree
from vfm.encoders import VGG, ResNet
from vfm.encoders.cnn import RESNET18, RESNET50, VGG11, VGG16
from vfm.errors import UserError
from vfm.parity import torch_cnn
from vfm.train import state as state_lib
from vfm.train import step

IMAGE = dict(image_size=(224, 224), channels=3)


def count(encoder, collection="params"):
    """Parameters, without making them."""
    image = jnp.zeros((1, *encoder.item_shape))
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), image, train=False))[collection]
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)), shapes


# The counts of the papers' networks with 1000 classes, as torchvision's documentation lists them.
@pytest.mark.parametrize(
    "encoder, published, tokens",
    [
        (VGG(**IMAGE, **VGG11, num_classes=1000), 132_863_336, (49, 512)),
        (VGG(**IMAGE, **VGG16, num_classes=1000), 138_357_544, (49, 512)),
        (ResNet(**IMAGE, **RESNET18, num_classes=1000), 11_689_512, (49, 512)),
        (ResNet(**IMAGE, **RESNET50, num_classes=1000), 25_557_032, (49, 2048)),
    ],
    ids=["vgg11", "vgg16", "resnet18", "resnet50"],
)
def test_published_sizes(encoder, published, tokens):
    found, shapes = count(encoder)
    assert found == published
    for path, leaf in tree.flatten({"encoders_image": shapes}).items():
        assert sharding.parameter_names(path, leaf.shape)
    image = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: encoder.init(jax.random.key(0), x, train=False), image)
    features, out = jax.eval_shape(lambda v, x: encoder.apply(v, x, train=False), variables, image)
    assert features.shape == (2, *tokens) and tokens == (encoder.num_tokens, encoder.width)
    assert out["pooled"].shape == (2, encoder.width) and out["logits"].shape == (2, 1000)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(norm="batch", bottleneck=True), marks=pytest.mark.slow),
        pytest.param(dict(norm="batch", stem="small"), marks=pytest.mark.slow),
        pytest.param(dict(norm="group"), marks=pytest.mark.slow),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_resnet_equals_torch(options):
    """Features, logits, gradients and running averages, in training and in evaluation."""
    pytest.importorskip("torch")
    assert torch_cnn.resnet(**options) < 1e-4


@pytest.mark.parametrize("norm", ["batch", pytest.param("none", marks=pytest.mark.slow)])
def test_vgg_equals_torch(norm):
    pytest.importorskip("torch")
    assert torch_cnn.vgg(norm) < 1e-4


def variables(encoder, images, seed=1):
    return jax.jit(lambda key: encoder.init(key, images, train=False))(jax.random.key(seed))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_moves_the_averages_and_evaluation_uses_them(accumulate):
    image = {"name": "resnet", "image_size": (6, 6), "stages": (1,), "widths": (8,), "norm": "batch"}
    model = model_lib.build(
        {
            "centre": "image",
            "encoders": {"image": image},
            "backbone": None,
            "decoders": {"label": {"name": "classifier", "num_classes": 3}},
        }
    )
    loss_fn, tx = objectives.build({"name": "classification"}, model), optax.sgd(0.1)
    train_step = step.make_train_step(loss_fn, tx, lambda count: 0.1, accumulate=accumulate)
    state = jax.jit(lambda: state_lib.create(model, tx, seed=0, length=1, ema=False))()
    images = jax.random.normal(jax.random.key(0), (16, 1, 6, 6, 1)) * jnp.linspace(1, 4, 16).reshape(-1, 1, 1, 1, 1) + 2
    batch = {"inputs": {"image": images}, "label": jnp.arange(16) % 3}
    alone, _ = jax.jit(train_step)(state, batch)
    averages = tree.flatten(alone.variables)
    if accumulate == 1:  # rows of unequal brightness: the statistics of a device's own rows would be others
        mesh = sharding.make_mesh({"data": 8})
        with sharding.use_mesh(mesh):
            spread, _ = jax.jit(train_step)(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        for path, leaf in tree.flatten(spread.variables).items():
            np.testing.assert_allclose(leaf, averages[path], atol=1e-5, err_msg=path)

    # The stem's averages by hand, a tenth of the way for each micro-batch.
    kernel, wanted = state.params["encoders_image"]["conv_stem"]["kernel"], np.zeros(8)
    for i in range(accumulate):
        x = jax.lax.conv_general_dilated(
            images[i::accumulate, 0], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        wanted += 0.1 * (x.mean(axis=(0, 1, 2)) - wanted)
    stem = averages["batch_stats/encoders_image/norm_stem/mean"]
    np.testing.assert_allclose(stem, wanted, atol=1e-5)

    evaluate = jax.jit(lambda variables: step.make_eval_step(loss_fn)(alone.params, variables, batch)[0]["label"][0])
    assert abs(float(evaluate(alone.variables) - evaluate(state.variables))) > 1e-2


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_blocks_are_the_identity_at_first(norm):
    """The last scale of each block starts at zero."""
    encoder = ResNet(image_size=(6, 6), stages=(5,), widths=(8,), norm=norm)
    images = jax.random.normal(jax.random.key(0), (2, 6, 6, 1))
    given = variables(encoder, images)
    features = jax.jit(lambda v, x: encoder.apply(v, x, train=False)[0])
    x = features(given, images)
    for path, leaf in tree.flatten(given["params"]).items():
        if path.startswith("conv_0_"):
            given["params"][path.split("/")[0]]["kernel"] = 7 * leaf
    np.testing.assert_array_equal(features(given, images), x)
    assert float(x.std()) > 0.1


@pytest.mark.parametrize("encoder", [VGG(stages=(1, 1)), ResNet(stages=(1, 1))], ids=["vgg", "resnet"])
def test_features_are_the_map_rows_first(encoder):
    rows, columns = encoder.grid
    assert (encoder.num_tokens, encoder.width) == (rows * columns, 32)
    images = jnp.zeros((1, 8, 8, 1))
    given = variables(encoder, images)
    if encoder.norm == "group":  # which would carry a change over the whole image
        encoder = encoder.clone(norm="none")
        given = variables(encoder, images)
    run = jax.jit(lambda x: encoder.apply(given, x, train=False)[0])
    moved = jnp.abs(run(images.at[:, 0, 7].set(3.0)) - run(images)).max(axis=(0, 2)).reshape(rows, columns)
    assert moved[0, -1] > 0 and moved[-1, 0] == 0
    np.testing.assert_allclose(
        encoder.apply(given, images, train=False)[1]["pooled"], run(images).mean(axis=1), atol=1e-6
    )


@pytest.mark.parametrize(
    "encoder, message",
    [
        (ResNet(norm="layer"), "unknown norm 'layer'.*batch, group"),
        (ResNet(stem="tiny"), "unknown stem 'tiny'"),
        (ResNet(stages=(1, 1, 1)), r"stages=\(1, 1, 1\) and widths=\(16, 32\) must be of one length"),
        (ResNet(groups=3), "groups=3 does not divide the 16 channels"),
        (VGG(stages=(1,) * 4, widths=(8,) * 4), r"images of \(8, 8\) are too small for 4 stages"),
        (VGG(num_classes=3, head_dropout=1.5), "head_dropout=1.5 must be a share"),
        (VGG(channels=3), r"VGG takes items of shape \(8, 8, 3\), not \(8, 8, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(encoder, message):
    with pytest.raises(UserError, match=message):
        encoder.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
