"""Parity of the convolutional encoders with the same networks of torch layers, small and with random weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vfm import tree
from vfm.encoders.cnn import VGG, ResNet

ROWS = 3


def _norm(kind: str, width: int, groups: int):
    import torch

    return {"batch": lambda: torch.nn.BatchNorm2d(width), "group": lambda: torch.nn.GroupNorm(groups, width)}[kind]()


def _vgg(ours: VGG):
    """(the layers in order, {our name: layer}); the head is built for the last feature map, rows first."""
    from torch import nn

    layers, names, before = [], {}, ours.channels
    for stage, (count, width) in enumerate(zip(ours.stages, ours.widths)):
        for i in range(count):
            conv = nn.Conv2d(before, width, 3, padding=1, bias=ours.norm == "none")
            layers.append(conv)
            names[f"conv_{stage}_{i}"] = conv
            if ours.norm != "none":
                names[f"norm_{stage}_{i}"] = _norm(ours.norm, width, ours.groups)
                layers.append(names[f"norm_{stage}_{i}"])
            layers.append(nn.ReLU())
            before = width
        layers.append(nn.MaxPool2d(2, 2))
    size = before * ours.num_tokens
    names |= {"hidden_0": nn.Linear(size, ours.head_dim), "hidden_1": nn.Linear(ours.head_dim, ours.head_dim)}
    names["classes"] = nn.Linear(ours.head_dim, ours.num_classes)

    def run(x):
        x = nn.Sequential(*layers)(x).permute(0, 2, 3, 1).flatten(1, 2)
        h = names["hidden_1"](names["hidden_0"](x.flatten(1)).relu()).relu()
        return x, x.mean(dim=1), names["classes"](h)

    return run, names


def _resnet(ours: ResNet):
    from torch import nn

    names: dict[str, Any] = {}

    def pair(name, before, after, size, stride):
        names[f"conv_{name}"] = nn.Conv2d(before, after, size, stride, (size - 1) // 2, bias=False)
        names[f"norm_{name}"] = _norm(ours.norm, after, ours.groups)
        return lambda x: names[f"norm_{name}"](names[f"conv_{name}"](x))

    large = ours.stem == "large"
    before = ours.widths[0]
    stem = pair("stem", ours.channels, before, 7 if large else 3, 2 if large else 1)
    pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
    blocks = []
    for stage, (count, width) in enumerate(zip(ours.stages, ours.widths)):
        for i in range(count):
            stride, name = 2 if stage and not i else 1, f"{stage}_{i}"
            if ours.bottleneck:
                after = 4 * width
                path = [pair(f"{name}_0", before, width, 1, 1), pair(f"{name}_1", width, width, 3, stride),
                        pair(f"{name}_2", width, after, 1, 1)]  # fmt: skip
            else:
                after = width
                path = [pair(f"{name}_0", before, width, 3, stride), pair(f"{name}_1", width, width, 3, 1)]
            shortcut = None
            if stride != 1 or before != after:
                shortcut = pair(f"{name}_shortcut", before, after, 1, stride)
            blocks.append((path, shortcut))
            before = after
    names["classes"] = nn.Linear(before, ours.num_classes)

    def run(x):
        x = pool(stem(x).relu())
        for path, shortcut in blocks:
            y = x
            for layer in path[:-1]:
                y = layer(y).relu()
            x = (path[-1](y) + (x if shortcut is None else shortcut(x))).relu()
        pooled = x.mean(dim=(2, 3))
        return x.permute(0, 2, 3, 1).flatten(1, 2), pooled, names["classes"](pooled)

    return run, names


def _read(names: Mapping[str, Any], gradient: bool = False) -> dict[str, np.ndarray]:
    """Parameters of torch layers, or their gradients, by our paths and in our layouts."""
    found = {}
    for name, layer in names.items():
        weight, bias = layer.weight, layer.bias
        weight = (weight.grad if gradient else weight.detach()).numpy()
        kind = "scale" if weight.ndim == 1 else "kernel"
        found[f"{name}/{kind}"] = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        if bias is not None:
            found[f"{name}/bias"] = (bias.grad if gradient else bias.detach()).numpy()
    # Copies: torch writes its averages in place.
    return {path: value.copy() for path, value in found.items()}


def _averages(names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {}
    for name, layer in names.items():
        if hasattr(layer, "running_mean"):
            found |= {
                f"{name}/mean": layer.running_mean.numpy().copy(),
                f"{name}/var": layer.running_var.numpy().copy(),
            }
    return found


def compare(ours: VGG | ResNet, seed: int = 0) -> float:
    """Largest difference of features, pooled features, logits, running averages and gradients: two calls in training,
    then one in evaluation. The encoder has `num_classes`, and no dropout."""
    import torch

    torch.manual_seed(seed)
    run, names = (_vgg if isinstance(ours, VGG) else _resnet)(ours)
    with torch.no_grad():
        for layer in names.values():
            for parameter in layer.parameters():
                if parameter.ndim == 1:  # no trivial scale or bias
                    parameter.add_(0.2 * torch.randn_like(parameter))
    rng, worst = np.random.default_rng(seed), 0.0
    images = rng.normal(0.3, 1.0, (3, ROWS, *ours.item_shape)).astype(np.float32)
    params, averages = tree.unflatten(_read(names)), tree.unflatten(_averages(names))
    state = {"batch_stats": averages} if averages else {}

    def check(found, wanted):
        nonlocal worst
        wanted = np.asarray(wanted.detach() if hasattr(wanted, "detach") else wanted)
        if found.shape != wanted.shape:
            raise ValueError(f"shapes {found.shape} and {wanted.shape}")
        worst = max(worst, float(np.abs(np.asarray(found) - wanted).max() / max(1.0, np.abs(wanted).max())))

    @jax.jit
    def train(params, state, image, weights):
        def loss(params):
            (x, out), new = ours.apply(
                {"params": params, **state},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return sum((w * y).sum() for w, y in zip(weights, (x, out["logits"]))), (x, out, new)

        return jax.grad(loss, has_aux=True)(params)

    for image in images[:2]:
        theirs = run(torch.as_tensor(image.transpose(0, 3, 1, 2)))
        weights = [rng.normal(size=y.shape).astype(np.float32) for y in (theirs[0], theirs[2])]
        gradient, (x, out, state) = train(params, state, image, [jnp.asarray(w) for w in weights])
        for layer in names.values():
            layer.zero_grad()
        sum((torch.as_tensor(w) * y).sum() for w, y in zip(weights, (theirs[0], theirs[2]))).backward()
        for found, wanted in zip((x, out["pooled"], out["logits"]), theirs):
            check(found, wanted)
        for path, wanted in _averages(names).items():
            check(tree.flatten(state["batch_stats"])[path], wanted)
        for path, wanted in _read(names, gradient=True).items():
            check(tree.flatten(gradient)[path], wanted)
    for layer in names.values():
        layer.eval()
    with torch.no_grad():
        theirs = run(torch.as_tensor(images[2].transpose(0, 3, 1, 2)))
    x, out = jax.jit(lambda v, image: ours.apply(v, image, train=False))({"params": params, **state}, images[2])
    for found, wanted in zip((x, out["pooled"], out["logits"]), theirs):
        check(found, wanted)
    return worst


def resnet(norm: str = "batch", bottleneck: bool = False, stem: str = "large") -> float:
    """A small ResNet on feature maps with odd and even sides."""
    fields = dict(image_size=(31, 26), channels=3, stages=(1, 2), widths=(8, 16), groups=4, num_classes=5)
    return compare(ResNet(**fields, norm=norm, bottleneck=bottleneck, stem=stem))


def vgg(norm: str = "none") -> float:
    """A small VGG with the paper's head, on images with an odd side."""
    fields = dict(image_size=(18, 13), channels=3, stages=(1, 2), widths=(8, 16), groups=4, num_classes=5)
    return compare(VGG(**fields, norm=norm, head_dim=24, head_dropout=0.0))
