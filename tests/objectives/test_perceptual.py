"""Perceptual distances: the formula, networks from runs and from published files, and random ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm.encoders.cnn import VGG, VGG16
from vfm.errors import UserError
from vfm.interop import lpips
from vfm.objectives.perceptual import Perceptual, distance
from vfm.train.checkpoint import Checkpointer

NET = {"name": "vgg", "stages": (1, 2), "widths": (8, 16), "norm": "none"}
SHAPE = (8, 8, 1)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=shape), jnp.float32)


def build(cfg, shape=SHAPE):
    return Perceptual(cfg, "image", shape, "config.objective.perceptual")


def test_distance_is_that_of_unit_features():
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=(2, side, side, 5)) for side in (4, 2)] for _ in range(2))
    heads = [rng.uniform(size=5) for _ in range(2)]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    layers = [(h * (unit(x) - unit(y)) ** 2).sum(-1).mean((1, 2)) for x, y, h in zip(a, b, heads)]
    cast = lambda xs: [jnp.asarray(x, jnp.float32) for x in xs]
    np.testing.assert_allclose(distance(cast(a), cast(b), cast(heads)), sum(layers), rtol=1e-5)
    plain = [((unit(x) - unit(y)) ** 2).sum(-1).mean((1, 2)) for x, y in zip(a, b)]
    np.testing.assert_allclose(distance(cast(a), cast(b)), sum(plain), rtol=1e-5)
    np.testing.assert_array_equal(distance(cast(a), cast(a)), 0)


def test_features_that_are_all_zero_have_a_gradient_of_zero():
    zeros, other = jnp.zeros((1, 2, 2, 3)), images(1, 2, 2, 3)
    gradient = jax.grad(lambda x: distance([x], [other]).sum())(zeros)
    np.testing.assert_array_equal(gradient, 0)


def test_a_random_network_is_that_of_its_seed():
    a, b = images(3, *SHAPE), images(3, *SHAPE, seed=1)
    found = [build({"random": NET, "seed": seed}) for seed in (0, 0, 1)]
    run = jax.jit(found[0].__call__)
    first, same, other = (run(net.variables, a, b) for net in found)
    np.testing.assert_array_equal(first, same)
    assert first.shape == (3,) and (np.abs(first - other) > 1e-3).all()
    gradient = jax.jit(jax.grad(lambda x: found[0](found[0].variables, x, b).sum()))(a)
    assert np.isfinite(gradient).all() and np.asarray(gradient).any()


@pytest.mark.parametrize("average", [False, True])
def test_the_network_of_a_run(tmp_path, average):
    """Its features are those of the encoder of the run, whose items have another size, and which has a classifier."""
    fields = {**NET, "norm": "batch", "image_size": (16, 16)}
    encoder = VGG(**{k: v for k, v in fields.items() if k != "name"}, num_classes=3, head_dim=8)
    variables = jax.jit(lambda key: encoder.init(key, images(1, 16, 16, 1), train=False))(jax.random.key(3))
    stats = jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])
    params = {"encoders_image": variables["params"], "other": {"kernel": jnp.ones(3)}}
    state = {
        "params": jax.tree.map(jnp.zeros_like, params) if average else params,
        "ema": params if average else {},
        "variables": {"batch_stats": {"encoders_image": stats}},
    }
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model": {"encoders": {"image": {**fields, "num_classes": 3, "head_dim": 8}}},
                "train": {"ema": 0.9 * average},
            }
        )
    )
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(7, state, {}, wait=True)
    net = build({"path": str(tmp_path)})
    assert set(net.variables) == {"params", "batch_stats"} and "classes" not in net.variables["params"]
    a, b = images(2, *SHAPE), images(2, *SHAPE, seed=1)
    clone, true = encoder.clone(image_size=(8, 8), num_classes=None), {**variables, "batch_stats": stats}
    apply = jax.jit(lambda x: clone.apply(true, x, train=False)[1]["stages"])
    maps = [apply(x) for x in (a, b)]
    assert [x.shape for x in maps[0]] == [(2, 8, 8, 8), (2, 4, 4, 16)]
    np.testing.assert_allclose(jax.jit(net.__call__)(net.variables, a, b), distance(*maps), rtol=1e-5)
    with pytest.raises(UserError, match="has encoders.sound"):
        build({"path": str(tmp_path), "encoder": "sound"})


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_weights_give_the_distance_of_their_library(tmp_path, monkeypatch, suffix):
    """In the layout of torchvision's VGG16, with fewer channels, and the heads of LPIPS."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(lpips, "VGG16", {**VGG16, "widths": (4, 6, 8, 8, 8)})
    torch.manual_seed(0)
    layers, before, ends = [], 3, []
    for count, width in zip(VGG16["stages"], (4, 6, 8, 8, 8)):
        for _ in range(count):
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU()]
            before = width
        ends.append(len(layers) - 1)
        layers.append(torch.nn.MaxPool2d(2))
    features = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for layer in features:
            if hasattr(layer, "weight"):
                torch.nn.init.kaiming_normal_(layer.weight)
    state = {f"features.{name}": x for name, x in features.state_dict().items()}
    heads = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate((4, 6, 8, 8, 8))}
    for name, tensors in (("vgg16", state), ("heads", heads)):
        if suffix == "pth":
            torch.save(tensors, tmp_path / f"{name}.pth")
        else:
            from safetensors.torch import save_file

            save_file(tensors, tmp_path / f"{name}.safetensors")
    a, b = images(2, 32, 32, 3), images(2, 32, 32, 3, seed=1)

    def maps(x):
        x = 2 * torch.as_tensor(np.array(x)).permute(0, 3, 1, 2) - 1  # LPIPS takes [-1, 1], and its scaling layer:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = (x - shift[:, None, None]) / scale[:, None, None], []
        for i, layer in enumerate(features):
            x = layer(x)
            if i in ends:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    with torch.no_grad():
        wanted = sum(
            (heads[f"lin{k}.model.1.weight"] * (x - y).square()).sum(1).mean((1, 2))
            for k, (x, y) in enumerate(zip(maps(a), maps(b)))
        )
    paths = {"path": str(tmp_path / f"vgg16.{suffix}"), "heads": str(tmp_path / f"heads.{suffix}")}
    net = build(paths, (32, 32, 3))
    run = jax.jit(net.__call__)
    np.testing.assert_allclose(run(net.variables, a, b), wanted, rtol=1e-4)
    grey = build(paths, (32, 32, 1))
    np.testing.assert_allclose(
        jax.jit(grey.__call__)(grey.variables, a[..., :1], b[..., :1]),
        run(net.variables, jnp.repeat(a[..., :1], 3, -1), jnp.repeat(b[..., :1], 3, -1)),
        rtol=1e-5,
    )
    with pytest.raises(UserError, match="no 'features.0.weight'"):
        build({"path": paths["heads"]}, (32, 32, 3))


@pytest.mark.parametrize(
    "cfg, shape, words",
    [
        ({}, SHAPE, ("path", "random")),
        ({"random": NET, "path": "runs/x"}, SHAPE, ("no file", "runs/x")),
        ({"random": NET, "weight": 1.0}, SHAPE, ("weight", "heads")),
        ({"random": {"name": "vit"}}, SHAPE, ("ViT", "'vgg' or 'resnet'")),
        ({"random": {**NET, "channels": 2}}, SHAPE, ("2 channels", "1")),
        ({"random": NET}, (16,), ("(16,)", "no images")),
        ({"path": "nowhere/vgg16.pth"}, SHAPE, ("no file", "nowhere")),
    ],
    ids=["none", "both", "unknown", "network", "channels", "shape", "file"],
)
def test_what_does_not_fit_is_refused(cfg, shape, words):
    with pytest.raises(UserError) as error:
        build(cfg, shape)
    assert all(word in str(error.value) for word in words), error.value
