"""Vector quantisation of latents: one code, a sum of codes, or a pyramid of codes for each item."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vfm.errors import UserError, unknown

UPDATES = ("gradient", "ema")
INITS = ("uniform", "normal", "data")


class Codebook(nn.Module):
    """K codes of width W, and what keeps them in use.

    Fields:
      update: "gradient": the codes are a parameter (VQ-VAE, van den Oord et al. 2017, eq. 3); "ema": they are the
        averages of the latents that chose them (appendix A.1), with the given decay, and Laplace smoothing by epsilon;
        they stand in the collection `codebook`: n float32[K], sums and embedding float32[K, W]
      codebook_init: "uniform": within ±1 / K (the released VQ-VAE and VQGAN), which can leave most codes unused for
        good; "normal": N(0, 1); "data": latents of the first training batch take their places
      restart: a code that no latent of so many training steps in a row has chosen (micro-batches, with accumulation)
        becomes a random latent of the batch (as in Jukebox, Dhariwal et al. 2020, section 3.1); 0: never. The latents
        are those of all devices. `age` int32[K] in the collection `codebook` counts the steps; with "gradient",
        `offset` float32[K, W] there is what a code was moved by, and the code is parameter + offset
      normalize: latents and codes are scaled to length 1, so that the nearest code is that of the largest cosine
        (ViT-VQGAN, Yu et al. 2022, section 3.2)
    """

    size: int = 64
    width: int = 4
    update: str = "gradient"
    decay: float = 0.99
    epsilon: float = 1e-5
    codebook_init: str = "data"
    restart: int = 0
    normalize: bool = False

    def setup(self):
        if self.update not in UPDATES:
            raise unknown("update", self.update, UPDATES, "the codebook")
        if self.codebook_init not in INITS:
            raise unknown("codebook_init", self.codebook_init, INITS, "the codebook")
        if not 0 <= self.decay < 1 or self.restart < 0:
            raise UserError(
                f"codebook: decay={self.decay} must be from 0 to less than 1, and restart={self.restart} at least 0"
            )
        shape = (self.size, self.width)
        if self.update == "gradient":
            self.embedding = self.param("embedding", self._initial, shape)
        else:
            draw = lambda: self._initial(self.make_rng("params"), shape)
            self.average = self.variable("codebook", "embedding", draw)
            # As if every code had been chosen once already: with n = 0 the first averages would be far too large.
            self.count = self.variable("codebook", "n", jnp.ones, (self.size,), jnp.float32)
            self.sums = self.variable("codebook", "sums", lambda: self.average.value)
        if self.moves:
            start = -1 if self.codebook_init == "data" else 0  # a negative age: not in use yet
            self.age = self.variable("codebook", "age", jnp.full, (self.size,), start, jnp.int32)
            if self.update == "gradient":
                self.offset = self.variable("codebook", "offset", jnp.zeros, shape, jnp.float32)

    @property
    def moves(self) -> bool:
        """Whether codes are replaced by latents."""
        return self.restart > 0 or self.codebook_init == "data"

    def _initial(self, key, shape):
        if self.codebook_init == "normal":
            return jax.random.normal(key, shape, jnp.float32)
        return jax.random.uniform(key, shape, jnp.float32, -1 / self.size, 1 / self.size)

    def codes(self) -> jax.Array:
        """All codes, float32[K, W]."""
        if self.update == "ema":
            table = self.average.value
        else:
            table = self.embedding + self.offset.value if self.moves else self.embedding
        return self.scaled(table)

    def scaled(self, z: jax.Array) -> jax.Array:
        """Latents float[..., W] as they are compared with the codes: float32, of length 1 if `normalize`."""
        z = z.astype(jnp.float32)
        if not self.normalize:
            return z
        return z * jax.lax.rsqrt(jnp.maximum(jnp.square(z).sum(axis=-1, keepdims=True), 1e-12))

    def nearest(self, z: jax.Array) -> jax.Array:
        """Index of the code nearest to each latent (the first of several): float[..., W] -> int32[...]."""
        table = jax.lax.stop_gradient(self.codes())
        z = jax.lax.stop_gradient(self.scaled(z))
        # |z - e|² without |z|², which is the same for all codes, and without an array of all differences.
        product = jnp.einsum("...w,kw->...k", z, table, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.square(table).sum(axis=-1).reshape((1,) * (z.ndim - 1) + (-1,)) - 2 * product
        # argmin, which as a minimum of places is several times as fast on CPU.
        place = jnp.arange(self.size).reshape((1,) * (z.ndim - 1) + (-1,))
        smallest = distance == distance.min(axis=-1, keepdims=True)
        return jnp.where(smallest, place, self.size).min(axis=-1).astype(jnp.int32)

    def look_up(self, index: jax.Array) -> jax.Array:
        """int32[...] -> float32[..., W]; NaN for an index that is no code."""
        index = jnp.where(index < 0, self.size, index)  # a negative one would be counted from the end
        return self.codes().at[index].get(mode="fill", fill_value=jnp.nan)

    def learn(self, z: jax.Array, index: jax.Array) -> None:
        """One training step of all that has no gradient: latents float[..., W], the codes int32[...] that they chose.

        Does nothing where there is nothing to move. Draws come from the rng "noise".
        """
        if self.is_initializing() or not (self.moves or self.update == "ema"):
            return
        z = jax.lax.stop_gradient(self.scaled(z)).reshape(-1, self.width)
        index = index.reshape(-1)
        counts = jnp.zeros((self.size,), jnp.float32).at[index].add(1.0)
        if self.update == "ema":
            total = jnp.zeros((self.size, self.width), jnp.float32).at[index].add(z)
            n = self.decay * self.count.value + (1 - self.decay) * counts
            sums = self.decay * self.sums.value + (1 - self.decay) * total
            everything = n.sum()
            smooth = (n + self.epsilon) / (everything + self.size * self.epsilon) * everything
            self.count.value, self.sums.value, self.average.value = n, sums, sums / smooth[:, None]
        if self.moves:
            unused = jnp.where(counts > 0, 0, self.age.value + 1)
            dead = self.age.value < 0
            if self.restart:
                dead = dead | (unused >= self.restart)
            # One from each of K equal parts of the latents: random, all different, and nothing is sorted.
            place = jnp.arange(self.size) + jax.random.uniform(self.make_rng("noise"), (self.size,))
            rows = jnp.minimum(place * (len(z) / self.size), len(z) - 1).astype(jnp.int32)
            self._replace(dead, z[rows])
            self.age.value = jnp.where(dead, 0, unused)

    def _replace(self, dead: jax.Array, new: jax.Array) -> None:
        chosen = lambda there, value: jnp.where(dead.reshape((-1,) + (1,) * (value.ndim - 1)), there, value)
        if self.update == "gradient":
            moved = jax.lax.stop_gradient(new - self.embedding)
            self.offset.value = chosen(moved, self.offset.value)
        else:
            self.count.value = chosen(1.0, self.count.value)
            self.sums.value, self.average.value = chosen(new, self.sums.value), chosen(new, self.average.value)


def straight_through(z: jax.Array, quantized: jax.Array) -> jax.Array:
    """The value of `quantized` with the gradient of z (Bengio et al. 2013)."""
    return z + jax.lax.stop_gradient(quantized - z)


def use_of_codes(index: jax.Array, size: int) -> dict[str, jax.Array]:
    """perplexity: exp of the entropy of how often each code is chosen; usage: share of codes that are, float32[]."""
    counts = jnp.zeros((size,), jnp.float32).at[index.reshape(-1)].add(1.0)
    share = counts / index.size
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0))
    return {"perplexity": jnp.exp(entropy), "usage": (counts > 0).mean()}


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared difference of each item, float[B, P, W] twice -> float32[B]."""
    return jnp.square(a - b).mean(axis=(1, 2))


