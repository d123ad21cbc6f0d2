"""`run(config, workdir)`: trains, evaluates, generates or plans, as `config.mode` says."""

import contextlib
import inspect
import sys
from collections.abc import Sequence

import jax

from vfm import distributed, infer, report, tree
from vfm.errors import unknown
from vfm.experiment import Experiment, evaluation_params
from vfm.plan import plan
from vfm.train import loop, stages
from vfm.train.preemption import Preemption
from vfm.train.training import Training, open_checkpoints
from vfm.workdir import prepare

# What a flag of `config.distributed` says by default: a flag has one type, so it cannot be None.
NOT_GIVEN = {"coordinator": "", "num_processes": 0, "process_id": -1}


def run(config, workdir: str, devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """Runs one config in its folder, on all devices by default.

    Returns what it wrote to results.json; empty if it was stopped.
    """
    if config.mode not in MODES:
        raise unknown("mode", config.mode, MODES, "config.mode")
    join(config)
    experiment = Experiment(config, devices)
    path = experiment.folder = prepare(workdir, config, write=distributed.is_main())
    return MODES[config.mode](experiment, path)


def join(config) -> None:
    """Joins the processes of `config.distributed` or of the environment; before anything touches a device, once."""
    processes, known = config.get("distributed", {}), inspect.signature(distributed.initialize).parameters
    for field in processes:
        if field not in known:
            raise unknown("field", field, known, "config.distributed")
    if not jax.distributed.is_initialized():
        distributed.initialize(**{field: value for field, value in processes.items() if value != NOT_GIVEN.get(field)})


def train(experiment: Experiment, path) -> dict[str, float]:
    """Trains from the last good checkpoint (or from the start), then evaluates on the test split."""
    config = experiment.config
    with (
        Preemption() as preemption,
        Training(experiment, path) as training,
        contextlib.closing(experiment.train_batches(training.start)) as batches,
    ):
        state, done = loop.train(
            training.state,
            experiment.train_step,
            batches,
            start=training.start,
            steps=config.train.steps,
            evaluate=training.evaluate,
            eval_every=config.eval.every,
            save=training.save,
            save_every=config.checkpoint.every,
            logger=training.logger,
            log_every=config.log.every,
            stop_requested=preemption.requested,
            each_step=training.checkpointer.poll,
            memory=training.memory,
        )
    if done < config.train.steps:
        print(
            f"stopped at step {done} of {config.train.steps}; the checkpoint is saved, and the same command resumes",
            file=sys.stderr,
        )
        return {}
    stages.verify(training.origin, state.params, evaluation_params(state))
    weights = {"params": evaluation_params(state), "variables": state.variables}
    return _finish(experiment, path, weights, done, {"train_seconds": training.seconds()})


def load(experiment: Experiment, path) -> tuple[dict, int]:
    """{"params", "variables"} of a checkpoint (`config.eval.checkpoint`: "latest", "best" or a step), and its step."""
    abstract = experiment.abstract_state
    branch = "ema" if jax.tree.leaves(abstract.ema) else "params"
    wanted = {branch: abstract.ema if branch == "ema" else abstract.params}
    if jax.tree.leaves(abstract.variables):
        wanted["variables"] = abstract.variables
    choice = experiment.config.eval.checkpoint
    with open_checkpoints(experiment, path, read_only=True) as checkpointer:
        found, step = checkpointer.restore_partial(wanted, int(choice) if choice.isdecimal() else choice)
    return {"params": found[branch], "variables": found.get("variables", {})}, step


def evaluate(experiment: Experiment, path) -> dict[str, float]:
    """Evaluates a checkpoint of the folder on the test split."""
    experiment.check_data(experiment.config.eval.test_split)
    return _finish(experiment, path, *load(experiment, path), {})


def _finish(experiment, path, weights, step, results) -> dict[str, float]:
    """Loss and evaluators on the test split -> results.json and report.html."""
    config, params, variables = experiment.config, weights["params"], weights["variables"]
    results = {**results, "step": step, "parameters": tree.count(params)}
    if about := stages.read(path).get("frozen"):
        results["parameters_frozen"] = about["parameters"]
    loss = experiment.evaluate_loss(params, variables, config.eval.test_split, config.eval.test_limit)
    results |= {f"test_{name}": value for name, value in loss.items()}
    samples = {}
    for _, evaluator in experiment.evaluators():
        found = evaluator(experiment, params, variables, config.eval.test_split, config.eval.test_limit)
        results |= found.metrics
        samples |= found.samples
    if distributed.is_main():
        report.write_json(path / "results.json", results)
        page = report.Report(config.get("title", "vfm run"))
        page.text(
            f"Mode {config.mode}, seed {config.seed}, {step} steps of {config.train.batch_size} examples, "
            f"{experiment.mesh.size} device(s)."
        )
        page.table(("result", "value"), list(results.items()), f"Results on the {config.eval.test_split} split")
        if (path / "metrics.jsonl").exists():
            page.figure("loss", report.curves(path / "metrics.jsonl"), "Loss by step")
        for name, (caption, rows) in samples.items():
            page.samples(name, rows, caption)
        page.table(
            ("block", "parameters"),
            [(name, tree.count(block)) for name, block in params.items()],
            "Parameters by block",
        )
        if lines := stages.tell(stages.read(path)):
            page.text(f"Parameters at the start of the training: {'; '.join(lines)}.")
        page.table(
            ("trait", "value"),
            _card(config, params, step),
            "Model card. A foundation model is large, trained on much data, serves many tasks and generalises beyond "
            "its domain; a run that has not measured all four does not claim to be one",
        )
        page.write(path)
        for name, value in results.items():
            print(f"{name}: {value:.4g}")
        print(f"wrote {path / 'results.json'} and {path / 'report.html'}")
    return results


def generate(experiment: Experiment, path) -> dict[str, float]:
    """Answers the request of `config.generate` with a checkpoint of the folder."""
    return infer.answer(experiment, load(experiment, path)[0], path)


def _card(config, params, step: int) -> list[tuple]:
    """The four traits of a foundation model, as far as this run knows them."""
    examples = step * config.train.batch_size
    tasks = config.data.get("tasks", ())
    return [
        ("parameters", tree.count(params)),
        ("examples seen", examples),
        ("sequence positions seen", examples * config.data.length),
        ("tasks served", f"{len(tasks)}: {', '.join(tasks)}" if tasks else f"1: {config.objective.name}"),
        ("score outside its domain", "not measured"),
    ]


MODES = {"train": train, "evaluate": evaluate, "generate": generate, "plan": plan}
