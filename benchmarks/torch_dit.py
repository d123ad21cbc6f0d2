"""A DiT with adaLN-Zero (Peebles & Xie 2023) in PyTorch, and what `benchmarks.train_step` needs of both sides.

It can write its weights in the layout of `diffusers`, which `vfm.interop.diffusers` reads. Noise and times are part of
the batch, so that both sides have the same loss; patches of 2, C = 4, as in latent diffusion.
"""

import json
import math
import pathlib

CHANNELS, PATCH, CLASSES, FREQUENCIES = 4, 2, 10, 256


def arrays(args) -> dict:
    """The batch: noisy latents [B, C, H, W], times [B], labels [B], and the noise that is to be found."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (args.batch, CHANNELS, args.image, args.image)
    return {
        "x": rng.normal(size=shape).astype(np.float32),
        "t": rng.integers(0, 1000, args.batch),
        "labels": rng.integers(0, CLASSES, args.batch),
        "noise": rng.normal(size=shape).astype(np.float32),
    }


def build(args):
    """The model, a `torch.nn.Module` with save_pretrained(folder); call: (x, t, labels, noise) -> loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from vfm.layers.positions import sinusoidal_2d

    D, N, L = args.width, args.heads, args.depth

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
            self.modulation = nn.Linear(D, 6 * D)

        def forward(self, x, c):
            shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
            h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift
            q, k, v = self.qkv(h).unflatten(-1, (3, N, D // N)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate * self.out(h)
            h = F.layer_norm(x, (D,), eps=1e-6) * (1 + scale_2) + shift_2
            return x + gate_2 * self.down(F.gelu(self.up(h), approximate="tanh"))

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.side = args.image // PATCH
            self.patch = nn.Conv2d(CHANNELS, D, PATCH, stride=PATCH)
            self.register_buffer("positions", torch.from_numpy(sinusoidal_2d((self.side, self.side), D)))
            self.hidden, self.projection = nn.Linear(FREQUENCIES, D), nn.Linear(D, D)
            self.table = nn.Embedding(CLASSES + 1, D)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.modulation, self.unpatch = nn.Linear(D, 2 * D), nn.Linear(D, PATCH * PATCH * CHANNELS)

        def forward(self, x, t, labels, noise):
            half = FREQUENCIES // 2
            frequency = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
            angle = t[:, None].float() * frequency[None]
            time = self.projection(F.silu(self.hidden(torch.cat([angle.cos(), angle.sin()], dim=-1))))
            c = time + self.table(labels)
            x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x, c)
            shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
            x = self.unpatch(F.layer_norm(x, (D,), eps=1e-6) * (1 + scale) + shift)
            x = x.unflatten(1, (self.side, self.side)).unflatten(-1, (PATCH, PATCH, CHANNELS))
            return F.mse_loss(torch.einsum("nhwpqc->nchpwq", x).flatten(4).flatten(2, 3), noise)

        def save_pretrained(self, folder):
            from safetensors.numpy import save_file

            values = {name: tensor.detach().numpy() for name, tensor in self.state_dict().items()}
            names = {"patch": "pos_embed.proj", "modulation": "proj_out_1", "unpatch": "proj_out_2"}
            inner = {"out": "attn1.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2", "modulation": "norm1.linear"}
            found = {}
            for leaf in ("weight", "bias"):
                found |= {f"{theirs}.{leaf}": values[f"{ours}.{leaf}"] for ours, theirs in names.items()}
                for i in range(L):
                    ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
                    found |= {f"{theirs}.{b}.{leaf}": values[f"{ours}.{a}.{leaf}"] for a, b in inner.items()}
                    for name, part in zip("qkv", values[f"{ours}.qkv.{leaf}"].reshape(3, D, *[D][: leaf == "weight"])):
                        found[f"{theirs}.attn1.to_{name}.{leaf}"] = part
                    embedder = f"{theirs}.norm1.emb.timestep_embedder"
                    found[f"{embedder}.linear_1.{leaf}"] = values[f"hidden.{leaf}"]
                    found[f"{embedder}.linear_2.{leaf}"] = values[f"projection.{leaf}"]
                    found[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = values["table.weight"]
            found = {name: value.copy() for name, value in found.items()}
            save_file(found, pathlib.Path(folder) / "diffusion_pytorch_model.safetensors")
            config = {
                "_class_name": "DiTTransformer2DModel", "num_attention_heads": N, "attention_head_dim": D // N,
                "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": L, "sample_size": args.image,
                "patch_size": PATCH, "num_embeds_ada_norm": CLASSES,
            }  # fmt: skip
            (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))

    return DiT().train()


def ours(folder, batch, remat: str):
    """(parameters, loss function, batch, whether each parameter learns) in this project."""
    import jax
    import jax.numpy as jnp

    from vfm import tree
    from vfm.interop import diffusers
    from vfm.objectives import Aux

    model, variables = diffusers.load(folder, remat=remat)

    def predict(module, x, t, labels):
        condition, _ = module.encoders["label"](labels, train=True)
        return module.decoders["image"].denoiser(x, t, condition, train=True)[0]

    def loss_fn(params, variables, batch, rng, *, train: bool):
        found = model.apply({"params": params}, batch["x"], batch["t"], batch["labels"], method=predict)
        errors = jnp.square(found - batch["noise"])
        return {"noise": (1.0, errors.sum(), errors.size)}, Aux({}, variables)

    for name in ("x", "noise"):
        batch = {**batch, name: batch[name].transpose(0, 2, 3, 1)}
    # The table of classes is the kernel that reads unit vectors; neither these nor its bias are there in PyTorch.
    fixed = ("encoders_label/", "decoders_image/unconditional/", "decoders_image/denoiser/embedder/condition/bias")
    learns = jax.tree.map(lambda path: not path.startswith(fixed), tree.paths(variables["params"]))
    return variables["params"], loss_fn, batch, learns
