import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfm import sharding
from vfm.encoders.label import LabelEncoder
from vfm.errors import UserError
from vfm.layers.quantize import (
    Codebook,
    MultiscaleQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
    area,
    bicubic,
    straight_through,
)

FIXTURE = pathlib.Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "functions" / "vector_quantization"
fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no reference files")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def io():
    return np.load(FIXTURE / "io.npz")


def latents(rows=4, places=16, width=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, places, width)), jnp.float32)


def made(quantizer, z, **rest):
    return jax.jit(lambda: quantizer.init(jax.random.key(0), z, train=False, **rest))()


@functools.partial(jax.jit, static_argnums=0)
def step(quantizer, variables, z, key):
    """One training step of what has no gradient: (out, the collection `codebook`)."""
    (_, out), changed = quantizer.apply(variables, z, train=True, rngs={"noise": key}, mutable=["codebook"])
    return out, changed["codebook"]


@fixture
def test_codes_errors_and_gradients_of_the_reference(io):
    z, cotangent = jnp.asarray(io["in/z"][:1]), jnp.asarray(io["in/cotangent"][None])
    quantizer = VectorQuantizer(codebook_size=12, width=6, codebook_init="normal")
    variables = {"params": {"codebook": {"embedding": jnp.asarray(io["in/codebook"])}}}
    features, out = jax.jit(lambda z: quantizer.apply(variables, z, train=False))(z)
    np.testing.assert_array_equal(out["codes"][0], io["out/indices"][0])
    np.testing.assert_allclose(out["quantized"][0], io["out/quantized0"], **CLOSE)
    np.testing.assert_allclose(features[0], io["out/quantized0"], **CLOSE)
    np.testing.assert_allclose(out["codebook_error"][0], io["out/codebook_loss"], **CLOSE)
    np.testing.assert_allclose(out["commitment_error"][0], io["out/commitment_loss"], **CLOSE)
    np.testing.assert_allclose(out["perplexity"], io["out/perplexity"], **CLOSE)
    np.testing.assert_allclose(out["usage"], len(np.unique(io["out/indices"][0])) / 12, **CLOSE)
    np.testing.assert_allclose(out["rate"], [40 * np.log(12)], rtol=1e-6)

    def loss(z, variables):
        features, out = quantizer.apply(variables, z, train=False)
        return (features * cotangent).sum() + 0.25 * out["commitment_error"].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z, variables)[0], io["out/grad_z"], **CLOSE)
    of_codebook = lambda v: quantizer.apply(v, z, train=False)[1]["codebook_error"].sum()
    grad = jax.jit(jax.grad(of_codebook))(variables)["params"]["codebook"]["embedding"]
    np.testing.assert_allclose(grad, io["out/grad_codebook"], **CLOSE)


@fixture
def test_moving_averages_of_the_reference(io):
    quantizer = VectorQuantizer(codebook_size=12, width=6, update="ema", decay=0.9, codebook_init="normal")
    start = jnp.asarray(io["in/codebook"])
    codebook = {"n": jnp.zeros(12), "sums": start, "embedding": start}
    for i, z in enumerate(io["in/z"]):
        out, changed = step(quantizer, {"codebook": {"codebook": codebook}}, jnp.asarray(z[None]), jax.random.key(0))
        codebook = changed["codebook"]
        np.testing.assert_array_equal(out["codes"][0], io["out/indices"][i])
        np.testing.assert_allclose(codebook["n"], io["out/cluster_size_after"][i], **CLOSE)
        np.testing.assert_allclose(codebook["sums"], io["out/ema_sum_after"][i], **CLOSE)
        used = io["out/cluster_size_after"][i] > 0  # the others are divided by the smoothing alone
        np.testing.assert_allclose(codebook["embedding"][used], io["out/codebook_after"][i][used], **CLOSE)
        rest = codebook["embedding"][~used] / io["out/codebook_after"][i][~used] - 1
        assert np.abs(rest).max(initial=0) < 1e-4
        assert "codebook_error" not in out


@fixture
def test_residual_codes_of_the_reference(io):
    quantizer = ResidualQuantizer(codebook_size=12, width=6, levels=3, codebook_init="normal")
    books = io["in/rvq_codebooks"]
    variables = {"params": {f"codebooks_{i}": {"embedding": jnp.asarray(books[i])} for i in range(3)}}
    z = jnp.asarray(io["in/z"][:1])
    _, out = jax.jit(lambda z: quantizer.apply(variables, z, train=False))(z)
    np.testing.assert_array_equal(out["codes"][0].T, io["out/rvq_indices"])
    np.testing.assert_allclose(out["quantized"][0], io["out/rvq_quantized"], **CLOSE)
    decoded = quantizer.apply(variables, out["codes"], method="decode")
    np.testing.assert_allclose(decoded, out["quantized"], **CLOSE)
    used = [np.unique(level).size / 12 for level in io["out/rvq_indices"]]
    np.testing.assert_allclose(out["usage"], np.mean(used), **CLOSE)  # of each codebook
    sums = np.cumsum(books[np.arange(3), io["out/rvq_indices"].T], axis=1)  # [P, levels, W]
    expected = np.square(io["in/z"][0][:, None] - sums).mean(axis=(0, 2)).mean()
    np.testing.assert_allclose(out["commitment_error"][0], expected, rtol=1e-5)


