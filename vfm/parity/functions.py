"""Parity of single functions with torch and `transformers`: losses, positions, masks, optimizer steps."""

import jax
import jax.numpy as jnp
import numpy as np


def attention() -> float:
    """`dot_product_attention` with grouped heads, a causal mask in chunks, and a padded one, against torch's."""
    import torch

    from vfm.layers.attention import dot_product_attention, make_mask

    rng, worst = np.random.default_rng(0), 0.0
    B, T, N, M, K = 2, 150, 4, 2, 8
    q, k, v = (rng.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (N, M, M))
    padding = np.arange(T)[None] < np.asarray([[T], [90]])
    for causal in (False, True):
        mask = make_mask(jnp.arange(T), jnp.arange(T), causal=causal, kv_mask=jnp.asarray(padding))
        found = dot_product_attention(*map(jnp.asarray, (q, k, v)), mask=mask, scale=K**-0.5, causal=causal)
        repeat = lambda x: np.repeat(x, N // M, axis=2).transpose(0, 2, 1, 3)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *map(torch.as_tensor, (q.transpose(0, 2, 1, 3), repeat(k), repeat(v))),
            attn_mask=torch.as_tensor(np.array(mask)),
        )
        worst = max(worst, float(np.abs(np.asarray(found) - wanted.numpy().transpose(0, 2, 1, 3)).max()))
    return worst


def cross_entropy() -> float:
    """Token loss with label smoothing and ignored positions, and its gradient."""
    import torch

    from vfm.objectives.next_token import cross_entropy

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 9, 31)).astype(np.float32), rng.integers(0, 31, (4, 9))
    kept = rng.random((4, 9)) < 0.7

    def ours(x):
        total, count = cross_entropy(x, {"targets": jnp.asarray(labels), "loss_mask": jnp.asarray(kept)}, 0.1)[0]
        return total / count

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    x = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(
        x.reshape(-1, 31), torch.as_tensor(np.where(kept, labels, -100)).reshape(-1), label_smoothing=0.1
    )
    wanted.backward()
    return max(abs(float(value) - wanted.item()), float(np.abs(np.asarray(gradient) - x.grad.numpy()).max()))


def relative_buckets() -> float:
    """T5's buckets of relative positions, both directions."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    from vfm.layers.positions import relative_buckets

    distance = np.arange(-300, 301)
    worst = 0.0
    for both in (False, True):
        wanted = T5Attention._relative_position_bucket(torch.as_tensor(distance), both, 32, 128).numpy()
        found = relative_buckets(jnp.asarray(distance), bidirectional=both, num_buckets=32, max_distance=128)
        worst = max(worst, float(np.abs(np.asarray(found) - wanted).max()))
    return worst


def transformer_layer() -> float:
    """A post-norm encoder layer with ReLU against torch.nn.TransformerEncoderLayer."""
    import torch

    from vfm.layers.transformer import Block

    D, N, F, T = 16, 4, 24, 7
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(D, N, F, dropout=0.0, activation="relu", batch_first=True).eval()
    w = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    q, k, v = np.split(w["self_attn.in_proj_weight"], 3)
    bq, bk, bv = np.split(w["self_attn.in_proj_bias"], 3)
    heads = lambda kernel, bias: {"kernel": kernel.T.reshape(D, N, D // N), "bias": bias.reshape(N, D // N)}
    norm = lambda n: {"scale": w[f"norm{n}.weight"], "bias": w[f"norm{n}.bias"]}
    dense = lambda name: {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}
    params = {
        "attention": {
            "query": heads(q, bq),
            "key": heads(k, bk),
            "value": heads(v, bv),
            "out": {
                "kernel": w["self_attn.out_proj.weight"].T.reshape(N, D // N, D),
                "bias": w["self_attn.out_proj.bias"],
            },
        },
        "mlp": {"up": dense("linear1"), "down": dense("linear2")},
        "norm_attention": norm(1),
        "norm_mlp": norm(2),
    }
    block = Block(num_heads=N, mlp_dim=F, activation="relu", norm_position="post")
    x = np.random.default_rng(0).normal(size=(2, T, D)).astype(np.float32)
    (found, _), _ = block.apply({"params": params}, (jnp.asarray(x), None), {}, {}, False)
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(x)).numpy()
    return float(np.abs(np.asarray(found) - wanted).max())


def adamw_step() -> float:
    """Ten AdamW steps with decoupled weight decay, as `optax.adamw` takes them here, against torch's."""
    import optax
    import torch

    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(10, 7, 5)).astype(np.float32)
    tx = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    params = jnp.asarray(start)
    state = tx.init(params)
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
    return float(np.abs(np.asarray(params) - theirs.detach().numpy()).max())
