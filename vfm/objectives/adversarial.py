"""Adversarial and perceptual training of autoencoders (VQGAN), in the one loop and with the one optimizer."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vfm import metrics, tree
from vfm.data.construct import construct, plain
from vfm.errors import UserError, unknown
from vfm.objectives import Aux, LossFn, Term
from vfm.objectives.next_token import MUTABLE
from vfm.objectives.perceptual import Perceptual
from vfm.objectives.reconstruction import reconstruction as reconstruction_objective
from vfm.wiring import autoencoded

# Name -> (loss of the discriminator for logits of real and of generated items, loss of the generator), each per logit.
LOSSES = {
    # Lim & Ye 2017, eq. 8 to 10
    "hinge": (lambda real, fake: 0.5 * (jax.nn.relu(1 - real) + jax.nn.relu(1 + fake)), lambda fake: -fake),
    # Goodfellow et al. 2014, eq. 1: the game of minimum and maximum
    "vanilla": (
        lambda real, fake: 0.5 * (jax.nn.softplus(-real) + jax.nn.softplus(fake)),
        lambda fake: -jax.nn.softplus(fake),
    ),
    # The same with the generator's loss of their section 3, whose gradient does not vanish where it is far behind
    "non_saturating": (
        lambda real, fake: 0.5 * (jax.nn.softplus(-real) + jax.nn.softplus(fake)),
        lambda fake: jax.nn.softplus(-fake),
    ),
}
DECAY = 0.9  # of the running mean of the reconstruction error: about the last 10 steps
SETTLED = 50  # steps before the running mean is one that later ones are compared with
FIRST = {"mean": 0.0, "lowest": 0.0, "share": 1.0, "weight": 1.0}  # of the state of a modality
RELEASE = 1000  # steps in which a weight that was 0 comes back


def adaptive_weight(of_reconstruction: jax.Array, of_generator: jax.Array) -> jax.Array:
    """‖gradient of the reconstruction‖ / (‖gradient of the generator's loss‖ + 1e-4), at most 1e4 (Esser et al. 2021,
    eq. 7); both with respect to the last layer of the decoder."""
    norm = lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum())
    return jnp.clip(norm(of_reconstruction) / (norm(of_generator) + 1e-4), 0.0, 1e4)


def routed(value: jax.Array, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """`value`, whose gradient with respect to x is `gradient`, and which has none with respect to anything else."""
    stop = jax.lax.stop_gradient
    return stop(value) + (stop(gradient) * (x - stop(x))).sum()


def guarded(state: Mapping[str, jax.Array], step: jax.Array, error: jax.Array, guard: float) -> dict[str, jax.Array]:
    """The new state {mean, lowest, share} of the brake, all float32[], for the reconstruction error of this step.

    mean: the running mean of the error. lowest: the lowest that it was, from step `SETTLED` on. share: what is left of
    the adversarial weight: 1 up to a mean of guard · lowest, and from there on a straight line to 0 at twice that. It
    falls at once, and rises by 1 / `RELEASE` in a step, or the discriminator would strike again and again. guard = 0:
    it is always 1.
    """
    mean = DECAY * state["mean"] + (1 - DECAY) * error
    now = mean / (1 - DECAY ** (step + 1.0))  # the mean began at 0
    lowest = jnp.where(step < SETTLED, now, jnp.minimum(state["lowest"], now))
    share = jnp.ones(())
    if guard:
        allowed = jnp.clip(2.0 - now / jnp.maximum(guard * lowest, 1e-12), 0.0, 1.0)
        share = jnp.minimum(allowed, state["share"] + 1.0 / RELEASE)
    return {"mean": mean, "lowest": lowest, "share": share}


def adversarial(
    model,
    *,
    loss: str = "hinge",
    weight: float = 1.0,
    adaptive: bool = True,
    start: int = 0,
    lead: int = 0,
    r1: float = 0.0,
    guard: float = 1.5,
    perceptual_weight: float = 1.0,
    perceptual: Mapping[str, Any] | None = None,
    reconstruction: Mapping[str, Any] | None = None,
) -> LossFn:
    """Reconstruction that a discriminator cannot tell from the real items (VQGAN, Esser et al. 2021, eq. 6 and 7).

    For every modality X with `model.discriminators.X`, an encoder and a decoder; all terms of the objective
    `reconstruction` and

      perceptual_X  perceptual_weight times the distance in the feature maps of a network; `perceptual` says of which
                    (see `vfm.objectives.perceptual`); without one there is no such term
      g_loss_X      weight · λ · the generator's loss, the mean over the logits; gradient for all but the discriminator
      d_loss_X      the discriminator's loss, the mean over the logits; gradient for the discriminator alone
      r1_X          r1 / 2 · the squared gradient of the mean logit at real items (Mescheder et al. 2018, eq. 9)

    One step of one optimizer on the sum gives both exactly the gradients of their own losses. It is simultaneous, not
    alternating, descent. A clip_norm of the optimizer is of both gradients together.

    loss: one of LOSSES. adaptive: λ is `adaptive_weight` at the kernel of the decoder's last layer, which its class
    declares as `last_layer`; else 1. The reconstruction's gradient there is that of all terms, the perceptual one too.
    start: steps of training before the generator has the loss. lead: the discriminator begins so many steps before the
    generator has it: one that begins at the same time sends the generator, whose items it judges at random, anywhere.
    guard: the automatic brake against a discriminator that ruins the reconstruction. When the running mean of the
    squared error rises beyond `guard` times the lowest that it was, the weight falls, and is 0 at twice that. It comes
    back slowly as the error falls: see `guarded`. 0: no brake.
    reconstruction: the fields of the objective `reconstruction`.

    Metrics: the terms, without weights; adaptive_weight_X; guard_X, the share of the weight that the guard leaves (less
    than 1: the discriminator is too strong; lower its learning rate or weight, or raise start); logits_real_X and
    logits_fake_X, means. In evaluation λ is that of the last step of training. Steps, λ and errors are kept in the
    collection "adversarial", and the perceptual network in "perceptual": it is frozen, and in the checkpoints.
    """
    where = "config.objective: adversarial"
    names = tuple(sorted(model.discriminators))
    if not names:
        raise UserError(f"{where} needs model.discriminators, such as {{'image': {{'name': 'patchgan'}}}}")
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES, where)
    for field, value in {"weight": weight, "r1": r1, "guard": guard, "perceptual_weight": perceptual_weight}.items():
        if not value >= 0:
            raise UserError(f"{where}: {field}={value} must be at least 0")
    if not 0 <= lead <= start:
        raise UserError(f"{where}: lead={lead} must be from 0 to start={start}")
    if guard and guard < 1:
        raise UserError(f"{where}: guard={guard} must be at least 1, a factor of the error (or 0: none)")
    for name in names:
        if name not in autoencoded(model):
            raise UserError(f"{where}: discriminators.{name} needs encoders.{name} and decoders.{name}, an autoencoder")
    tails = {name: _last_layer(model.decoders[name], name, where) for name in names} if adaptive else {}
    of_discriminator, of_generator = LOSSES[loss]
    table = {"reconstruction": reconstruction_objective}
    plain_loss = construct("objective", table, {**plain(reconstruction or {}), "name": "reconstruction"}, model=model)
    networks = {
        name: Perceptual(plain(perceptual), name, tuple(model.decoders[name].item_shape), f"{where}: perceptual")
        for name in names
        if perceptual and perceptual_weight
    }

    def judge(params, variables, name, items, train):
        """(logits of the discriminator float32[B, N, …], variables as the call leaves them)."""
        mutable = [kind for kind in MUTABLE if train and kind in variables]
        (logits, _), changed = model.apply(
            {"params": params, **variables}, name, items, train=train, method="discriminate", mutable=mutable
        )
        logits = logits.astype(jnp.float32)
        return logits.reshape(*items.shape[:2], *logits.shape[1:]), {**variables, **changed}

    def loss_fn(params, variables, batch, rng, *, train: bool):
        stop, one = jax.lax.stop_gradient, jnp.ones(())
        leaves, state = tree.flatten(params), variables["adversarial"]
        begun, leading = ((state["step"] >= step).astype(jnp.float32) for step in (start, start - lead))

        def forward(kernels):
            """The loss of the reconstruction and the items, by the kernels of the last layers."""
            own = tree.unflatten({**leaves, **kernels})
            terms, aux, out = plain_loss.forward(own, variables, batch, rng, train=train)
            total = sum(w * value / jnp.maximum(n, 1e-6) for w, value, n in terms.values())
            return (total, {name: out[name]["reconstructed"] for name in names}), (terms, aux)

        # The gradients at the last layers need no second pass through the layers before them.
        (total, fakes), pull, (terms, aux) = jax.vjp(
            forward, {path: leaves[path] for path in tails.values()}, has_aux=True
        )

        def of_modality(name, new):
            """(terms, metrics, state, variables) of a modality, for the variables as the call before left them."""
            fake, real = fakes[name], batch["inputs"][name]
            rows = batch["example_mask"] if "example_mask" in batch else jnp.ones(real.shape[:1])
            mask = jnp.broadcast_to(rows[:, None], real.shape[:2]).astype(jnp.float32)
            by_item = lambda x: x.reshape(*mask.shape, -1).mean(axis=-1)
            mean = lambda x: metrics.mean(by_item(x), mask)
            found: dict[str, Term] = {}

            # What moves the decoder: the gradients of both losses end at the items, and `routed` takes them on.
            at_items = jnp.zeros_like(fake)
            if name in networks:
                flat = lambda x: x.reshape(-1, *x.shape[2:])
                far = lambda x: mean(networks[name](variables["perceptual"][name], flat(x), flat(real)))
                value, count, gradient = _value_and_gradient(far, stop(fake))
                found["perceptual"] = (perceptual_weight, routed(value, fake, gradient), count)
                at_items = perceptual_weight * gradient / jnp.maximum(count, 1e-6)
            fooled = lambda x: mean(of_generator(judge(stop(params), variables, name, x, train)[0]))
            value, count, gradient = _value_and_gradient(fooled, stop(fake))
            factor = state[name]["weight"]
            if name in tails and train:
                none = jax.tree.map(jnp.zeros_like, fakes)
                at_kernel = lambda of_total, of_items: stop(pull((of_total, {**none, name: of_items}))[0][tails[name]])
                factor = adaptive_weight(
                    at_kernel(jnp.ones_like(total), at_items),
                    at_kernel(jnp.zeros_like(total), gradient / jnp.maximum(count, 1e-6)),
                )
            error, n = mean(jnp.square(stop(fake) - real))
            after = guarded(state[name], state["step"], error / jnp.maximum(n, 1e-6), guard) if train else state[name]
            found["g_loss"] = (begun * weight * factor * after["share"], routed(value, fake, gradient), count)

            # What moves the discriminator: the items are given.
            of_real, new = judge(params, new, name, real, train)
            of_fake, new = judge(params, new, name, stop(fake), train)
            found["d_loss"] = (leading, *mean(of_discriminator(of_real, of_fake)))
            if r1:
                slope = jax.grad(lambda x: by_item(judge(params, variables, name, x, train)[0]).sum())(real)
                found["r1"] = (
                    leading * r1 / 2,
                    *metrics.mean(jnp.square(slope).reshape(*mask.shape, -1).sum(axis=-1), mask),
                )
            shown = {"adaptive_weight": (factor, one), "guard": (after["share"], one)}
            shown |= {"logits_real": mean(of_real), "logits_fake": mean(of_fake)}
            return found, stop(shown), stop({**after, "weight": factor}), new

        terms, measured, new = dict(terms), dict(aux.metrics), aux.variables
        kept = {"step": state["step"] + train}
        for name in names:
            found, shown, kept[name], new = of_modality(name, new)
            terms |= {f"{term}_{name}": value for term, value in found.items()}
            measured |= {f"{metric}_{name}": value for metric, value in shown.items()}
        return terms, Aux(measured, {**new, "adversarial": kept})

    def variables(params):
        """What the loss function keeps beside the model's variables, at the start."""
        first = lambda: {kind: jnp.full((), value) for kind, value in FIRST.items()}
        own = dict(getattr(plain_loss, "variables", lambda params: {})(params))
        own["adversarial"] = {"step": jnp.zeros((), jnp.int32), **{name: first() for name in names}}
        if networks:
            own["perceptual"] = {name: jax.tree.map(jnp.asarray, net.variables) for name, net in networks.items()}
        return own

    loss_fn.whole_batch = "weighs two gradients of the whole batch against each other; set train.accumulate=1"
    loss_fn.variables, loss_fn.check_row = variables, plain_loss.check_row
    return loss_fn


def _value_and_gradient(fn, x: jax.Array):
    """(sum, count, gradient of the sum) of fn(x) = (sum, count), all without a way back for other gradients."""
    value, pull, count = jax.vjp(fn, x, has_aux=True)
    return jax.lax.stop_gradient((value, count, pull(jnp.ones_like(value))[0]))


def _last_layer(decoder, name: str, where: str) -> str:
    """The path of the kernel of the decoder's last layer."""
    layer = getattr(decoder, "last_layer", None)
    if layer is None:
        raise UserError(
            f"{where}: the adaptive weight is taken at the last layer of decoders.{name}, but {type(decoder).__name__} "
            "declares no `last_layer` (its name); set adaptive=False"
        )
    return f"decoders_{name}/{layer}/kernel"
