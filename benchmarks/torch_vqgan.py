"""A VQGAN here and in PyTorch, with the same weights, for `benchmarks.train_step`.

Encoder and decoder of residual blocks, codebook by gradient, PatchGAN with batch norm, hinge loss, adaptive weight by
the gradients at the decoder's last layer, and the distance in the feature maps of a VGG with random weights. PyTorch
has an optimizer for each network, as is usual; both gradients are taken before either steps, as they are here.
"""

from typing import Any

COMMITMENT, PERCEPTUAL, ADVERSARIAL = 0.25, 0.5, 0.8
CODES, LATENT, DISCRIMINATOR_DEPTH = 256, 4, 2


def _config(args) -> dict[str, Any]:
    half = {
        "name": "latent",
        "image_size": (args.image, args.image),
        "channels": 3,
        "widths": (args.width, 2 * args.width),
        "layers_per_block": args.depth,
        "mid_attention": False,
        "latent_channels": LATENT,
    }
    codes = {"name": "vq", "codebook_size": CODES, "update": "gradient", "codebook_init": "uniform"}
    judge = {"name": "patchgan", "width": args.width, "depth": DISCRIMINATOR_DEPTH, "norm": "batch"}
    return {
        "centre": "image",
        "backbone": {},
        "encoders": {"image": {**half, "bottleneck": codes}},
        "decoders": {"image": half},
        "discriminators": {"image": judge},
    }