def test_the_straight_through_gradient_is_the_identity():
    z, cotangent = latents(), latents(seed=1)
    for quantizer in (
        VectorQuantizer(),
        VectorQuantizer(update="ema"),
        ResidualQuantizer(),
        MultiscaleQuantizer(scales=(1, 4)),
    ):
        variables = made(quantizer, z)
        value, back = jax.vjp(jax.jit(lambda z, q=quantizer, v=variables: q.apply(v, z, train=False)[0]), z)
        np.testing.assert_array_equal(back(cotangent)[0], cotangent)
        assert bool((value != z).any())
    np.testing.assert_array_equal(jax.grad(lambda z: (straight_through(z, z * 3) * cotangent).sum())(z), cotangent)


def test_no_array_of_all_differences():
    quantizer = VectorQuantizer(codebook_size=128, width=8)
    z = latents(4, 32, 8)
    program = str(jax.make_jaxpr(lambda v, z: quantizer.apply(v, z, train=False))(made(quantizer, z), z))
    assert "4,32,128]" in program and "128,8]" in program and "32,128,8]" not in program


def test_cosine():
    z = latents()
    quantizer = VectorQuantizer(codebook_size=8, normalize=True, codebook_init="normal")
    variables = made(quantizer, z)
    _, out = jax.jit(lambda z: quantizer.apply(variables, z, train=False))(z)
    table = np.asarray(variables["params"]["codebook"]["embedding"])
    table = table / np.linalg.norm(table, axis=-1, keepdims=True)
    unit = np.asarray(z) / np.linalg.norm(z, axis=-1, keepdims=True)
    np.testing.assert_array_equal(out["codes"], (unit @ table.T).argmax(axis=-1))
    np.testing.assert_allclose(out["quantized"], table[out["codes"]], **CLOSE)
    np.testing.assert_allclose(out["latents"], unit, **CLOSE)
    scaled = jax.jit(lambda z: quantizer.apply(variables, z, train=False))(z * 7)[1]
    np.testing.assert_array_equal(scaled["codes"], out["codes"])


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_data_and_restarts_keep_codes_in_use(update):
    """From U(-1/K, 1/K) nearly all latents choose few codes, and without help that stays so."""
    z, size = latents(8, 32), 128
    fields = dict(codebook_size=size, update=update)
    plain = VectorQuantizer(**fields, codebook_init="uniform")
    variables = made(plain, z)
    _, out = jax.jit(lambda z: plain.apply(variables, z, train=False))(z)
    assert out["usage"] < 0.5

    data = VectorQuantizer(**fields, codebook_init="data")
    variables = made(data, z)
    _, changed = step(data, variables, z, jax.random.key(1))
    variables = {**variables, "codebook": changed}
    table = data.apply(variables, method=lambda m: m.codebook.codes())
    rows = np.asarray(z).reshape(-1, 4)
    found = np.abs(np.asarray(table)[:, None] - rows[None]).max(axis=-1).min(axis=1)
    np.testing.assert_allclose(found, 0, atol=1e-6)  # every code is a latent of the batch, no two the same
    assert step(data, variables, z, jax.random.key(1))[0]["usage"] == 1
    assert (changed["codebook"]["age"] == 0).all()

    restarted = VectorQuantizer(**fields, codebook_init="uniform", restart=3)
    variables = made(restarted, z)
    usage = []
    for i in range(10):
        out, changed = step(restarted, variables, z, jax.random.key(i))
        variables = {**variables, "codebook": changed}
        usage.append(float(out["usage"]))
    assert max(usage[:3]) < 0.5 and usage[-1] > 0.9, usage


