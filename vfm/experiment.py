"""What every mode of a run needs, built from its config."""

import functools
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vfm import data, distributed, metrics, objectives, sharding, tokenizers
from vfm import model as model_lib
from vfm.data import pipeline
from vfm.data.construct import plain
from vfm.data.records import CorruptRecord
from vfm.errors import UserError, unknown
from vfm.evaluate import CHECKS, EVALUATORS
from vfm.train import stages, step
from vfm.train import state as state_lib
from vfm.train.optimizer import build_optimizer, trained

SECTIONS = ("tokenizer", "model", "data", "objective", "optimizer", "mesh", "train", "eval", "checkpoint", "log")
# The lowest value of whole numbers with which a run would otherwise fail late, or do nothing.
LOWEST = {
    "seed": 0,
    "data.length": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "eval.every": 0,
    "eval.limit": 0,
    "eval.test_limit": 0,
    "eval.batch_size": 1,
    "checkpoint.every": 0,
    "log.every": 1,
}


def check(config) -> None:
    """Refuses what can be seen in the config alone: missing sections, numbers out of range, unknown evaluators."""
    for section in SECTIONS:
        if section not in config:
            raise UserError(f"the config has no section {section!r}; it needs {', '.join(SECTIONS)}")
    for field, lowest in LOWEST.items():
        section, _, name = field.rpartition(".")
        found = (config[section] if section else config).get(name)
        if isinstance(found, bool) or not isinstance(found, int) or found < lowest:
            raise UserError(f"config.{field}={found!r} must be a whole number >= {lowest}")
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed} must be less than 2**32")
    if not 0 <= config.train.ema < 1:
        raise UserError(f"config.train.ema={config.train.ema} must be from 0 (no average) to less than 1, such as 0.99")
    ours, data = (config[section].get("pairs") for section in ("objective", "data"))
    if ours is not None and data is not None and tuple(ours) != tuple(data):  # whose items are counted in this order
        raise UserError(f"config.objective.pairs={tuple(ours)} and config.data.pairs={tuple(data)} must be the same")
    for name in config.eval.evaluators:
        if name not in EVALUATORS:
            raise unknown("evaluator", name, EVALUATORS, "config.eval.evaluators")


