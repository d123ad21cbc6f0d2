import json
import types

import jax
import numpy as np
import pytest

from configs import common, digits
from vfm import data
from vfm import plan as plan_lib
from vfm.data import Pipeline
from vfm.data.corrupted import CORRUPTIONS
from vfm.data.interleave import Layout, Modality
from vfm.experiment import Experiment
from vfm.tokenizers import SPECIAL, ByteTokenizer

V, D, L, F, T, B, HEADS = 262, 16, 3, 32, 12, 16, 2


def language_model(**changes):
    """A LLaMA-style model with untied tables; its data do not exist."""
    c = common.base()
    c.tokenizer = {"name": "byte", "special": ("<pad>", "<bos>", "<eos>", "<a>", "<b>", "<c>")}
    c.model = {
        "centre": "text",
        "encoders": {"text": {"name": "text", "vocab_size": V, "width": D}},
        "backbone": {"name": "decoder_only", "width": D, "depth": L, "num_heads": HEADS, "mlp_dim": F,
                     "remat": "none", "max_len": T},
        "decoders": {"text": {"name": "text", "vocab_size": V}},
    }  # fmt: skip
    c.objective = {"name": "next_token"}
    c.data = {"name": "text", "source": {"name": "jsonl", "path": "nowhere/at/all.jsonl"}, "length": T,
              "workers": 0, "skip_corrupt": False}  # fmt: skip
    c.train.update(steps=10, batch_size=B, ema=0.99)
    c.optimizer.schedule.warmup_steps = 2
    c.update_from_flattened_dict(changes)
    return c


