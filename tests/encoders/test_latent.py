import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import model as model_lib
from vfm.errors import UserError
from vfm.layers.bottleneck import BOTTLENECKS, gaussian_kl

SHAPE = {"image_size": (8, 12), "channels": 3}
SMALL = {"widths": (8, 16), "groups": 4, "mid_attention": False}
NECKS = {
    "none": {},
    "gaussian": {},
    "vq": {"codebook_size": 8},
    "residual_vq": {"codebook_size": 8, "levels": 3},
    "multiscale_vq": {"codebook_size": 8, "scales": (1, (2, 3), (4, 6))},
}
CODES = {"vq": (24,), "residual_vq": (24, 3), "multiscale_vq": (31,)}


def config(neck="none", shape=SHAPE, encoder=None, decoder=None, **fields):
    both = {"name": "latent", **shape, **SMALL, **fields}
    neck = {"name": neck, **NECKS.get(neck, {})}
    return {
        "centre": "image",
        "backbone": None,
        "encoders": {"image": {**both, "bottleneck": neck, **(encoder or {})}},
        "decoders": {"image": {**both, **(decoder or {})}},
    }


def perceptrons(neck="none", **fields):
    """The same of halves without convolutions, which compile sooner."""
    cfg, both = config(neck), {"name": "mlp", "item_shape": (8, 12, 3), "hidden": (16,), "num_tokens": 24, **fields}
    cfg["encoders"]["image"] = {**both, "width": 4, "bottleneck": cfg["encoders"]["image"]["bottleneck"]}
    cfg["decoders"]["image"] = both
    return cfg


def made(cfg, rows=2):
    """(model, variables, items, out)."""
    model = model_lib.build(cfg)
    variables = jax.jit(lambda: model_lib.init(model, jax.random.key(0), 1))()
    shape = model.encoders["image"].item_shape
    items = jnp.asarray(np.random.default_rng(0).uniform(size=(rows, 1, *shape)), jnp.float32)
    run = jax.jit(lambda variables, items: model.apply(variables, inputs={"image": items}, train=False)[1])
    return model, variables, items, run(variables, items)["image"]


@pytest.mark.parametrize("neck", BOTTLENECKS)
def test_halves_with_every_bottleneck(neck):
    model, variables, items, out = made(perceptrons(neck))
    assert out["features"].shape == (2, 1, 24, 4) and out["reconstructed"].shape == items.shape
    found = out["encoder"]
    if neck in CODES:
        assert found["codes"].shape == (2, *CODES[neck]) and found["latents"].shape == (2, 24, 4)
        np.testing.assert_allclose(out["features"][:, 0], found["quantized"], atol=1e-6)
        np.testing.assert_allclose(found["rate"], np.prod(CODES[neck]) * np.log(8), rtol=1e-6)
        assert 1 <= float(found["perplexity"]) <= 8 * float(found["usage"]) + 1e-4
        quantizer = lambda m, codes: m.encoders["image"].quantizer.decode(codes)
        np.testing.assert_allclose(
            model.apply(variables, found["codes"], method=quantizer), found["quantized"], atol=1e-5
        )
    if neck == "gaussian":
        np.testing.assert_array_equal(out["features"][:, 0], found["mean"])
        np.testing.assert_allclose(found["rate"], gaussian_kl(found["mean"], found["logvar"]), rtol=1e-6)


def test_a_gaussian_latent_is_drawn_in_training_alone():
    model, variables, items, _ = made(perceptrons("gaussian"), rows=64)
    run = jax.jit(
        lambda key: model.apply(variables, inputs={"image": items}, train=True, rngs={"noise": key})[1]["image"]
    )
    one, two = run(jax.random.key(0)), run(jax.random.key(1))
    assert bool((one["features"] != two["features"]).all())
    found = one["encoder"]
    normal = (one["features"][:, 0] - found["mean"]) * jnp.exp(-0.5 * found["logvar"])
    assert abs(float(normal.mean())) < 0.06 and abs(float(normal.std()) - 1) < 0.05