def test_a_code_in_use_is_not_restarted():
    z = jnp.zeros((1, 4, 2))
    quantizer = VectorQuantizer(codebook_size=3, width=2, codebook_init="normal", restart=1)
    embedding = jnp.asarray([[0.1, 0.0], [5.0, 5.0], [6.0, 6.0]])
    codebook = {"age": jnp.zeros(3, jnp.int32), "offset": jnp.zeros((3, 2))}
    variables = {"params": {"codebook": {"embedding": embedding}}, "codebook": {"codebook": codebook}}
    _, changed = step(quantizer, variables, z, jax.random.key(0))
    np.testing.assert_array_equal(changed["codebook"]["offset"][0], [0, 0])
    np.testing.assert_array_equal(embedding[1:] + changed["codebook"]["offset"][1:], 0)
    # A moved code still learns: it is parameter + offset.
    moved = {**variables, "codebook": changed}
    error = lambda v: quantizer.apply({**moved, "params": v}, z + 1, train=False)[1]["codebook_error"].sum()
    assert float(jnp.abs(jax.grad(error)(moved["params"])["codebook"]["embedding"]).sum()) > 0


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_on_a_mesh_as_on_one_device(update):
    z = latents(8, 8)
    quantizer = VectorQuantizer(codebook_size=16, update=update, codebook_init="uniform", restart=1)
    variables = made(quantizer, z)
    expected, changed = step(quantizer, variables, z, jax.random.key(1))
    mesh = sharding.make_mesh({"data": 8})
    with sharding.use_mesh(mesh):
        rows = jax.device_put(z, sharding.batch_sharding(mesh))
        out, found = step(quantizer, variables, rows, jax.random.key(1))
    np.testing.assert_array_equal(out["codes"], expected["codes"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, changed)


def test_resizing_as_torch_does():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for size, new in ((1, 7), (2, 5), (3, 8), (5, 16), (6, 6)):
        x = rng.normal(size=(1, 1, size, size)).astype(np.float32)
        wanted = torch.nn.functional.interpolate(torch.tensor(x), size=(new, new), mode="bicubic").numpy()[0, 0]
        matrix = bicubic(size, new)
        np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, wanted, atol=1e-5)
        y = rng.normal(size=(1, 1, new, new)).astype(np.float32)
        wanted = torch.nn.functional.interpolate(torch.tensor(y), size=(size, size), mode="area").numpy()[0, 0]
        matrix = area(new, size)
        np.testing.assert_allclose(matrix @ y[0, 0] @ matrix.T, wanted, atol=1e-6)


def reference(z, table, kernels, biases, scales, mixing, which):
    """Algorithms 1 and 2 of VAR in torch: codes of each scale, the sum behind each, and the inputs of the next."""
    import torch
    import torch.nn.functional as F

    z, side = torch.tensor(np.asarray(z)), scales[-1]
    rest = z.reshape(len(z), side, side, -1).permute(0, 3, 1, 2)
    total, codes, sums, inputs = torch.zeros_like(rest), [], [], []
    for s, scale in enumerate(scales):
        small = F.interpolate(rest, size=(scale, scale), mode="area").permute(0, 2, 3, 1)
        index = torch.cdist(small.reshape(-1, small.shape[-1]), torch.tensor(table)).argmin(dim=1)
        index = index.reshape(len(z), scale, scale)
        h = F.interpolate(torch.tensor(table)[index].permute(0, 3, 1, 2), size=(side, side), mode="bicubic")
        k = which[s]
        h = h * (1 - mixing) + mixing * F.conv2d(h, torch.tensor(kernels[k]), torch.tensor(biases[k]), padding=1)
        total, rest = total + h, rest - h
        codes.append(index.reshape(len(z), -1).numpy())
        sums.append(total.permute(0, 2, 3, 1).reshape(z.shape).numpy())
        if s + 1 < len(scales):
            size = (scales[s + 1],) * 2
            inputs.append(F.interpolate(total, size=size, mode="area").flatten(2).transpose(1, 2).numpy())
    return np.concatenate(codes, axis=1), sums, np.concatenate(inputs, axis=1)


def test_multiscale_codes():
    pytest.importorskip("torch")
    scales, z = (1, 2, 3, 5, 6), latents(3, 36)
    quantizer = MultiscaleQuantizer(codebook_size=32, scales=scales, mixing=0.3, codebook_init="normal", convolutions=3)
    variables = made(quantizer, z)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.5, jnp.float32), variables["params"])
    kernels = [np.asarray(params[f"conv_phi_{k}"]["kernel"]).transpose(3, 2, 0, 1) for k in range(3)]
    biases = [np.asarray(params[f"conv_phi_{k}"]["bias"]) for k in range(3)]
    table = np.asarray(params["codebook"]["embedding"])
    # Places 0, 1/4, …, 1 of the scales against thirds of [0, 1], whose middles are 1/6, 1/2, 5/6.
    codes, sums, inputs = reference(z, table, kernels, biases, scales, 0.3, (0, 0, 1, 2, 2))
    apply = lambda method, *args: jax.jit(lambda: quantizer.apply({"params": params}, *args, method=method))()
    features, out = jax.jit(lambda: quantizer.apply({"params": params}, z, grid=(6, 6), train=False))()
    np.testing.assert_array_equal(out["codes"], codes)
    assert out["codes"].shape == (3, 1 + 4 + 9 + 25 + 36)
    np.testing.assert_allclose(out["quantized"], sums[-1], atol=2e-5)
    np.testing.assert_allclose(features, sums[-1], atol=2e-5)
    errors = [np.square(z - total).mean(axis=(1, 2)) for total in sums]
    np.testing.assert_allclose(out["commitment_error"], np.mean(errors, axis=0), rtol=1e-4)
    np.testing.assert_allclose(out["codebook_error"], np.mean(errors, axis=0), rtol=1e-4)
    np.testing.assert_array_equal(apply("encode", z), codes)
    np.testing.assert_allclose(apply("decode", out["codes"]), sums[-1], atol=2e-5)
    np.testing.assert_allclose(apply("inputs", out["codes"]), inputs, atol=2e-5)
    assert inputs.shape == (3, 4 + 9 + 25 + 36, 4)