TABLES = 2 * V * D
KERNELS = L * (4 * D * D + 3 * D * F)
NORMS = L * 2 * D + D
FORWARD = B * T * 2 * (KERNELS + V * D) + L * 2 * 2 * B * HEADS * T * T * (D // HEADS)


def test_a_plan_by_hand_on_eight_shards(tmp_path, capsys):
    found = plan_lib.plan(Experiment(language_model(**{"mesh.fsdp": 8})), tmp_path)
    assert found["parameters.encoders.text"] == found["parameters.decoders.text"] == V * D
    assert found["parameters.backbone"] == KERNELS + NORMS
    assert found["parameters.total"] == found["parameters.trainable"] == TABLES + KERNELS + NORMS
    assert found["parameters.frozen"] == 0

    assert found["flops.forward"] == FORWARD
    assert found["flops.step"] == found["flops.executed"] == 3 * FORWARD
    assert found["flops.per_token"] == 3 * FORWARD / (B * T)
    assert found["flops.per_example"] == 3 * FORWARD / B
    assert (found["step.examples"], found["step.tokens"], found["mesh.fsdp"]) == (B, B * T, 8)

    # Every table and kernel has a dimension that 8 divides; the scales of the norms are replicated.
    params = 4 * ((TABLES + KERNELS) // 8 + NORMS)
    assert found["memory.parameters"] == found["memory.gradients"] == found["memory.ema"] == params
    assert found["memory.optimizer"] == 2 * params + 2 * 4  # moments; the counts of AdamW and of the schedule
    # tokens, targets, loss_mask, segment_ids, positions; input_mask; example_mask
    rows = 5 * 4 * T + T + 4
    assert found["memory.batch"] == B // 8 * (rows + 4)  # and how many records were skipped
    held = sum(found[f"memory.{name}"] for name in ("parameters", "optimizer", "ema", "batch"))
    assert found["memory.temporaries"] > found["memory.gradients"]
    assert 0 <= found["memory.total"] - held - found["memory.temporaries"] < 2000  # step, key, metrics

    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text()) == found
    lines = capsys.readouterr().out.splitlines()
    assert "mesh: 8 × cpu (fsdp 8)" in lines
    shown = next(line for line in lines if line.startswith("  total"))
    assert shown.split()[1] == f"{found['parameters.total']:,}"


def test_frozen_accumulated_and_rematerialised(tmp_path):
    changes = {"train.accumulate": 2, "model.backbone.remat": "full", "mesh.tensor": 2, "train.ema": 0.0}
    c = language_model(**changes)
    c.optimizer.frozen = ("encoders_text/.*", "decoders_text/.*")
    found = plan_lib.plan(Experiment(c), tmp_path)
    assert found["parameters.frozen"] == TABLES
    assert found["parameters.trainable"] == KERNELS + NORMS
    assert found["memory.ema"] == 0
    moments = 4 * (KERNELS // 2 + NORMS)  # the tables have none
    assert found["memory.optimizer"] == 2 * moments + 2 * 4
    # Neither the pass that counts what to divide by nor the micro-batches change the work of a step. No gradient of the
    # frozen head is computed, but that of its input is.
    assert found["step.micro_batches"] == 2
    assert found["flops.step"] == 3 * FORWARD - 2 * B * T * V * D
    assert found["flops.executed"] > 1.15 * found["flops.step"]


class Silent:
    """A traced, lowered and compiled function of a backend that gives no memory figures."""

    jaxpr = jax.make_jaxpr(lambda x: x)(1.0)
    lower = compile = lambda self: self

    def memory_analysis(self):
        raise NotImplementedError


def test_a_backend_without_memory_figures(tmp_path, capsys):
    experiment = Experiment(language_model(**{"model.backbone.depth": 1}))
    experiment.train_step = types.SimpleNamespace(trace=lambda *args: Silent())
    found = plan_lib.plan(experiment, tmp_path)
    assert "memory.temporaries" not in found
    exact = ("parameters", "gradients", "optimizer", "ema", "variables", "batch")
    assert found["memory.total"] == sum(found[f"memory.{name}"] for name in exact)
    assert "gives no memory figures" in capsys.readouterr().out


def test_the_batch_is_that_of_the_data():
    experiment = Experiment(digits.get_config())
    batch = Pipeline(experiment.dataset("train"), experiment.config.train.batch_size, seed=0).batch(0)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    planned = jax.tree.map(lambda x: (x.shape, x.dtype), plan_lib.abstract_batch(experiment))
    assert planned == real
    assert plan_lib.step_flops(experiment) > 0


CORRUPTED = ("<mask>", "<cls>", "<sep>", "<start>", "<end>", *(f"<extra_id_{i}>" for i in range(8)))
TEXT = {"name": "text", "source": {"name": "stdlib", "limit": 2}}
DATA = {name: {**TEXT, "corruption": {"name": name}} for name in CORRUPTIONS}
DATA["plain"] = TEXT
DATA["mixture"] = {"name": "mixture", "datasets": {"a": TEXT, "b": DATA["prefix_lm"]}, "weights": {"a": 1.0, "b": 1.0}}


@pytest.mark.parametrize("name", DATA)
def test_a_blank_row_is_like_a_real_one(name):
    given = {"layout": Layout(64, {"image": Modality((2,), 1)}), "tokenizer": ByteTokenizer((*SPECIAL, *CORRUPTED))}
    real = data.build(DATA[name], "train", **given).example(0, np.random.default_rng(0))
    shapes = lambda row: jax.tree.map(lambda x: (np.shape(x), x.dtype), row)
    assert shapes(data.blank(DATA[name], **given)) == shapes(real)


def test_a_tokenizer_that_is_yet_to_be_trained_needs_no_text():
    c = language_model()
    c.tokenizer = {"name": "bpe", "vocab_size": V, "special": (*SPECIAL, "<mask>")}
    c.data.corruption = {"name": "prefix_lm"}
    assert plan_lib.analytic(Experiment(c))["flops.step"] == 3 * FORWARD


def test_blocks_stand_in_the_order_of_the_survey():
    roots = ["signals_a", "backbone", "decoders_a", "encoders_b_c", "encoders_a", "output_projectors_a"]
    names = [".".join(plan_lib._block(root)[1:]) for root in sorted(roots, key=plan_lib._block)]
    assert names == ["encoders.a", "encoders.b_c", "backbone", "output_projectors.a", "decoders.a", "signals"]


@pytest.mark.parametrize(
    "value, text", [(0, "0   B"), (1023, "1,023   B"), (1536, "1.50 KiB"), (3 * 2**40, "3.00 TiB")]
)
def test_bytes_are_readable(value, text):
    assert plan_lib._bytes(value) == text