def test_kl_of_torch():
    torch = pytest.importorskip("torch")
    from torch.distributions import Normal, kl_divergence

    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(3, 5, 4)).astype(np.float32), rng.normal(size=(3, 5, 4)).astype(np.float32)
    posterior = Normal(torch.tensor(mean), torch.tensor(logvar).div(2).exp())
    wanted = kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(gaussian_kl(jnp.asarray(mean), jnp.asarray(logvar)), wanted, rtol=1e-5)


def test_scaling_factor_and_centred():
    plain, variables, items, out = made(config("gaussian", embed_dim=5))
    assert out["features"].shape == (2, 1, 24, 5)
    rescaled = model_lib.build(config("gaussian", embed_dim=5, scaling_factor=0.25))
    run = jax.jit(
        lambda model, items: model.apply(variables, inputs={"image": items}, train=False)[1]["image"], static_argnums=0
    )
    scaled = run(rescaled, items)
    np.testing.assert_allclose(scaled["features"], 0.25 * out["features"], rtol=1e-5)
    np.testing.assert_allclose(scaled["encoder"]["mean"], out["encoder"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(scaled["reconstructed"], out["reconstructed"], atol=1e-5)
    centred = run(model_lib.build(config("gaussian", embed_dim=5, centred=True)), (items + 1) / 2)
    np.testing.assert_allclose(centred["features"], out["features"], atol=1e-4)
    np.testing.assert_allclose(centred["reconstructed"], (out["reconstructed"] + 1) / 2, atol=1e-4)


def test_a_spectrogram_is_an_item_of_one_channel():
    cfg = config("vq", shape={"image_size": (16, 20), "channels": 1}, attention=(False, True))
    model, _, items, out = made(cfg)
    assert out["reconstructed"].shape == items.shape == (2, 1, 16, 20, 1)
    assert out["features"].shape == (2, 1, 80, 4)


def test_the_perceptron_of_burda_et_al():
    cfg = perceptrons("gaussian", item_shape=(28, 28, 1), hidden=(200, 200), num_tokens=1)
    cfg["encoders"]["image"]["width"] = cfg["decoders"]["image"]["in_width"] = 50
    cfg["decoders"]["image"]["learned_scale"] = True
    model, variables, items, out = made(cfg)
    assert out["features"].shape == (2, 1, 1, 50) and out["reconstructed"].shape == items.shape
    sizes = jax.tree.map(lambda p: p.size, variables["params"])
    assert sum(jax.tree.leaves(sizes["encoders_image"])) == 785 * 200 + 201 * 200 + 201 * 100
    assert sum(jax.tree.leaves(sizes["decoders_image"])) == 51 * 200 + 201 * 200 + 201 * 784 + 1


@pytest.mark.parametrize(
    "cfg, message",
    [
        (
            config(shape={"image_size": (9, 8)}),
            r"image_size=\(9, 8\) must be multiples of 2, which 2 levels",
        ),
        (config(groups=3), "LatentEncoder: groups=3 does not divide the 8 channels"),
        (config(attention=(True,)), r"attention=\(True,\) and widths=\(8, 16\) must be of one length"),
        (config(encoder={"bottleneck": {"name": "quantum"}}), "unknown bottleneck 'quantum'.*Known: gaussian"),
        (config(encoder={"bottleneck": {"name": "vq", "size": 3}}), "unknown field 'size'.*codebook_size"),
        (config(encoder={"bottleneck": {"name": "vq", "width": 3}}), "the width of the latents is that of the encoder"),
        (config("multiscale_vq", shape={"image_size": (8, 8)}), r"must be the grid of the latents, \(4, 4\)"),
        (config(decoder={"in_width": 5}), r"encoders.image \(LatentEncoder\) gives width 4, but decoders.image"),
        (config(decoder={"image_size": (8, 8)}), "gives number of features 24, but decoders.image .* takes .* 16"),
    ],
    ids=["side", "groups", "attention", "bottleneck", "field", "width", "grid", "decoder", "places"],
)
def test_refuses(cfg, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: model_lib.init(model_lib.build(cfg), jax.random.key(0), 1))
