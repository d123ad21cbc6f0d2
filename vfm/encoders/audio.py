"""Audio encoders: a Transformer on log-mel frames or on the samples themselves, and AST on patches of a filter bank.

Spectrograms are computed on the accelerator; the encoders take waveforms, or spectrograms that are computed already.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm.encoders import check_item
from vfm.errors import UserError, unknown
from vfm.layers.norm import make_norm
from vfm.layers.spectrogram import fbank, fbank_sizes, log_mel, mask_spectrogram
from vfm.layers.transformer import Transformer

STEMS = ("frames", "convolutions", "waveform")
POSITIONS = ("learned", "sinusoidal")
# Field values of Whisper's encoder (Radford et al. 2022), for configs: {"name": "audio", **WHISPER, "width": 384, ...}.
WHISPER = dict(
    sample_rate=16_000,
    n_fft=400,
    hop=160,
    n_mels=80,
    frames=2,
    stem="convolutions",
    positions="sinusoidal",
    activation="gelu",
    key_bias=False,
)


def sinusoids(length: int, width: int) -> np.ndarray:
    """Whisper's fixed positions float32[length, D]: all sines, then all cosines; wavelengths from 2π to 10,000 · 2π."""
    if width % 2:
        raise UserError(f"sinusoidal positions of sounds need an even width, not {width}")
    frequency = 10_000.0 ** -np.linspace(0, 1, width // 2)
    angle = np.arange(length)[:, None] * frequency[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)


def conv_strides(total: int) -> tuple[int, ...]:
    """Factors of `total`, the largest up to 8 first, a prime above 8 where it must be: 320 -> (8, 8, 5)."""
    found = []
    while total > 1:
        factor = next((k for k in range(8, 1, -1) if total % k == 0), None)
        factor = factor or next(k for k in range(9, total + 1) if total % k == 0)
        found.append(factor)
        total //= factor
    return tuple(found) or (1,)


class AudioTransformer(nn.Module):
    """Transformer on a sound: waveform float[B, S] in [-1, 1] -> (float[B, T, D], out), T = S / hop / frames.

    Fields:
      num_samples: S; `item_shape` is (num_samples,), and another length raises `UserError`
      sample_rate, n_fft, hop, n_mels: of `log_mel`. frames: spectrogram frames of one token
      stem: how the sound becomes tokens, which have the same length, frames · hop samples, in all of them:
        "frames": a strided convolution over the frames of the log-mel spectrogram
        "convolutions": two convolutions of width 3 over the frames, the second of stride `frames`, each with GELU
          (Whisper, Radford et al. 2022, section 2.2)
        "waveform": strided convolutions, each with LayerNorm and GELU, on the samples, which are shifted and scaled to
          mean 0 and variance 1 (as in wav2vec 2.0, Baevski et al. 2020); their strides are `conv_strides` of
          frames · hop, and their kernels twice as wide. sample_rate, n_fft, n_mels and the masks have no effect
      positions: "learned", or "sinusoidal" (`sinusoids`)
      mask_time, mask_mel, num_masks: `mask_spectrogram` in training; 0: none
      activation, key_bias (False: none on the keys), norm_epsilon, dropout, remat: see `BlockFields`

    Instead of the waveform the call takes its log-mel spectrogram float[B, S / hop, n_mels] as well.
    out["log_mel"]: float[B, S / hop, n_mels], where there is one; out["input"] float[B, T, D] of the Transformer;
    out["layers"]. Silence gives finite features and gradients.
    """

    num_samples: int = 1024
    sample_rate: int = 8000
    n_fft: int = 256
    hop: int = 128
    n_mels: int = 32
    frames: int = 2
    stem: str = "frames"
    positions: str = "learned"
    mask_time: float = 0.0
    mask_mel: float = 0.0
    num_masks: int = 2
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    activation: str = "gelu_tanh"
    key_bias: bool = True
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int]:
        return (self.num_samples,)

    @property
    def num_tokens(self) -> int:
        return self.num_samples // self.hop // self.frames

    @nn.compact
    def __call__(self, waveform: jax.Array, *, train: bool):
        for field, known in (("stem", STEMS), ("positions", POSITIONS)):
            if getattr(self, field) not in known:
                raise unknown(field, getattr(self, field), known, "model.encoders (AudioTransformer)")
        T, D = self.num_tokens, self.width
        if T < 1:
            raise UserError(
                f"AudioTransformer: num_samples={self.num_samples} is shorter than one token of hop · frames = "
                f"{self.hop * self.frames} samples"
            )
        out = {}
        if self.stem == "waveform":
            x = self._of_samples(waveform)
        else:
            out["log_mel"] = x = self._log_mel(waveform)
            if train:
                x = masked(self, x)
            x = self._of_frames(x[:, : T * self.frames].astype(jnp.dtype(self.dtype)))
        if self.positions == "learned":
            positions = self.param("positions", nn.initializers.normal(0.02), (T, D))
        else:
            positions = jnp.asarray(sinusoids(T, D))
        x = first = x + positions[None].astype(x.dtype)
        x, rest = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            key_bias=self.key_bias,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, train=train)
        return x, {**rest, **out, "input": first}

    def _log_mel(self, waveform):
        if waveform.shape[1:] == (self.num_samples // self.hop, self.n_mels):
            return waveform
        check_item(self, waveform)
        return log_mel(waveform, sample_rate=self.sample_rate, n_fft=self.n_fft, hop=self.hop, n_mels=self.n_mels)

    def _of_frames(self, x):
        if self.stem == "frames":
            return self._conv("frames", self.frames, self.frames)(x)
        x = nn.gelu(self._conv("frames_0", 3, 1)(x), approximate=False)
        return nn.gelu(self._conv("frames_1", 3, self.frames)(x), approximate=False)

    def _of_samples(self, waveform):
        check_item(self, waveform)
        x = waveform[:, : self.num_tokens * self.frames * self.hop].astype(jnp.float32)
        x = x - x.mean(axis=1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + 1e-7)
        x = x[:, :, None].astype(jnp.dtype(self.dtype))
        for i, stride in enumerate(conv_strides(self.frames * self.hop)):
            x = self._conv(f"samples_{i}", 2 * stride, stride)(x)
            norm = make_norm("layernorm", epsilon=1e-5, use_bias=True, dtype=self.dtype, name=f"samples_norm_{i}")
            x = nn.gelu(norm(x), approximate=False)
        return x

    def _conv(self, name, size, stride):
        """A convolution over time, which leaves one place of `stride`."""
        pad = max(size - stride, 0)
        pad = (pad - pad // 2, pad // 2)
        return nn.Conv(self.width, (size,), strides=(stride,), padding=(pad,), dtype=self.dtype, name=name)


def masked(encoder, spectrogram: jax.Array) -> jax.Array:
    """The spectrogram with the bands hidden that the encoder's fields say."""
    for field in ("mask_time", "mask_mel"):
        if not 0 <= getattr(encoder, field) <= 1:
            what = f"{type(encoder).__name__}: {field}={getattr(encoder, field)}"
            raise UserError(f"{what} must be a share, from 0 to 1")
    if not (encoder.mask_time or encoder.mask_mel):
        return spectrogram
    return mask_spectrogram(
        encoder.make_rng("dropout"),
        spectrogram,
        time=encoder.mask_time,
        mel=encoder.mask_mel,
        count=encoder.num_masks,
    )


class AST(nn.Module):
    """Audio Spectrogram Transformer (Gong et al. 2021): waveform float[B, S] in [-1, 1] -> (float[B, P, D], out).

    A ViT on the filter bank of the sound (`fbank`, Kaldi's; not Whisper's log-mel), with patches that overlap. The P
    features are the class token, the distillation token, and the patches, low frequencies first and each frequency's in
    the order of time: P = 2 + ((n_mels - patch_size) / stride[0] + 1) · ((num_frames - patch_size) / stride[1] + 1).

    Fields:
      num_samples: S; `item_shape` is (num_samples,), and another length raises `UserError`
      sample_rate, n_mels: of `fbank`
      num_frames: frames of the filter bank; missing ones are zero, too many are cut. None: those of the waveform
      mean, std: of the filter bank; the model sees (x - mean) / (2 std). The defaults are AudioSet's.
      patch_size; stride: from one patch to the next, along frequency and along time
      mask_time, mask_mel, num_masks: `mask_spectrogram` in training; 0: none
      activation, qkv_bias, norm_epsilon, dropout, remat: see `BlockFields`

    Instead of the waveform the call takes the filter bank float[B, num_frames, n_mels] as well, shifted and scaled
    already (the `input_values` of Hugging Face's feature extractor).
    out["fbank"]: float[B, num_frames, n_mels], shifted and scaled; out["pooled"] float[B, D]: the mean of the two
    tokens; out["input"] float[B, P, D] of the Transformer; out["layers"]. Silence gives finite features and gradients.
    """

    num_samples: int = 2000
    sample_rate: int = 8000
    n_mels: int = 32
    num_frames: int | None = None
    mean: float = -4.2677393
    std: float = 4.5689974
    patch_size: int = 8
    stride: tuple[int, int] = (6, 6)
    mask_time: float = 0.0
    mask_mel: float = 0.0
    num_masks: int = 2
    width: int = 32
    depth: int = 2
    num_heads: int = 2
    mlp_dim: int = 64
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    @property
    def item_shape(self) -> tuple[int]:
        return (self.num_samples,)

    @property
    def length(self) -> int:
        """Frames that the patches are cut from."""
        size, hop = fbank_sizes(self.sample_rate)
        if self.num_samples < size:
            raise UserError(f"AST: num_samples={self.num_samples} is shorter than a window of {size} samples")
        return self.num_frames or 1 + (self.num_samples - size) // hop

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along frequency and along time."""
        sides = (self.n_mels, self.length)
        if min(sides) < self.patch_size:
            raise UserError(f"AST: a patch of {self.patch_size} does not fit into {sides[0]} bins × {sides[1]} frames")
        return tuple((side - self.patch_size) // step + 1 for side, step in zip(sides, self.stride, strict=True))

    @property
    def num_tokens(self) -> int:
        return 2 + self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(self, waveform: jax.Array, *, train: bool):
        B, P, D = waveform.shape[0], self.num_tokens, self.width
        spectrogram = self._fbank(waveform)
        x = (masked(self, spectrogram) if train else spectrogram).swapaxes(1, 2)[..., None]
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(D, patch, strides=self.stride, padding="VALID", dtype=self.dtype, name="patch")(x)
        init, names = nn.initializers.normal(0.02), ("class_token", "distillation_token")
        first = (
            jnp.concatenate([self.param(name, init, (1, D)) for name in names])[None].repeat(B, axis=0).astype(x.dtype)
        )
        x = jnp.concatenate([first, x.reshape(B, P - 2, D)], axis=1)
        positions = self.param("positions", init, (P, D))
        x = first = x + positions[None].astype(x.dtype)
        x, out = Transformer(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            remat=self.remat,
            dtype=self.dtype,
            name="transformer",
        )(x, train=train)
        return x, {**out, "fbank": spectrogram, "input": first, "pooled": x[:, :2].mean(axis=1)}

    def _fbank(self, waveform):
        if waveform.shape[1:] == (self.length, self.n_mels):
            return waveform
        check_item(self, waveform)
        x = fbank(waveform, sample_rate=self.sample_rate, n_mels=self.n_mels)[:, : self.length]
        x = jnp.pad(x, ((0, 0), (0, self.length - x.shape[1]), (0, 0)))
        return (x - self.mean) / (2 * self.std)
