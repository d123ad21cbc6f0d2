import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vfm import model as model_lib
from vfm import tree
from vfm.data.audio import Dtmf
from vfm.encoders import AST, AudioTransformer
from vfm.encoders.audio import WHISPER, conv_strides, sinusoids
from vfm.errors import UserError

FUNCTIONS = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "functions"
ENCODERS = {
    "frames": AudioTransformer(depth=1),
    "whisper": AudioTransformer(**WHISPER | {"n_fft": 256, "hop": 128, "n_mels": 32, "sample_rate": 8000}, depth=1),
    "waveform": AudioTransformer(stem="waveform", depth=1),
    "ast": AST(num_samples=1024, depth=1),
}


def parameters(model):
    """Random ones, without a compiled initialisation."""
    sound, rng = jnp.zeros((1, *model.item_shape)), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), sound, train=False)["params"])
    draw = lambda path, leaf: rng.normal(path.endswith("scale"), 0.1, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, tree.paths(shapes), shapes)


def bare(params):
    """Parameters with which the Transformer's branches add nothing: tokens do not see each other."""
    return tree.unflatten({path: 0 * leaf if path.endswith(("out/kernel", "down/kernel")) else leaf
                           for path, leaf in tree.flatten(params).items()})  # fmt: skip


def test_tokens_stand_in_the_order_of_time():
    model = AudioTransformer(num_samples=2048, n_fft=128, hop=128, frames=4, depth=1)
    assert (model.item_shape, model.num_tokens) == ((2048,), 4)
    wave = 0.01 * jax.random.normal(jax.random.key(0), (1, 2048))
    params = bare(parameters(model))
    run = jax.jit(lambda wave: model.apply({"params": params}, wave, train=False))
    # A click at sample 1280 lies in the spectrogram's frame 10, of the third token, and in no other token's.
    (y, out), (loud, after) = run(wave), run(wave.at[:, 1280].add(0.05))
    assert y.shape == (1, 4, 32) and out["log_mel"].shape == (1, 16, 32)
    assert int(jnp.abs(after["log_mel"] - out["log_mel"]).max(axis=(0, 2)).argmax()) == 10
    np.testing.assert_array_equal(np.flatnonzero(jnp.abs(loud - y).max(axis=(0, 2))), [2])


@pytest.mark.parametrize("stem", ["frames", "convolutions", "waveform"])
def test_every_stem_gives_the_same_tokens(stem):
    """As many, and a change of the sound moves those near it only, before the Transformer."""
    for samples, hop, frames in ((2048, 64, 2), (2100, 64, 2), (960, 80, 3)):
        model = AudioTransformer(num_samples=samples, n_fft=64, hop=hop, frames=frames, stem=stem, depth=1)
        run = functools.partial(model.init_with_output, jax.random.key(0), train=False)
        (x, _), _ = jax.eval_shape(run, jnp.ones((2, samples)))
        assert x.shape == (2, samples // (hop * frames), 32) == (2, model.num_tokens, 32)
    model = AudioTransformer(num_samples=2048, n_fft=64, hop=64, frames=2, stem=stem, depth=1)
    params = bare(parameters(model))
    run = jax.jit(lambda wave: model.apply({"params": params}, wave, train=False)[1]["input"])
    wave = jax.random.normal(jax.random.key(0), (1, 2048)) * 0.1
    moved = jnp.abs(run(wave.at[:, 1088:1152].set(wave[:, 1088:1152][:, ::-1])) - run(wave)).max(axis=(0, 2))
    far = np.abs(np.arange(16) - 8) > 2  # turned around in time: mean and variance of the item stay
    assert moved[8] > 1e-2 and moved[far].max() < 1e-4


@pytest.mark.parametrize("arg", ["", "tfds"])
def test_one_field_of_a_config_changes_the_route(arg):
    from configs import digits

    c = digits.get_config(arg)
    c.lock()
    plain = model_lib.build(c.model)
    c.update_from_flattened_dict({"model.encoders.audio.stem": "waveform"})
    model = model_lib.build(c.model)
    assert model.encoders["audio"].num_tokens == plain.encoders["audio"].num_tokens
    params = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0), 24))["params"]
    assert "samples_0" in params["encoders_audio"] and "frames" not in params["encoders_audio"]


def test_strides_of_the_waveform():
    assert [conv_strides(n) for n in (512, 320, 160, 7, 22, 1)] == [
        (8, 8, 8),
        (8, 8, 5),
        (8, 5, 4),
        (7,),
        (2, 11),
        (1,),
    ]


@pytest.mark.skipif(not FUNCTIONS.exists(), reason="no reference files")
def test_sinusoids_are_those_of_whisper():
    wanted = np.load(FUNCTIONS / "sincos_positions" / "io.npz")["out/whisper"]
    np.testing.assert_allclose(sinusoids(*wanted.shape), wanted, atol=1e-6)