class Experiment:
    """What every mode needs, built from the config: mesh, tokenizer, model, data, objective, optimizer."""

    def __init__(self, config, devices: Sequence[jax.Device] | None = None):
        """devices: of the mesh; all of this run's processes by default."""
        check(config)
        self.config = config
        self._datasets: dict[str, Any] = {}
        self.mesh = sharding.make_mesh(config.mesh, devices)
        self.rules = sharding.make_rules(config.get("sharding_rules", {}))
        sharding.check_batch(
            "train.batch_size", config.train.batch_size, config.train.accumulate, self.mesh, self.rules
        )
        sharding.check_batch("eval.batch_size", config.eval.batch_size, 1, self.mesh, self.rules)
        self.folder: pathlib.Path | None = None  # of the run, once it is known; a tokenizer is trained into it
        self.model = model_lib.build(config.model)
        self._check_vocabulary()
        self.layout = model_lib.layout(self.model, config.data.length)
        if self.model.backbone is not None and config.data.length > self.model.backbone.max_len:
            raise UserError(
                f"config.data.length={config.data.length} is longer than model.backbone.max_len="
                f"{self.model.backbone.max_len}"
            )
        self.loss_fn = objectives.build(config.objective, self.model)
        whole_batch = getattr(self.loss_fn, "whole_batch", "")
        if whole_batch and config.train.accumulate > 1:
            raise UserError(
                f"config.train.accumulate={config.train.accumulate}: objective {config.objective.name!r} {whole_batch}"
            )
        init = functools.partial(model_lib.init, self.model, length=config.data.length)
        params = jax.eval_shape(init, jax.random.key(0))["params"]
        self.tx, self.schedule = build_optimizer(config.optimizer, params, config.train.steps)
        self.create = functools.partial(
            state_lib.create,
            self.model,
            self.tx,
            seed=config.seed,
            length=config.data.length,
            ema=bool(config.train.ema),
            more=getattr(self.loss_fn, "variables", lambda params: {}),
        )
        state = jax.eval_shape(self.create)
        self.shardings = state_lib.shardings(state, self.tx, self.mesh, self.rules)
        self.abstract_state = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, self.shardings
        )
        self.initial = stages.wanted(config.get("init", {}), stages.model_variables(self))
        self.batch_sharding = sharding.batch_sharding(self.mesh, self.rules)
        for name in config.eval.evaluators:
            CHECKS[name](self)

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of the config. One that is to be trained is trained on the training split, once per run, and
        kept in the run's folder."""
        cfg = self.config.tokenizer
        if not tokenizers.untrained(cfg):
            return tokenizers.build(cfg)
        if self.folder is None:
            raise UserError("config.tokenizer: a tokenizer that is trained first needs the folder of the run")
        folder = self.folder / "tokenizer"
        if distributed.is_main() and not folder.exists():
            source = self.config.data.get("source")
            if source is None:
                raise UserError(
                    f"config.tokenizer: training one needs config.data.source, with {tokenizers.reads(cfg)}"
                )
            # The data set tells of what is skipped when it reads the same records.
            skipped = [] if self.config.data.get("skip_corrupt", False) else None
            examples = data.fields(source, "train", tokenizers.reads(cfg), skipped)
            report = lambda line: print(f"tokenizer: {line}", file=sys.stderr, flush=True)
            trained = tokenizers.train_config(plain(cfg), examples, report=report)
            partial = folder.with_name("tokenizer-partial")
            shutil.rmtree(partial, ignore_errors=True)
            tokenizers.save(partial, trained)
            partial.rename(folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the tokenizer is trained")
        return tokenizers.load(folder)

    @property
    def unused_ids(self) -> tuple[int, ...]:
        """Ids that the model has and the tokenizer has not; generation must suppress them."""
        return tuple(range(self.tokenizer.vocab_size, self.model.decoders["text"].vocab_size))

    def _check_vocabulary(self):
        cfg = self.config.tokenizer
        size = cfg.vocab_size if tokenizers.untrained(cfg) else self.tokenizer.vocab_size
        for kind, blocks in (("encoders", self.model.encoders), ("decoders", self.model.decoders)):
            if "text" in blocks and blocks["text"].vocab_size < size:
                raise UserError(
                    f"model.{kind}.text.vocab_size={blocks['text'].vocab_size} is smaller than the tokenizer's {size}"
                )

    def init_state(self):
        """A fresh train state, initialised on the mesh."""
        # Without `use_mesh`: the one example that shapes the parameters has no rows to share out.
        return jax.jit(self.create, out_shardings=self.shardings)()

    @functools.cached_property
    def train_step(self):
        """The jitted training step (state, batch) -> (state, metrics); it donates the state."""
        return self.jit(self.make_step(self.loss_fn), donate_argnums=0, out_shardings=(self.shardings, None))

    def make_step(self, loss_fn, schedule=None):
        """The training step of the config with any loss function, and any learning rate by step."""
        tx = self.tx
        if schedule is not None:
            config = self.config
            tx, _ = build_optimizer(config.optimizer, self.abstract_state.params, config.train.steps, schedule)
        return step.make_train_step(
            loss_fn,
            tx,
            schedule or self.schedule,
            accumulate=self.config.train.accumulate,
            ema_decay=self.config.train.ema,
            trained=trained(self.config.optimizer, self.abstract_state.params),
        )

    def dataset(self, split: str, **overrides):
        """The dataset of `config.data` for a split. One with overrides (see `Pairs`) shares its sources."""
        if split in self._datasets and not overrides:
            return self._datasets[split]
        if overrides:
            overrides["opened"] = self.dataset(split).sources
        own = ("length", "workers", "skip_corrupt", "dir")  # fields of the run, not of the dataset
        cfg = {key: value for key, value in self.config.data.items() if key not in (*own, *overrides)}
        found = data.build(
            cfg,
            split,
            layout=self.layout,
            tokenizer=self.tokenizer,
            skip_corrupt=self.config.data.get("skip_corrupt", False),
            **overrides,
        )
        if not overrides:
            self._datasets[split] = found
        return found

    def share_datasets(self, other: "Experiment") -> None:
        """Takes the datasets of a run whose config has the same sections tokenizer and data; they are read once."""
        self._datasets = other._datasets

    def check_data(self, *splits: str) -> None:
        """Opens the datasets of the splits and reads one example of each: bad data is told before compilation."""
        check_row = getattr(self.loss_fn, "check_row", lambda row, what: None)
        for split in splits:
            dataset = self.dataset(split)
            if not len(dataset):
                raise UserError(f"the {split} split has no examples")
            try:
                check_row(dataset.example(0, pipeline.rng(self.config.seed, 0)), f"row 0 of the {split} split")
            except CorruptRecord:
                if not self.config.data.get("skip_corrupt", False):
                    raise

    def train_batches(self, start: int) -> Iterator[Any]:
        """Global batches from step `start` to the last step."""
        cfg, size = self.config.data, self.config.train.batch_size
        source = pipeline.Pipeline(
            self.dataset("train"),
            size,
            self.config.seed,
            shuffle=True,
            skip_corrupt=cfg.get("skip_corrupt", False),
            workers=cfg.get("workers", 0),
        )
        rows = sharding.local_rows(size, self.batch_sharding)
        with source.iterate(start, self.config.train.steps, rows) as batches:
            for batch in batches:
                yield sharding.to_global(batch, rows, size, self.batch_sharding)

    def put(self, batch):
        """One batch that every process holds whole -> global arrays."""
        size = len(batch["example_mask"])
        rows = sharding.local_rows(size, self.batch_sharding)
        return sharding.to_global(
            jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, batch), rows, size, self.batch_sharding
        )

    def eval_batches(self, dataset, limit: int | None = None) -> Iterator[tuple[dict, dict]]:
        """Every example once, in order: (host batch, the same as global arrays)."""
        for batch in pipeline.eval_batches(
            dataset,
            self.config.eval.batch_size,
            limit or None,
            skip_corrupt=self.config.data.get("skip_corrupt", False),
        ):
            yield batch, self.put(batch)

    def use_mesh(self):
        """Context in which jitted functions see the mesh and the sharding rules of the run."""
        return sharding.use_mesh(self.mesh, self.rules)

    def jit(self, fn, **options):
        """`jax.jit` under `use_mesh`."""
        jitted = jax.jit(fn, **options)

        @functools.wraps(fn)
        def call(*args):
            with self.use_mesh():
                return jitted(*args)

        def trace(*args):
            with self.use_mesh():
                return jitted.trace(*args)

        call.trace = trace  # without running: the jaxpr, and what the compiler makes of it
        return call

    def fetch(self, x) -> np.ndarray:
        """A global array as numpy on every process."""
        return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else np.asarray(x)

    @functools.cached_property
    def forward(self):
        """Jitted (variables, batch) -> out of the model, without dropout."""
        return self.jit(
            lambda variables, batch: self.model.apply(
                variables, **{name: batch[name] for name in model_lib.INPUTS if name in batch}, train=False
            )[1]
        )

    @functools.cached_property
    def eval_step(self):
        return self.jit(step.make_eval_step(self.loss_fn))

    def evaluate_loss(self, params, variables, split: str, limit: int) -> dict[str, float]:
        """The objective's loss, its terms and metrics over a split (`limit` examples; 0: all)."""
        total, weights = {}, {}
        for number, (_, batch) in enumerate(self.eval_batches(self.dataset(split), limit)):
            measured, weight = self.eval_step(params, variables, batch, number)
            total = metrics.add(total, metrics.fetch(measured))
            weights = {name: float(value) for name, value in weight.items()}
        if not total:
            raise UserError(f"the {split} split has no examples")
        return {"loss": step.total_loss(total, weights), **metrics.finalize(total)}

    def evaluators(self):
        """(name, evaluator) for every name in `config.eval.evaluators`."""
        for name in self.config.eval.evaluators:
            yield name, EVALUATORS[name]


def evaluation_params(state):
    """The averaged parameters where the run keeps an average, else the parameters."""
    return state.ema if jax.tree.leaves(state.ema) else state.params
