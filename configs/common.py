"""Defaults of every config."""

from ml_collections import ConfigDict, FieldReference

from vfm.errors import unknown

# Fields of every `data` section: worker processes (0: a thread), corrupt records (False: stop), folder of the data.
DATA = {"workers": 0, "skip_corrupt": False, "dir": ""}
# Fields of every `study` section: how many runs that differ only in seed and learning rate share a program.
STUDY = {"together": 1}


def check_variant(arg: str, config: str, variants: tuple[str, ...]) -> None:
    """Refuses `configs/NAME.py:ARG` for an ARG that the config does not have."""
    if arg and arg not in variants:
        raise unknown("variant", arg, variants, f"configs/{config}.py")


def own_folder(c: ConfigDict) -> None:
    """--config.data.dir is the folder of the source."""
    for field in ("data_dir", "dir"):
        if field in c.data.source:
            c.data.dir = FieldReference("")
            c.data.source[field] = c.data.get_ref("dir")


def base() -> ConfigDict:
    """Sections that all configs share; a config adds model, tokenizer, data and objective."""
    return ConfigDict(
        {
            "title": "",
            "seed": 0,
            "mode": "train",
            "allow_changed_config": False,
            "init": {"path": "", "checkpoint": "latest", "match": ()},  # vfm/train/stages.py explains the fields
            "train": {"steps": 1000, "batch_size": 64, "accumulate": 1, "ema": 0.0},
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-3,
                "schedule": {"name": "cosine", "warmup_steps": 100},
                "clip_norm": 1.0,
                "weight_decay": 0.01,
                "frozen": (),
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "distributed": {
                "coordinator": "",
                "num_processes": 0,
                "process_id": -1,
            },  # as is: from the environment, if any
            "eval": {
                "every": 500,
                "split": "validation",
                "limit": 256,
                "test_split": "test",
                "test_limit": 0,
                "batch_size": 64,
                "evaluators": (),
                "judge_examples": 2000,
                "checkpoint": "latest",
            },
            "checkpoint": {"every": 500, "keep": 2, "keep_best": 1, "best_metric": "loss", "best_mode": "min"},
            "log": {"every": 20, "tensorboard": True},
            # Of mode=plan; "" and 0.0: not asked for. vfm/budget.py explains the fields.
            "plan": {"law": "", "budget": 0.0, "tokens": 0.0, "accelerator": "", "utilisation": 0.0},
            "generate": {  # the fields are explained in vfm/infer.py
                "task": "",
                "text": "",
                "files": "",
                "max_new": 32,
                "min_new": 0,
                "stop": (),
                "samples": 1,
                "stream": False,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "no_repeat_ngram_size": 0,
                "beams": 1,
                "length_penalty": 1.0,
                "early_stopping": "false",
                "mask": "<mask>",
                "steps": 10,
            },
        }
    )