def test_patches_are_laid_low_frequencies_first():
    model = ENCODERS["ast"]
    rows, columns = model.grid
    assert model.num_tokens == 2 + rows * columns and (rows, columns) == (5, 1)
    model = AST(num_samples=2000, depth=1)
    assert model.grid == (5, 3) and model.length == 23
    params = bare(parameters(model))
    run = jax.jit(lambda x: model.apply({"params": params}, x, train=False))
    bank = jax.random.normal(jax.random.key(0), (1, 23, 32))
    x, out = run(bank)
    for frame, mel, token in ((0, 0, 2), (19, 0, 4), (0, 31, 14), (9, 15, 9)):  # patches overlap, but not there
        moved = jnp.abs(run(bank.at[:, frame, mel].add(1.0))[0] - x).max(axis=(0, 2))
        np.testing.assert_array_equal(np.flatnonzero(moved), [token])
    np.testing.assert_allclose(out["pooled"], (x[:, 0] + x[:, 1]) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["whisper", "waveform", "ast"])
def test_spectrograms_are_taken_as_they_are(name):
    model = ENCODERS[name]
    if name == "waveform":
        with pytest.raises(UserError, match="takes items of shape"):
            model.init(jax.random.key(0), jnp.zeros((1, 8, 32)), train=False)
        return
    sound = jax.random.normal(jax.random.key(0), (2, 1024)) * 0.1
    params = parameters(model)
    run = jax.jit(lambda x: model.apply({"params": params}, x, train=False))
    x, out = run(sound)
    again, _ = run(out["fbank" if name == "ast" else "log_mel"])
    np.testing.assert_allclose(again, x, atol=1e-5)


@pytest.mark.parametrize("name", ["frames", "waveform", "ast"])
def test_silence_is_finite(name):
    model = ENCODERS[name]
    params = parameters(model)

    @jax.jit
    def run(params, sound):
        def loss(params, sound):
            x, _ = model.apply({"params": params}, sound, train=True, rngs={"dropout": jax.random.key(0)})
            return jnp.square(x).sum() + x[..., 0].sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(params, sound)

    for leaf in jax.device_get(jax.tree.leaves(run(params, jnp.zeros((2, 1024))))):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", ["frames", "ast"])
def test_masks_in_training_only(name):
    model = ENCODERS[name].clone(mask_time=0.5, mask_mel=0.5)
    params = parameters(model)
    sound = jax.random.normal(jax.random.key(0), (2, 1024)) * 0.1
    run = jax.jit(
        lambda key, train: model.apply({"params": params}, sound, train=train, rngs={"dropout": key})[0],
        static_argnums=1,
    )
    one, two = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(run(one, False), run(two, False))
    assert float(jnp.abs(run(one, True) - run(two, True)).max()) > 1e-3
    # Without masks no random key is needed.
    jax.eval_shape(lambda: ENCODERS[name].apply({"params": params}, sound, train=True))


@pytest.mark.parametrize(
    "model, message",
    [
        (AudioTransformer(), r"AudioTransformer takes items of shape \(1024,\), not \(1000,\)"),
        (AudioTransformer(stem="waveform"), r"AudioTransformer takes items of shape \(1024,\), not \(1000,\)"),
        (AST(), r"AST takes items of shape \(2000,\), not \(1000,\)"),
        (AudioTransformer(num_samples=1000, frames=8), "num_samples=1000 is shorter than one token of .* 1024 samples"),
        (AudioTransformer(num_samples=1000, stem="patches"), "unknown stem 'patches'.*waveform"),
        (AudioTransformer(num_samples=1000, positions="rope"), "unknown positions 'rope'"),
        (AudioTransformer(num_samples=1000, positions="sinusoidal", width=33), "need an even width, not 33"),
        (AudioTransformer(num_samples=1000, mask_time=1.5), "mask_time=1.5 must be a share"),
        (AST(num_samples=100), "num_samples=100 is shorter than a window of 200 samples"),
        (AST(num_samples=1000, patch_size=16), "a patch of 16 does not fit into 32 bins × 11 frames"),
    ],
)
def test_what_does_not_fit_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.zeros((2, 1000)), train=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_route_learns_the_keys_of_a_telephone(name):
    """DTMF tones at any place in noise, from scratch: at least 95 % of the unseen ones."""
    steps = 400
    sizes = {"train": 2000, "validation": 10, "test": 500}
    fields = dict(num_samples=2048, depth=2, width=32, mlp_dim=64)
    fields |= dict(n_mels=64) if name == "ast" else dict(n_fft=512, n_mels=64, frames=4)
    model = ENCODERS[name].clone(**fields)

    def load(split):
        source = Dtmf(split, duration=0.256, tone=(0.1, 0.2), sizes=sizes)
        return np.stack([source[i]["audio"] for i in range(len(source))]), source.labels

    sounds, labels = load("train")
    head = jax.random.normal(jax.random.key(5), (32, 10)) * 0.1
    params = {"encoder": parameters(model), "head": head}
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.01)

    def logits(params, sound, key=None):
        rngs = {} if key is None else {"dropout": key}
        x, out = model.apply({"params": params["encoder"]}, sound, train=key is not None, rngs=rngs)
        return out.get("pooled", x.mean(axis=1)) @ params["head"]

    @jax.jit
    def step(params, state, sound, label, key):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, sound, key), label).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for i in range(steps):
        rows = rng.integers(0, len(labels), 64)
        params, state = step(params, state, sounds[rows], labels[rows], jax.random.key(i))
    sounds, labels = load("test")
    found = jax.jit(logits)(params, sounds).argmax(axis=-1)
    assert float((found == labels).mean()) >= 0.95