class Quantizer(nn.Module):
    """What the quantisers share; each is called as quantizer(z float[B, P, W], grid=, train=) -> (features, out).

    Fields: `codebook_size` K, `width` W, and those of `Codebook`. features: float[B, P, W], the quantised latents, with
    the gradient of the latents. out:
      codes int32[B, …]; latents float32[B, P, W], before; quantized float32[B, P, W], with the gradient of the codes
      codebook_error float32[B], mean |sg(z) - e|² (left out where nothing learns from it); commitment_error, mean
        |z - sg(e)|²: over all sums of codes from coarse to fine, where there are several
      perplexity, usage float32[]: see `use_of_codes`; of this batch
      rate float32[B]: nats of an item's codes if all codes are as likely: KL(q(z|x) || uniform prior)
    `grid`: rows and columns of the P latents, for the quantiser that needs them.
    """

    codebook_size: int = 64
    width: int = 4
    update: str = "gradient"
    decay: float = 0.99
    codebook_init: str = "data"
    restart: int = 0
    normalize: bool = False
    dtype: str = "float32"

    per_latent = 1  # numbers that an encoder gives for one number of a latent

    def make_codebook(self) -> Codebook:
        fields = {name: getattr(self, name) for name in ("update", "decay", "codebook_init", "restart", "normalize")}
        return Codebook(self.codebook_size, self.width, **fields)

    def check(self, z: jax.Array, grid: tuple[int, int] | None) -> None:
        if z.shape[-1] != self.width:
            raise UserError(f"{type(self).__name__} has codes of width {self.width}, not {z.shape[-1]}")

    def __call__(self, z: jax.Array, *, grid: tuple[int, int] | None = None, train: bool):
        self.check(z, grid)
        latents, codes, sums = self.quantize(z, train=train)
        fixed = jax.lax.stop_gradient
        mean = lambda errors: sum(errors) / len(sums)
        out = {
            "codes": codes,
            "latents": latents,
            "quantized": sums[-1],
            "commitment_error": mean(squared_distance(latents, fixed(total)) for total in sums),
            **self.use(codes),
            "rate": jnp.full(len(z), codes[0].size * math.log(self.codebook_size), jnp.float32),
        }
        if self.learns:
            out["codebook_error"] = mean(squared_distance(fixed(latents), total) for total in sums)
        return straight_through(latents, sums[-1]).astype(self.dtype), out

    def use(self, codes: jax.Array) -> dict[str, jax.Array]:
        """See `use_of_codes`; the mean over the codebooks, where there are several."""
        return use_of_codes(codes, self.codebook_size)

    @property
    def learns(self) -> bool:
        """Whether there are parameters that learn from the codebook's error."""
        return self.update == "gradient"