def ours(args):
    """(parameters, variables, loss function, images float32[B, H, W, 3]) at the start."""
    import jax
    import numpy as np

    from vfm import model as model_lib
    from vfm import objectives

    model = model_lib.build(_config(args))
    vgg = {"name": "vgg", "stages": (1, 1), "widths": (args.width // 2, args.width), "norm": "none"}
    loss_fn = objectives.build(
        {
            "name": "adversarial",
            "loss": "hinge",
            "weight": ADVERSARIAL,
            "guard": 0.0,
            "perceptual_weight": PERCEPTUAL,
            "perceptual": {"random": vgg},
            "reconstruction": {"likelihood": "l1", "commitment": COMMITMENT},
        },
        model,
    )
    variables = dict(jax.jit(lambda key: model_lib.init(model, key, 1))(jax.random.key(0)))
    params = variables.pop("params")
    variables |= loss_fn.variables(params)
    images = np.random.default_rng(0).uniform(size=(args.batch, args.image, args.image, 3)).astype(np.float32)
    return params, variables, loss_fn, images


def theirs(args, params, variables, images, optimizer):
    """(run(steps) -> losses, function -> norm of the last gradient) in PyTorch, from the same weights. optimizer:
    arguments of AdamW."""
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    from vfm import tree

    torch.set_num_threads(args.threads)
    groups = 8
    strides = {"encoders_image/down_0/conv": 2} | {
        f"discriminators_image/conv_{i}": 2 for i in range(DISCRIMINATOR_DEPTH)
    }

    def layers(flat):
        """Layers by the paths of ours, with their weights."""
        found = {}
        for path in sorted({path.rpartition("/")[0] for path in flat}):
            if path.endswith("quantizer/codebook"):
                continue
            bias = flat.get(f"{path}/bias")
            if f"{path}/kernel" in flat:
                weight = torch.tensor(flat[f"{path}/kernel"]).permute(3, 2, 0, 1)
                judges, stride = path.startswith("discriminators"), strides.get(path, 1)
                pad = 1 if judges else 0 if stride == 2 else weight.shape[2] // 2
                layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, pad, bias=bias is not None)
            elif path.startswith("discriminators"):
                weight = torch.tensor(flat[f"{path}/scale"])
                layer = nn.BatchNorm2d(len(weight))
            else:
                weight = torch.tensor(flat[f"{path}/scale"])
                layer = nn.GroupNorm(groups, len(weight), eps=1e-6)
            with torch.no_grad():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(torch.tensor(bias))
            found[path] = layer
        return found

    flat, seen = ({path: np.array(x) for path, x in tree.flatten(t).items()} for t in (params, variables["perceptual"]))
    net, features = layers(flat), layers(seen)
    codebook = nn.Parameter(torch.tensor(flat["encoders_image/quantizer/codebook/embedding"]))
    for layer in features.values():
        layer.requires_grad_(False)

    def residual(x, path):
        h = net[f"{path}/conv_0"](F.silu(net[f"{path}/norm_0"](x)))
        h = net[f"{path}/conv_1"](F.silu(net[f"{path}/norm_1"](h)))
        return h + (net[f"{path}/conv_shortcut"](x) if f"{path}/conv_shortcut" in net else x)

    def middle(x, half):
        return residual(residual(x, f"{half}/mid/block_0"), f"{half}/mid/block_1")

    def end(x, half):
        return net[f"{half}/conv_out"](F.silu(net[f"{half}/norm_out"](x)))

    def encode(x):
        half, levels = "encoders_image", 2
        x = net[f"{half}/conv_in"](x)
        for level in range(levels):
            for i in range(args.depth):
                x = residual(x, f"{half}/down_{level}_block_{i}")
            if level < levels - 1:
                x = net[f"{half}/down_{level}/conv"](F.pad(x, (0, 1, 0, 1)))
        return end(middle(x, half), half)

    def quantise(z):
        rows = z.permute(0, 2, 3, 1)
        with torch.no_grad():
            distance = codebook.square().sum(1) - 2 * rows.reshape(-1, LATENT) @ codebook.T
        chosen = codebook[distance.argmin(1)].reshape(rows.shape)
        loss = F.mse_loss(chosen, rows.detach()) + COMMITMENT * F.mse_loss(rows, chosen.detach())
        return (rows + (chosen - rows).detach()).permute(0, 3, 1, 2), loss

    def decode(z):
        half = "decoders_image"
        x = middle(net[f"{half}/conv_in"](z), half)
        for level in (1, 0):
            for i in range(args.depth + 1):
                x = residual(x, f"{half}/up_{level}_block_{i}")
            if level:
                x = net[f"{half}/up_{level}/conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return end(x, half)

    def judge(x):
        half = "discriminators_image"
        for i in range(DISCRIMINATOR_DEPTH + 1):
            x = net[f"{half}/conv_{i}"](x)
            x = F.leaky_relu(net[f"{half}/norm_{i}"](x) if i else x, 0.2)
        return net[f"{half}/conv_out"](x)

    def maps(x):
        found = []
        for stage in range(2):
            x = features[f"image/params/conv_{stage}_0"](x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10))
            x = F.max_pool2d(x, 2)
        return found

    real = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    of = lambda wanted: [
        p for path, layer in net.items() if path.startswith("discriminators") == wanted for p in layer.parameters()
    ]
    own, judges = [codebook, *of(False)], of(True)
    optimizers = [torch.optim.AdamW(group, **optimizer) for group in (own, judges)]
    last = net["decoders_image/conv_out"].weight

    def run(steps):
        losses = []
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            z, of_codes = quantise(encode(real))
            fake = decode(z)
            with torch.no_grad():
                wanted = maps(real)
            far = sum((a - b).square().sum(1).mean((1, 2)) for a, b in zip(maps(fake), wanted)).mean()
            reconstruction = (fake - real).abs().mean() + PERCEPTUAL * far
            generator = -judge(fake).mean()
            norms = [
                torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, generator)
            ]
            factor = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
            loss = reconstruction + of_codes + ADVERSARIAL * factor * generator
            loss.backward(inputs=own)
            discriminator = 0.5 * (F.relu(1 - judge(real)) + F.relu(1 + judge(fake.detach()))).mean()
            discriminator.backward(inputs=judges)
            for optimizer in optimizers:
                optimizer.step()
            losses.append((loss + discriminator).detach())
        return [float(loss) for loss in losses]

    def norm():
        return float(nn.utils.get_total_norm([p.grad for p in (*own, *judges) if p.grad is not None]))

    return run, norm
