"""Training of autoencoders: likelihoods of the items, bounds, and what keeps a codebook in use."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vfm import metrics
from vfm.data.items import check_range
from vfm.errors import UserError, unknown
from vfm.layers.bottleneck import draw
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.next_token import MUTABLE, apply, rngs
from vfm.wiring import autoencoded

LIKELIHOODS = ("mse", "l1", "gaussian", "logistic", "bernoulli")
DISCRETE = ("logistic", "bernoulli")  # probabilities, not densities: their nats are bits of a code
NATS = ("gaussian", *DISCRETE)


def negative_log_likelihood(
    likelihood: str, items: jax.Array, y: jax.Array, *, log_scale: jax.Array | float = 0.0, levels: int = 256
) -> jax.Array:
    """-log p(item | what the decoder gives), float32[B] of items float[B, ...], in nats, summed over the item:

      gaussian   density of N(y, σ²), log_scale = log σ
      logistic   probability of the level, of `levels` from 0 to 1, under a logistic distribution at y with scale
                 exp(log_scale), whose outermost levels reach to infinity (Kingma et al. 2016, section 5.2.2)
      bernoulli  of probability sigmoid(y)

    or without a model of noise, mean over the item: mse, squared error; l1, absolute error.
    """
    x, y = items.astype(jnp.float32), y.astype(jnp.float32)
    axes = tuple(range(1, x.ndim))
    if likelihood == "mse":
        return jnp.square(x - y).mean(axis=axes)
    if likelihood == "l1":
        return jnp.abs(x - y).mean(axis=axes)
    if likelihood == "gaussian":
        log_scale = jnp.asarray(log_scale, jnp.float32)
        return (0.5 * jnp.square((x - y) * jnp.exp(-log_scale)) + log_scale + 0.5 * math.log(2 * math.pi)).sum(
            axis=axes
        )
    if likelihood == "bernoulli":
        return (jax.nn.softplus(y) - x * y).sum(axis=axes)
    half, inverse = 0.5 / (levels - 1), jnp.exp(-jnp.asarray(log_scale, jnp.float32))
    above, below = (x + half - y) * inverse, (x - half - y) * inverse
    # sigmoid(a) - sigmoid(b) = sigmoid(a) · sigmoid(-b) · (1 - exp(b - a)), which loses no digits far out.
    log_p = jnp.where(x > half, jax.nn.log_sigmoid(-below), 0.0) + jnp.where(
        x < 1 - half, jax.nn.log_sigmoid(above), 0.0
    )
    log_p = log_p + jnp.where((x > half) & (x < 1 - half), jnp.log(-jnp.expm1(-2 * half * inverse)), 0.0)
    return -log_p.sum(axis=axes)


def importance_bound(log_weights: jax.Array) -> jax.Array:
    """log of the mean of k importance weights float[k, B], float[B] (IWAE, Burda et al. 2016, eq. 8)."""
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(len(log_weights))


def reconstruction(
    model,
    *,
    likelihood: str = "mse",
    sigma: float = 1.0,
    levels: int = 256,
    beta: float = 1.0,
    warmup: int = 0,
    codebook: float = 1.0,
    commitment: float = 0.25,
    samples: int = 1,
    eval_samples: int = 1,
) -> LossFn:
    """Autoencoders of every modality X that has both halves: plain, VAE or VQ-VAE by the bottleneck of the encoder.

    Terms, means over the items:
      reconstruction_X  -log p(item | latents), or an error: see `negative_log_likelihood` and the fields below
      kl_X              beta · KL(q(z|x) || N(0, 1)) in nats of the whole item, of a Gaussian bottleneck (Kingma &
                        Welling 2014, eq. 10; beta: Higgins et al. 2017). With a likelihood in nats beta = 1 makes the
                        ELBO; with the errors, which are means, it must be much smaller (1e-6 in latent diffusion)
      codebook_X, commitment_X   codebook · |sg(z) - e|² and commitment · |z - sg(e)|² of codes (van den Oord et al.
                        2017, eq. 3): means over the latents with the errors, sums over an item's with the others. With
                        averages (update="ema") there is no first one
      importance_weighted_X      in training with samples > 1, in place of the first two: minus the bound of so many
                        samples (Burda et al. 2016). In evaluation the loss is always that of one

    Fields:
      likelihood: "mse", "l1"; "gaussian" of standard deviation `sigma`, "logistic" of scale `sigma`, of items with
        `levels` levels, or both of a learned one (decoders.X.learned_scale); "bernoulli" of items in [0, 1], for which
        decoders.X.output must be "sigmoid"
      warmup: over so many calls in training beta rises to its value from 0 (Sønderby et al. 2016): steps, times
        train.accumulate. The collection "reconstruction" counts them
      samples: draws of the posterior for each item in training. eval_samples: in evaluation; more than one: the bound
        is measured as well

    Metrics: mse_X; elbo_X in nats, bits_per_dim_X of "bernoulli" and "logistic": the bound (of the codes at the cost of
    a uniform prior) over the numbers of the item; iwae_X; perplexity_X and code_usage_X, of the batch. In evaluation
    latents are drawn for the terms and bounds as in training, and mse_X is that of the posterior mean.
    `loss_fn.forward(params, variables, batch, rng, train=)` gives (terms, aux, out of the model).
    """
    where, names = "config.objective: reconstruction", autoencoded(model)
    if not names:
        raise UserError(f"{where} needs a modality with an encoder and a decoder, the halves of an autoencoder")
    if likelihood not in LIKELIHOODS:
        raise unknown("likelihood", likelihood, LIKELIHOODS, where)
    if sigma <= 0 or levels < 2 or min(samples, eval_samples) < 1 or min(beta, warmup, codebook, commitment) < 0:
        raise UserError(
            f"{where}: sigma={sigma} must be more than 0, levels={levels} at least 2, samples={samples} and "
            f"eval_samples={eval_samples} at least 1, beta={beta}, warmup={warmup}, codebook={codebook} and "
            f"commitment={commitment} at least 0"
        )
    if samples > 1 and (likelihood not in NATS or beta != 1 or warmup):
        raise UserError(
            f"{where}: samples={samples} is for a bound of log p(x): it needs a likelihood in nats "
            f"({', '.join(NATS)}), beta=1 and warmup=0"
        )
    for name in names:
        _check_decoder(model.decoders[name], f"decoders.{name}", likelihood, where)

    def error(name, items, y, found):
        """float32[B] of what a decoder gave: items y and its dict."""
        scale = found.get("log_scale", math.log(sigma))
        y = found["logits"] if likelihood == "bernoulli" else y
        return negative_log_likelihood(likelihood, items, y, log_scale=scale, levels=levels)

    def decode(params, variables, name, z, rng, train):
        mutable = [kind for kind in MUTABLE if train and kind in variables]
        (y, found), changed = model.apply(
            {"params": params, **variables}, z, method=lambda m, z: m.decoders[name](z, train=train),
            rngs=rngs(rng), mutable=mutable,
        )  # fmt: skip
        return y, found, {**variables, **changed}

    def sampled(params, variables, name, items, encoded, count, rng, train):
        """(errors float32[k, B], log importance weights float32[k, B], variables) of k draws of the posterior."""
        mean, logvar = encoded["mean"], encoded["logvar"]
        factor = getattr(model.encoders[name], "scaling_factor", 1.0)

        def features(key):
            z = draw(key, mean, logvar)
            normal = (z - mean) * jnp.exp(-0.5 * logvar)
            return z * factor, 0.5 * (jnp.square(normal) + logvar - jnp.square(z)).sum(axis=(1, 2))

        keys = jax.random.split(rng, count)
        if not train:  # one after the other: many draws need no more memory

            def one(key):
                z, ratio = features(key)
                nll = error(name, items, *decode(params, variables, name, z, key, False)[:2])
                return nll, ratio - nll

            return *jax.lax.map(one, keys), variables
        z, ratio = jax.vmap(features)(keys)
        y, found, variables = decode(params, variables, name, z.reshape(-1, *z.shape[2:]), rng, True)
        nll = error(name, jnp.tile(items, (count, *[1] * (items.ndim - 1))), y, found).reshape(count, -1)
        return nll, ratio - nll, variables

    def forward(params, variables, batch, rng, *, train: bool):
        own = variables["reconstruction"] if warmup else None
        model_variables = {name: leaf for name, leaf in variables.items() if name != "reconstruction"}
        _, out, new = apply(model, params, model_variables, batch, rng, train=train)
        terms: dict[str, Term] = {}
        measured: dict[str, metrics.Metric] = {}
        risen = jnp.minimum(own["calls"] / warmup, 1.0) if own and train else 1.0
        for number, name in enumerate(names):
            if name not in batch.get("inputs", {}):
                raise UserError(f"{where} needs items of {name} in its batches")
            lead = batch["inputs"][name].shape[:2]
            items = batch["inputs"][name].reshape(-1, *batch["inputs"][name].shape[2:])
            real = batch["example_mask"] if "example_mask" in batch else jnp.ones(lead[:1])
            mean = functools.partial(metrics.mean, mask=real.repeat(lead[1]))
            encoded, decoded = out[name]["encoder"], out[name].get("decoder", {})
            y = out[name]["reconstructed"].reshape(items.shape)
            count, key = samples if train else eval_samples, jax.random.fold_in(rng, 2 + number)
            log_weights = None
            if "logvar" in encoded and (count > 1 or not train):
                found = sampled(params, new, name, items, encoded, count, key, train)
                nll, log_weights, new = found[0].mean(axis=0), found[1], found[2]
            else:
                nll = error(name, items, y, decoded)
            if samples > 1 and train and log_weights is not None:
                terms[f"importance_weighted_{name}"] = (1.0, *mean(-importance_bound(log_weights)))
            else:
                terms[f"reconstruction_{name}"] = (1.0, *mean(nll))
                if "logvar" in encoded:
                    terms[f"kl_{name}"] = (beta * risen, *mean(encoded["rate"]))
            if "commitment_error" in encoded:
                size = np.prod(encoded["latents"].shape[1:]) if likelihood in NATS else 1
                terms[f"commitment_{name}"] = (commitment, *mean(size * encoded["commitment_error"]))
                if "codebook_error" in encoded:
                    terms[f"codebook_{name}"] = (codebook, *mean(size * encoded["codebook_error"]))
                measured[f"perplexity_{name}"] = (encoded["perplexity"], jnp.ones(()))
                measured[f"code_usage_{name}"] = (encoded["usage"], jnp.ones(()))
            measured[f"mse_{name}"] = mean(negative_log_likelihood("mse", items, y))
            if likelihood in NATS and "rate" in encoded:
                measured[f"elbo_{name}"] = mean(-nll - encoded["rate"])
                if log_weights is not None and count > 1:
                    measured[f"iwae_{name}"] = mean(importance_bound(log_weights))
                if likelihood in DISCRETE:
                    measured[f"bits_per_dim_{name}"] = mean((nll + encoded["rate"]) / (items[0].size * math.log(2)))
        if own:
            new = {**new, "reconstruction": {"calls": own["calls"] + train}}
        return terms, Aux(jax.lax.stop_gradient(measured), new), out

    def loss_fn(params, variables, batch, rng, *, train: bool):
        return forward(params, variables, batch, rng, train=train)[:2]

    def check_row(row: Mapping, what: str) -> None:
        """Refuses a row of the data whose items the likelihood has no place for."""
        for name in names:
            if likelihood in DISCRETE and name in row["inputs"]:
                check_range(f"{where}: likelihood={likelihood!r}: {name} of {what}", row["inputs"][name], (0.0, 1.0))

    loss_fn.forward, loss_fn.check_row = forward, check_row
    if warmup:
        loss_fn.variables = lambda params: {"reconstruction": {"calls": jnp.zeros((), jnp.int32)}}
    return loss_fn


def _check_decoder(decoder, path: str, likelihood: str, where: str) -> None:
    """Refuses a decoder that does not give what a likelihood needs."""
    kind = f"{path} ({type(decoder).__name__})"
    if likelihood == "bernoulli" and getattr(decoder, "output", None) != "sigmoid":
        raise UserError(f"{where}: likelihood='bernoulli' needs logits; set model.{kind}.output='sigmoid'")
    if getattr(decoder, "learned_scale", False) and likelihood not in ("gaussian", "logistic"):
        raise UserError(
            f"{where}: likelihood={likelihood!r} has no scale, but model.{kind}.learned_scale learns one; take "
            "'gaussian' or 'logistic', or leave the field out"
        )