class VectorQuantizer(Quantizer):
    """Each latent becomes the nearest code (van den Oord et al. 2017, eq. 1). codes: int32[B, P]. See `Quantizer`."""

    def setup(self):
        self.codebook = self.make_codebook()

    def quantize(self, z: jax.Array, *, train: bool):
        latents = self.codebook.scaled(z)
        codes = self.codebook.nearest(latents)
        quantized = self.codebook.look_up(codes)
        if train:
            self.codebook.learn(latents, codes)
        return latents, codes, [quantized]

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes int32[B, P] -> float32[B, P, W]."""
        return self.codebook.look_up(codes)


class ResidualQuantizer(Quantizer):
    """Each latent becomes a sum of codes, each the nearest to what those before it leave. See `Quantizer`.

    levels: codes of a latent, each from a codebook of its own (SoundStream, Zeghidour et al. 2021, algorithm 1); codes:
    int32[B, P, levels]. Errors are those of all partial sums (RQ-VAE, Lee et al. 2022, eq. 5).
    """

    levels: int = 2

    def setup(self):
        if self.normalize:
            raise UserError("residual_vq: normalize is for codes that are not added up; leave it out")
        self.codebooks = [self.make_codebook() for _ in range(self.levels)]

    def quantize(self, z: jax.Array, *, train: bool):
        z = z.astype(jnp.float32)
        rest, codes, sums = jax.lax.stop_gradient(z), [], []
        for codebook in self.codebooks:
            index = codebook.nearest(rest)
            chosen = codebook.look_up(index)
            if train:
                codebook.learn(rest, index)
            codes.append(index)
            sums.append(sums[-1] + chosen if sums else chosen)
            rest = rest - jax.lax.stop_gradient(chosen)
        return z, jnp.stack(codes, axis=-1), sums

    def use(self, codes: jax.Array) -> dict[str, jax.Array]:
        levels = [use_of_codes(codes[..., level], self.codebook_size) for level in range(self.levels)]
        return jax.tree.map(lambda *values: sum(values) / self.levels, *levels)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes int32[B, P, levels] -> float32[B, P, W]."""
        return sum(codebook.look_up(codes[..., level]) for level, codebook in enumerate(self.codebooks))


