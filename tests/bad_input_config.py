"""The smallest run, images of digits -> text. Its arguments are other sources of data, or mistakes."""

from configs import digits

SOURCES = {
    "folder": {"name": "image_folder", "dir": "data", "mode": "L"},
    "npz": {
        "name": "npz",
        "dir": "data",
        "arrays": {"image": "x"},
        "paths": {split: f"{split}.npz" for split in ("train", "validation", "test")},
    },
    "tfds": {
        "name": "tfds",
        "data_dir": "data",
        "dataset": "dots:1.0.0",
        "features": {"image": "image", "label": "label"},
        "splits": {"train": "train", "validation": "train", "test": "train"},
    },
    "nofield": {"name": "image_folder"},
}


def get_config(arg=""):
    c = digits.get_config("smoke")
    block = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
    del c.model
    c.model = {
        "centre": "text",
        "dtype": "float32",
        "encoders": {
            "text": {"name": "text", "vocab_size": 262, "width": 8},
            "image": {"name": "vit", "image_size": (8, 8), "patch_size": 4, **block},
        },
        "input_projectors": {"image": {"name": "linear", "width": 8}},
        "backbone": {"name": "decoder_only", "max_len": 32, **block},
        "output_projectors": {"image": {"name": "linear", "width": 8}},
        "decoders": {
            "text": {"name": "text", "vocab_size": 262},
            "image": {"name": "autoencoder", "grid": (2, 2), "upsample": (2, 2), "conv_width": 4},
        },
    }
    del c.data.sources
    c.data.sources = {"image": SOURCES.get(arg, {"name": "digits"})}
    c.data.update(length=16, tasks=("image->text",), weights=())
    c.train.update(steps=2, batch_size=8, ema=0.0)
    c.optimizer.schedule.warmup_steps = 1
    c.optimizer.frozen = ()
    c.eval.update(limit=8, test_limit=8, batch_size=8, evaluators=())
    c.log.update(every=1, tensorboard=False)
    if arg == "text":
        del c.data
        c.data = {
            "name": "text",
            "length": 16,
            "skip_corrupt": False,
            "workers": 0,
            "source": {
                "name": "jsonl",
                "dir": "data",
                "paths": {s: f"{s}.jsonl" for s in ("train", "validation", "test")},
            },
        }
    if arg == "block_field":
        c.model.encoders.image.pathc_size = 2
    if arg == "objective_field":
        c.objective.txt = 2.0
    if arg == "optimizer_field":
        c.optimizer.b3 = 0.9
    if arg == "optimizer_number":
        c.optimizer.b1 = "big"
    if arg == "dropout":
        c.model.backbone.dropout = 1.5
    if arg == "mesh_axis":
        c.mesh.pipeline = 1
    if arg == "rules":
        c.sharding_rules = {"embed": "fspd"}
    if arg == "processes":
        c.distributed = {"processes": 2}
    if arg == "section":
        del c.objective
    return c
