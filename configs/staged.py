"""A new modality in stages: first the projector alone, then the backbone with it, then the way back.

    configs/staged.py         the start: a model that hears digits and says them, and sees images without any label
    configs/staged.py:align   stage 1 of LLaVA and of NExT-GPT: the image's input projector alone learns
    configs/staged.py:tune    stage 2 of LLaVA: input projectors and backbone learn
    configs/staged.py:decode  stage 2 of NExT-GPT: output projectors and signals alone learn, to make images and sounds
    configs/staged.py:any     stage 3 of NExT-GPT: projectors, signals and backbone learn, from any to any
    configs/staged.py:smoke   a few steps of the first

Each stage is a run of its own, which starts from another's folder:

    python -m experiments.main --config=configs/staged.py --workdir=runs/start
    python -m experiments.main --config=configs/staged.py:align --workdir=runs/align --config.init.path=runs/start
    python -m experiments.main --config=configs/staged.py:tune --workdir=runs/tune --config.init.path=runs/align
    python -m experiments.main --config=configs/staged.py:decode --workdir=runs/decode --config.init.path=runs/align
    python -m experiments.main --config=configs/staged.py:any --workdir=runs/any --config.init.path=runs/decode

What a stage must not change is frozen (`config.optimizer.frozen`), and every run checks at its end, by SHA-256, that it
did not. LLaVA: Liu et al. 2023, section 4.2. NExT-GPT: Wu et al. 2023, sections 4 and 5; it tunes the backbone by
low-rank adapters, here its own parameters learn.
"""

from ml_collections import ConfigDict

from configs import common, digits

# What learns in each stage; the tasks that it trains on, and its steps.
STAGES = {
    "align": (r"input_projectors_image/.*", ("image->text",), 400),
    "tune": (r"(input_projectors_(image|audio)|backbone)/.*", ("image->text", "audio->text"), 400),
    "decode": (r"(output_projectors_(image|audio)/.*|signals_.*)", ("text->image", "text->audio"), 400),
    "any": (r"((in|out)put_projectors_(image|audio)/.*|signals_.*|backbone/.*)", (*digits.TASKS, "text->audio"), 400),
}


def get_config(arg: str = "") -> ConfigDict:
    common.check_variant(arg, "staged", ("smoke", *STAGES))
    c = digits.get_config("smoke" if arg == "smoke" else "")
    c.title = "Digits in stages: sounds first, then images"
    c.data.update(tasks=("audio->text",), weights=())
    c.train.steps = 500
    if arg == "smoke":
        c.train.steps = 6
    if arg in STAGES:
        learns, c.data.tasks, c.train.steps = STAGES[arg]
        c.title = f"Digits in stages: {arg}"
        c.optimizer.frozen = (f"(?!{learns}$).*",)
        c.init.match = (".*",)  # so that a stage without its start is refused
    return c