class MultiscaleQuantizer(Quantizer):
    """A grid of latents becomes a pyramid of codes (VAR, Tian et al. 2024, algorithms 1 and 2). See `Quantizer`.

    At every scale, coarse to fine, what is left of the latents is averaged down to it, each place becomes the nearest
    code of one codebook for all scales, and the codes, enlarged to the whole grid (bicubic) and mixed with their 3×3
    convolution φ, are taken off.

    Fields:
      scales: of each scale its side, or (rows, columns); the last is the grid of the latents
      mixing: r: φ(h) = (1 - r) h + r conv(h)
      convolutions: how many φ share the scales among them; 0: one for each

    codes: int32[B, L], all scales one after the other, rows first; L = sum of `lengths`.
    """

    scales: tuple[int | tuple[int, int], ...] = (1, 2)
    mixing: float = 0.5
    convolutions: int = 4

    def setup(self):
        if self.normalize:
            raise UserError("multiscale_vq: normalize is for codes that are not added up; leave it out")
        rows, columns = self.sizes[-1]
        if any(r > rows or c > columns for r, c in self.sizes):
            raise UserError(f"multiscale_vq: scales={self.scales}: the last must be the largest")
        self.codebook = self.make_codebook()
        self.conv_phi = [
            nn.Conv(self.width, (3, 3), padding=((1, 1), (1, 1)), dtype=jnp.float32) for _ in range(self._count())
        ]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each scale."""
        return tuple((s, s) if isinstance(s, int) else tuple(s) for s in self.scales)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Codes of each scale."""
        return tuple(rows * columns for rows, columns in self.sizes)

    @property
    def learns(self) -> bool:
        return True  # φ does, whatever the codes

    def check(self, z: jax.Array, grid: tuple[int, int] | None) -> None:
        super().check(z, grid)
        if z.shape[1] != self.lengths[-1] or (grid is not None and tuple(grid) != self.sizes[-1]):
            raise UserError(
                f"multiscale_vq: the last of scales={self.scales} must be the grid of the latents, "
                f"{tuple(grid) if grid else f'of {z.shape[1]} places'}"
            )

    def split(self, codes: jax.Array) -> list[jax.Array]:
        """Codes int32[B, L] of all scales -> int32[B, P_s] of each."""
        if codes.shape[1] != sum(self.lengths):
            raise UserError(f"multiscale_vq: scales={self.scales} have {sum(self.lengths)} codes, not {codes.shape[1]}")
        return jnp.split(codes, np.cumsum(self.lengths)[:-1], axis=1)

    def grow(self, scale: int, codes: jax.Array) -> jax.Array:
        """What the codes int32[B, P_s] of one scale add to the latents: float32[B, rows, columns, W]."""
        (rows, columns), whole = self.sizes[scale], self.sizes[-1]
        x = self.codebook.look_up(codes).reshape(-1, rows, columns, self.width)
        x = _resize(x, bicubic(rows, whole[0]), bicubic(columns, whole[1]))
        return (1 - self.mixing) * x + self.mixing * self.conv_phi[self.which_phi()[scale]](x)

    def shrink(self, scale: int, x: jax.Array) -> jax.Array:
        """float[B, rows, columns, W] averaged down to a scale: float[B, P_s, W]."""
        whole, (rows, columns) = self.sizes[-1], self.sizes[scale]
        return _resize(x, area(whole[0], rows), area(whole[1], columns)).reshape(len(x), -1, self.width)

    def quantize(self, z: jax.Array, *, train: bool):
        z = z.astype(jnp.float32)
        latents = z.reshape(len(z), *self.sizes[-1], self.width)
        rest, total = jax.lax.stop_gradient(latents), jnp.zeros_like(latents)
        codes, sums, chosen = [], [], []
        for scale in range(len(self.sizes)):
            small = self.shrink(scale, rest)
            index = self.codebook.nearest(small)
            added = self.grow(scale, index)
            total, rest = total + added, rest - jax.lax.stop_gradient(added)
            codes.append(index)
            chosen.append(small)
            sums.append(total.reshape(z.shape))
        codes = jnp.concatenate(codes, axis=1)
        if train:
            self.codebook.learn(jnp.concatenate(chosen, axis=1), codes)
        return z, codes, sums

    def encode(self, z: jax.Array) -> jax.Array:
        """Latents float[B, P, W] -> codes int32[B, L] of all scales."""
        self.check(z, None)
        return self.quantize(z, train=False)[1]

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes int32[B, L] -> quantised latents float32[B, P, W]."""
        total = sum(self.grow(scale, index) for scale, index in enumerate(self.split(codes)))
        return total.reshape(len(codes), -1, self.width)

    def inputs(self, codes: jax.Array) -> jax.Array:
        """What a model of the scales reads when it predicts scales 2, 3, …: float32[B, L - P_1, W].

        For each scale the sum of all coarser ones, averaged down to it. codes: int32[B, L]; the last scale's, or those
        of any scale whose input is all that is wanted, do not matter.
        """
        parts = self.split(codes)
        total, found = 0.0, []
        for scale in range(len(parts) - 1):
            total = total + self.grow(scale, parts[scale])
            found.append(self.shrink(scale + 1, total))
        if not found:
            return jnp.zeros((len(codes), 0, self.width), jnp.float32)
        return jnp.concatenate(found, axis=1)

    def which_phi(self) -> tuple[int, ...]:
        """The number of each scale's φ: the one whose share of [0, 1] is nearest to the scale's place in it."""
        count, scales = self._count(), len(self.sizes)
        edge = 1 / (3 if count == 4 else 2) / count  # the released model's two conventions
        ticks = np.linspace(edge, 1 - edge, count)
        return tuple(int(np.argmin(np.abs(ticks - s / max(scales - 1, 1)))) for s in range(scales))

    def _count(self) -> int:
        return min(self.convolutions or len(self.sizes), len(self.sizes))


def _resize(x: jax.Array, of_rows: np.ndarray, of_columns: np.ndarray) -> jax.Array:
    return jnp.einsum("ih,bhwc,jw->bijc", of_rows, x, of_columns, precision=jax.lax.Precision.HIGHEST)


def area(size: int, new: int) -> np.ndarray:
    """Matrix float32[new, size] that averages `size` numbers down to `new`; parts that do not divide overlap."""
    matrix = np.zeros((new, size), np.float32)
    for i in range(new):
        first, end = i * size // new, -(-(i + 1) * size // new)
        matrix[i, first:end] = 1 / (end - first)
    return matrix


def bicubic(size: int, new: int) -> np.ndarray:
    """Matrix float32[new, size] of cubic convolution (Keys 1981, a = -0.75) between the middles of the places.

    Beyond the ends the last number goes on.
    """
    a, matrix = -0.75, np.zeros((new, size))
    for i in range(new):
        at = (i + 0.5) * size / new - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            x = abs(at - tap)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[i, min(max(tap, 0), size - 1)] += weight
    return matrix.astype(np.float32)