def test_which_convolution_a_scale_has():
    """Four stand at 1/12, 13/36, 23/36 and 11/12 of the way (the released model); the nearest has the scale."""
    which = lambda **fields: MultiscaleQuantizer(**fields).bind({}).which_phi()
    assert which(scales=tuple(range(1, 9)), convolutions=4) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert which(scales=(1, 2, 4, 8), convolutions=2) == (0, 0, 1, 1)
    assert which(scales=(1, 2, 4), convolutions=0) == (0, 1, 2)
    assert which(scales=(1, 2, 4), convolutions=1) == (0, 0, 0)


def test_scales_that_are_not_square():
    quantizer = MultiscaleQuantizer(scales=(1, (2, 3), (4, 6)))
    z = latents(2, 24)
    variables = made(quantizer, z, grid=(4, 6))
    _, out = jax.jit(lambda: quantizer.apply(variables, z, grid=(4, 6), train=False))()
    assert out["codes"].shape == (2, 1 + 6 + 24) and quantizer.lengths == (1, 6, 24)


def test_training_lowers_the_error_of_all_scales():
    quantizer, z = MultiscaleQuantizer(codebook_size=8, scales=(1, 2)), latents(16, 4)
    variables = made(quantizer, z)
    _, changed = step(quantizer, variables, z, jax.random.key(0))
    params, rest = variables["params"], {"codebook": changed}
    loss = lambda params: quantizer.apply({"params": params, **rest}, z, train=False)[1]["codebook_error"].mean()
    descend = jax.jit(lambda params: jax.tree.map(lambda p, g: p - 2.0 * g, params, jax.grad(loss)(params)))
    before = float(loss(params))
    for _ in range(30):
        params = descend(params)
    assert float(loss(params)) < 0.8 * before


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Codebook(update="mean"), "unknown update 'mean'"),
        (lambda: Codebook(codebook_init="zeros"), "unknown codebook_init 'zeros'"),
        (lambda: Codebook(decay=1.0), "decay=1.0 must be from 0 to less than 1"),
    ],
    ids=["update", "init", "decay"],
)
def test_refuses_fields(make, message):
    with pytest.raises(UserError, match=message):
        make().init(jax.random.key(0), jnp.zeros((1, 4)), method="nearest")


@pytest.mark.parametrize(
    "make, shape, grid, message",
    [
        (lambda: VectorQuantizer(width=3), (1, 4, 4), None, "has codes of width 3, not 4"),
        (lambda: MultiscaleQuantizer(scales=(1, 2)), (1, 9, 4), (3, 3), r"must be the grid of the latents, \(3, 3\)"),
        (lambda: MultiscaleQuantizer(scales=(4, 2)), (1, 4, 4), (2, 2), "the last must be the largest"),
        (lambda: ResidualQuantizer(normalize=True), (1, 4, 4), None, "normalize is for codes that are not added up"),
    ],
    ids=["width", "grid", "order", "residual"],
)
def test_refuses_latents(make, shape, grid, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: make().init(jax.random.key(0), jnp.zeros(shape), grid=grid, train=False))


def test_ids_that_are_none_give_nan():
    """Of codes and of labels, negative ones too."""
    ids = jnp.asarray([0, 4, -1, 5, -6])
    book = Codebook(5, 3)
    vectors = nn.apply(lambda m: m.look_up(ids), book)(book.init(jax.random.key(0), ids, method="look_up"))
    labels = LabelEncoder(num_classes=5, width=3)
    found = labels.apply(labels.init(jax.random.key(0), ids, train=False), ids, train=False)[0][:, 0]
    for values in (vectors, found):
        assert jnp.isnan(values).all(axis=-1).tolist() == [False, False, True, True, True]
