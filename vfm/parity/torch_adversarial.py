"""Parity of adversarial training with torch: PatchGAN, and the gradients that steer it."""

import jax
import jax.numpy as jnp
import numpy as np

from vfm import tree
from vfm.discriminators.patchgan import PatchGAN
from vfm.parity.torch_cnn import _averages, _norm, _read

ROWS = 3


def torch_patchgan(ours: PatchGAN, channels: int):
    """(a call of torch layers in the layout of pix2pix, {our name: layer})."""
    from torch import nn

    layers, names, before = [], {}, channels
    for i in range(ours.depth + 1):
        width = ours.width * min(2**i, 8)
        plain = i == 0 or ours.norm == "none"
        names[f"conv_{i}"] = nn.Conv2d(before, width, 4, 2 if i < ours.depth else 1, 1, bias=plain)
        layers.append(names[f"conv_{i}"])
        if not plain:
            names[f"norm_{i}"] = _norm(ours.norm, width, ours.groups)
            layers.append(names[f"norm_{i}"])
        layers.append(nn.LeakyReLU(0.2))
        before = width
    names["conv_out"] = nn.Conv2d(before, 1, 4, 1, 1)
    return nn.Sequential(*layers, names["conv_out"]), names


def patchgan(norm: str = "batch", depth: int = 2, seed: int = 0) -> float:
    """Largest difference of logits, running averages and gradients in training, then of logits in evaluation."""
    import torch

    torch.manual_seed(seed)
    ours = PatchGAN(width=4, depth=depth, norm=norm, groups=4)
    run, names = torch_patchgan(ours, 2)
    with torch.no_grad():
        for parameter in run.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    params, averages = tree.unflatten(_read(names)), tree.unflatten(_averages(names))
    state = {"batch_stats": averages} if averages else {}
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(2, ROWS, 29, 24, 2)).astype(np.float32)  # an odd side, and not a square

    @jax.jit
    def train(params, state, x, weight):
        def loss(params, x):
            (logits, _), new = ours.apply({"params": params, **state}, x, train=True, mutable=["batch_stats"])
            return (weight * logits).sum(), (logits, new)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    x = torch.as_tensor(items[0].transpose(0, 3, 1, 2)).requires_grad_()
    logits = run(x)
    weight = rng.normal(size=logits.shape).astype(np.float32)
    (torch.as_tensor(weight) * logits).sum().backward()
    (gradient, of_items), (found, state) = train(params, state, items[0], weight.transpose(0, 2, 3, 1))
    run.eval()
    with torch.no_grad():
        last = run(torch.as_tensor(items[1].transpose(0, 3, 1, 2)))
    found_last, _ = jax.jit(lambda v, x: ours.apply(v, x, train=False))({"params": params, **state}, items[1])
    pairs = [
        (found, logits.detach().permute(0, 2, 3, 1)),
        (of_items, x.grad.permute(0, 2, 3, 1)),
        (found_last, last.permute(0, 2, 3, 1)),
    ]
    for ours_, theirs in ((gradient, _read(names, gradient=True)), (state.get("batch_stats", {}), _averages(names))):
        flat = tree.flatten(ours_)
        pairs += [(flat[path], value) for path, value in theirs.items()]
    return max(difference(*pair) for pair in pairs)


def difference(found, wanted) -> float:
    """The largest absolute difference, relative to the largest wanted value where that is above one."""
    found, wanted = np.asarray(jnp.asarray(found)), np.asarray(wanted)
    if found.shape != wanted.shape:
        raise ValueError(f"shapes {found.shape} and {wanted.shape}")
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def adaptive(seed: int = 0) -> float:
    """Largest relative difference of the adaptive weight λ of VQGAN, with hinge loss and a PatchGAN: ours in a step of
    training, and torch's from two calls of autograd at the last convolution of the same decoder."""
    import torch

    from vfm import model as model_lib
    from vfm import objectives

    shape = (16, 16, 1)
    encoder = {"name": "vgg", "image_size": shape[:2], "stages": (1, 1), "widths": (8, 8), "norm": "none"}
    model = model_lib.build(
        {
            "centre": "image",
            "backbone": None,
            "encoders": {"image": encoder},
            "decoders": {"image": {"name": "autoencoder", "grid": (4, 4), "upsample": (4,), "conv_width": 8}},
            "discriminators": {"image": {"name": "patchgan", "width": 4, "depth": 2, "norm": "batch"}},
        }
    )
    variables = dict(jax.jit(lambda key: model_lib.init(model, key, 8))(jax.random.key(seed)))
    params = variables.pop("params")
    fields = {"name": "adversarial", "loss": "hinge", "weight": 1.0, "reconstruction": {"likelihood": "l1"}}
    loss_fn = objectives.build(fields, model)
    variables |= loss_fn.variables(params)
    images = np.random.default_rng(seed).uniform(size=(ROWS, 1, *shape)).astype(np.float32)
    _, aux = jax.jit(
        lambda p, v, x: loss_fn(p, v, {"inputs": {"image": x}}, jax.random.key(0), train=True)
    )(params, variables, images)  # fmt: skip

    # What the last convolution reads, and its weights, are ours; all after it is torch's.
    (_, _), state = model.apply(
        {"params": params, **variables},
        inputs={"image": images},
        train=False,
        capture_intermediates=lambda module, _: module.name == "norm",
        mutable=["intermediates"],
    )
    (before,) = state["intermediates"]["decoders_image"]["norm"]["__call__"]
    before = torch.as_tensor(np.array(jax.nn.gelu(before))).permute(0, 3, 1, 2)
    run, names = torch_patchgan(model.discriminators["image"], 1)
    flat = tree.flatten(params["discriminators_image"])
    with torch.no_grad():
        for name, layer in names.items():
            for kind, parameter in layer.named_parameters():
                key = f"{name}/bias" if kind == "bias" else f"{name}/{'scale' if parameter.ndim == 1 else 'kernel'}"
                value = np.array(flat[key])
                parameter.copy_(torch.as_tensor(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value))
    last = torch.nn.Conv2d(8, 1, 3, padding=1)
    with torch.no_grad():
        own = params["decoders_image"]["conv_out"]
        last.weight.copy_(torch.as_tensor(np.array(own["kernel"]).transpose(3, 2, 0, 1)))
        last.bias.copy_(torch.as_tensor(np.array(own["bias"])))
    fake = last(before)
    reconstruction = (fake - torch.as_tensor(images[:, 0]).permute(0, 3, 1, 2)).abs().mean()
    norms = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, -run(fake).mean())
    ]
    wanted = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4)
    return abs(float(aux.metrics["adaptive_weight_image"][0]) / float(wanted) - 1.0)
