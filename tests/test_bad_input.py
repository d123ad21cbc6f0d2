"""Every kind of bad input ends in one line that says what is wrong, where, and what would be right; status 2."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.main import cli
from tests import bad_input_files as on_disk
from vfm import data
from vfm.data.interleave import Layout
from vfm.errors import UserError
from vfm.experiment import Experiment
from vfm.tokenizers.byte import ByteTokenizer

ROOT = Path(__file__).parents[1]
CONFIG_FILE = ROOT / "tests" / "bad_input_config.py"


def run(config, workdir, *flags) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli([f"--config={config}", f"--workdir={workdir}", *flags])
    return status, out.getvalue(), err.getvalue()


def told(result, *words) -> str:
    """The one line of a refused run; all words are in it."""
    status, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, (status, err)
    assert err.rstrip().endswith(lines[0])
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The runs of this file are nearly all the same program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that went well."""
    path = tmp_path_factory.mktemp("trained")
    status, out, err = run(CONFIG_FILE, path)
    assert status == 0 and "error" not in err and "results.json" in out, err
    return path


@dataclasses.dataclass
class Row:
    id: str
    flags: str
    words: tuple[str, ...]
    variant: str = ""  # of the config file
    make: Callable | None = None


# What is told from the command line and the config alone: no data is opened, nothing is compiled.
CONFIG = [
    Row(
        "unknown_field",
        "--config.train.stpes=3",
        ("'config.train.stpes'", "did you mean 'config.train.steps'?", "accumulate, batch_size, ema, steps"),
    ),
    Row(
        "field_of_another_section",
        "--config.train.learning_rate=1",
        ("did you mean 'config.optimizer.learning_rate'?",),
    ),
    Row("unknown_section", "--config.optimiser.name=lion", ("did you mean 'config.optimizer.name'?",)),
    Row("wrong_type", "--config.train.steps=abc", ("--config.train.steps=abc", "expected int, such as 2")),
    Row("wrong_boolean", "--config.log.tensorboard=maybe", ("--config.log.tensorboard=maybe", "expected bool")),
    Row("wrong_type_in_tuple", "--config.data.words=1,2", ("--config.data.words: 1 is not str", "'zero', 'one'")),
    Row("a_section_as_value", "--config.train=3", ("config.train is a section", "--config.train.accumulate")),
    Row("value_is_missing", "--config.train.steps", ("Missing value", "--config.train.steps")),
    Row("unknown_flag", "--workdri=x", ("'workdri'", "workdir")),
    Row("argument_without_flag", "train", ("'train'", "--flag=value")),
    Row("no_workdir", "--workdir=", ("--workdir is missing",)),
    Row("no_config", "--config=", ("--config is missing", "--config=configs/digits.py")),
    Row(
        "config_file_missing", "--config=configs/digit.py", ("'configs/digit.py' does not exist", "'configs/digits.py'")
    ),
    Row("config_syntax", "", ("broken.py', line 2: SyntaxError",), make=on_disk.file("\ndef get_config(:\n")),
    Row(
        "config_raises",
        "",
        ("broken.py', line 2: ZeroDivisionError",),
        make=on_disk.file("def get_config():\n  return 1 / 0\n"),
    ),
    Row("config_is_no_config", "", ("ConfigDict", "not a dict"), make=on_disk.file("def get_config():\n  return {}\n")),
    Row(
        "config_sets_unknown_field",
        "",
        ("line 4: AttributeError", "stpes", "steps"),
        make=on_disk.file("""\
        from configs import digits
        def get_config():
            c = digits.get_config().lock()
            c.train.stpes = 3
        """),
    ),
    Row("unknown_variant", "--config=configs/digits.py:tfsd", ("'tfsd'", "configs/digits.py", "did you mean 'tfds'?")),
    Row("section_is_missing", "", ("no section 'objective'",), "section"),
    Row("unknown_mode", "--config.mode=trian", ("'trian'", "config.mode", "did you mean 'train'?")),
    Row("unknown_block", "--config.model.encoders.image.name=vitt", ("'vitt' in model.encoders.image", "'vit'?")),
    Row("unknown_block_field", "", ("'pathc_size' in model.encoders.image", "'patch_size'?"), "block_field"),
    Row("block_field_zero", "--config.model.backbone.num_heads=0", ("model.backbone.num_heads=0", "whole number > 0")),
    Row(
        "block_field_shape",
        "--config.model.encoders.image.image_size=(8,)",
        ("image.image_size=(8,)", "tuple[int, int]"),
    ),
    Row("dropout_out_of_range", "", ("model.backbone.dropout=1.5", "less than 1"), "dropout"),
    Row("unknown_dtype", "--config.model.dtype=float33", ("'float33'", "did you mean 'float32'?")),
    Row(
        "widths_into_backbone",
        "--config.model.backbone.width=12",
        ("input_projectors.image (Linear) gives width 8", "backbone (DecoderOnly) takes width 12"),
    ),
    Row(
        "widths_of_a_modality",
        "--config.model.output_projectors.image.width=12",
        ("output_projectors.image (Linear) gives width 12", "encoders.image (ViT)", "takes width 8"),
    ),
    Row(
        "decoder_features",
        "--config.model.decoders.image.grid=(3,3)",
        ("encoders.image (ViT) gives number of features 4", "decoders.image (ConvDecoder) takes number of features 9"),
    ),
    Row("decoder_shape", "--config.model.decoders.image.upsample=(2,3)", ("(12, 12, 1)", "(8, 8, 1)", "ConvDecoder")),
    Row("heads_do_not_divide", "--config.model.backbone.num_heads=3", ("num_heads=3", "width=8")),
    Row("unknown_centre", "--config.model.centre=imag", ("model.centre='imag'", "image, text")),
    Row("unknown_objective", "--config.objective.name=any_to_al", ("'any_to_al'", "did you mean 'any_to_any'?")),
    Row("unknown_objective_field", "", ("'txt' in objective 'any_to_any'", "'text'?"), "objective_field"),
    Row("unknown_optimizer", "--config.optimizer.name=adam", ("'adam' in optimizer.name", "did you mean 'adamw'?")),
    Row("unknown_optimizer_field", "", ("adamw 'b3' in optimizer", "b1, b2"), "optimizer_field"),
    Row("optimizer_field_is_no_number", "", ("optimizer.b1='big' must be a number",), "optimizer_number"),
    Row(
        "unknown_schedule",
        "--config.optimizer.schedule.name=cosin",
        ("'cosin' in optimizer.schedule.name", "'cosine'?"),
    ),
    Row("warmup_too_long", "--config.optimizer.schedule.warmup_steps=5", ("warmup_steps=5", "less than train.steps=2")),
    Row("learning_rate_nan", "--config.optimizer.learning_rate=nan", ("optimizer.learning_rate=nan", "positive")),
    Row(
        "frozen_matches_nothing",
        "--config.optimizer.frozen=encoder/.*",
        ("optimizer.frozen", "'encoder/.*' matches no parameter", "backbone/transformer/"),
    ),
    Row("frozen_is_no_regex", "--config.optimizer.frozen=((", ("optimizer.frozen", "'((' is not a regular expression")),
    Row(
        "unknown_evaluator",
        "--config.eval.evaluators=any_to_al",
        ("'any_to_al'", "config.eval.evaluators", "any_to_any"),
    ),
    Row(
        "no_room_to_generate",
        "--config.eval.evaluators=any_to_any --config.model.backbone.max_len=16",
        ("position 22", "config.data.length=16", "model.backbone.max_len=16"),
    ),
    Row("unknown_tokenizer", "--config.tokenizer.name=bpe", ("'bpe'", "byte")),
    Row(
        "vocabulary_too_small",
        "--config.model.encoders.text.vocab_size=100 --config.model.decoders.text.vocab_size=100",
        ("model.encoders.text.vocab_size=100", "262"),
    ),
    Row("vocabularies_differ", "--config.model.decoders.text.vocab_size=300", ("encoders.text", "262", "300")),
    Row("text_beyond_max_len", "--config.data.length=64", ("config.data.length=64", "model.backbone.max_len=32")),
    Row("batch_and_mesh", "--config.train.batch_size=12", ("config.train.batch_size=12", "data × fsdp = 1 × 8")),
    Row("batch_and_accumulate", "--config.train.accumulate=3", ("config.train.batch_size=8", "3 × 8")),
    Row("eval_batch_and_mesh", "--config.eval.batch_size=9", ("config.eval.batch_size=9", "1 × 8")),
    Row("mesh_and_devices", "--config.mesh.tensor=3", ("config.mesh", "'tensor': 3", "8 devices")),
    Row("unknown_mesh_axis_in_rules", "", ("'fspd' in config.sharding_rules.embed", "did you mean 'fsdp'?"), "rules"),
    Row("unknown_distributed_field", "", ("'processes' in config.distributed", "'num_processes'?"), "processes"),
    Row("unknown_mesh_axis", "", ("'pipeline' in config.mesh", "data, expert, fsdp"), "mesh_axis"),
    Row("no_steps", "--config.train.steps=0", ("config.train.steps=0", ">= 1")),
    Row("ema_out_of_range", "--config.train.ema=1.5", ("config.train.ema=1.5", "less than 1")),
    Row(
        "workdir_below_a_file",
        "",
        ("--workdir=", "file/run cannot be written: Not a directory"),
        make=on_disk.below_a_file,
    ),
    Row(
        "workdir_of_another_config",
        "--config.train.steps=3 --config.model.backbone.mlp_dim=16",
        ("(model.backbone.mlp_dim was 8, is 16; train.steps was 2, is 3)", "--config.allow_changed_config"),
        make=on_disk.in_trained(),
    ),
    Row(
        "learning_rate_infinite",
        "--config.optimizer.learning_rate=inf",
        ("config.json: optimizer.learning_rate is inf",),
    ),
]

# What is told when the data is opened and the first example of each split is read: still nothing is compiled.
DATA = [
    Row("unknown_dataset", "--config.data.name=pair", ("'pair'", "did you mean 'pairs'?")),
    Row("unknown_source", "--config.data.sources.image.name=digit", ("data.sources.image", "'digit'", "'digits'?")),
    Row("source_field_missing", "", ("data.sources.image", "'image_folder' needs the field 'dir'"), "nofield"),
    Row(
        "data_folder_missing",
        "--config.data.sources.image.dir=nowhere",
        ("image_folder", "'nowhere' does not exist"),
        "folder",
    ),
    Row("data_file_missing", "", ("'npz'", "test.npz' does not exist"), "npz", on_disk.missing_npz),
    Row("unknown_split", "--config.eval.test_split=tset", ("'tset'", "source 'digits'", "did you mean 'test'?")),
    Row("unknown_modality_in_task", "--config.data.tasks=image->txt", ("'txt' in task 'image->txt'", "'text'?")),
    Row("malformed_task", "--config.data.tasks=image", ("task 'image'", "'a+b->c'")),
    Row("text_beyond_length", "--config.data.length=6", ("task 'image->text'", "12 positions", "length 6")),
    Row("too_few_words", "--config.data.words=('zero','one')", ("'image' has label 9", "2 classes")),
    Row(
        "image_of_wrong_rank",
        "",
        ("'image'", "(8, 8) (rank 2)", "expected (8, 8, 1) (rank 3)"),
        "npz",
        on_disk.npz((8, 8)),
    ),
    Row("image_of_wrong_shape", "", ("'image'", "(9, 9, 1)", "expected (8, 8, 1)"), "npz", on_disk.npz((9, 9, 1))),
    Row("not_finite_data", "", ("'image'", "item 0", "not finite"), "npz", on_disk.npz(nan_at=0)),
    Row(
        "truncated_image",
        "",
        ("train/a/0.png", "cannot be read", "truncated"),
        "folder",
        on_disk.damaged("train/a/0.png"),
    ),
    Row(
        "truncated_array_record",
        "",
        ("dots/1.0.0", "split 'train', record 0 cannot be read", "truncated"),
        "tfds",
        on_disk.array_record(on_disk.cut),
    ),
    Row("malformed_json_line", "", ("train.jsonl:2", "not a line of JSON"), "text", on_disk.jsonl),
    Row("evaluate_without_checkpoint", "--config.mode=evaluate", ("no checkpoint in", "train first")),
    Row("generate_without_checkpoint", "--config.mode=generate", ("no checkpoint in", "train first")),
    Row(
        "unknown_checkpoint",
        "--config.mode=evaluate --config.eval.checkpoint=lates",
        ("'lates'", "did you mean 'latest'?"),
    ),
    Row(
        "no_such_checkpoint",
        "--config.mode=evaluate --config.eval.checkpoint=7",
        ("step 7 is not there", "steps: 2"),
        make=on_disk.in_trained(),
    ),
    Row(
        "request_without_its_file",
        "--config.mode=generate --config.generate.task=image->text",
        ("config.generate.files", "'image->text' needs image=FILE"),
        make=on_disk.in_trained(),
    ),
    Row(
        "request_with_missing_file",
        "--config.mode=generate --config.generate.task=image->text --config.generate.files=image=nowhere.png",
        ("config.generate.files: image=nowhere.png: no such file",),
        make=on_disk.in_trained(),
    ),
    Row(
        "request_too_long",
        "--config.mode=generate --config.generate.text=1234567890 --config.generate.max_new=30",
        ("11 positions + 30 new tokens", "model.backbone.max_len=32"),
        make=on_disk.in_trained(),
    ),
    Row(
        "request_of_nothing",
        "--config.mode=generate --config.generate.max_new=0",
        ("config.generate.max_new=0 must be 1 or more",),
        make=on_disk.in_trained(),
    ),
    Row(
        "unknown_best_metric",
        "--config.checkpoint.best_metric=txt",
        ("'txt' in config.checkpoint.best_metric", "'text'?"),
    ),
    Row(
        "corrupt_checkpoints",
        "--config.train.steps=3 --config.allow_changed_config",
        ("no good checkpoint is left in", "step 2:", "delete or rename"),
        make=on_disk.in_trained(on_disk.flip_all_checkpoints),
    ),
    Row(
        "corrupt_checkpoint_evaluated",
        "--config.mode=evaluate",
        ("no good checkpoint is left in", "step 2:"),
        make=on_disk.in_trained(on_disk.flip_all_checkpoints),
    ),
    Row(
        "checkpoint_of_another_model",
        "--config.model.backbone.mlp_dim=16 --config.allow_changed_config",
        (
            "checkpoints/2 does not fit the model",
            "params/backbone/transformer/layers/mlp/down/kernel",
            "float32[1,8,8] in the checkpoint",
            "float32[1,16,8] in the model",
        ),
        make=on_disk.in_trained(),
    ),
    Row(
        "checkpoint_beyond_the_end",
        "--config.train.steps=1 --config.optimizer.schedule.warmup_steps=0 --config.allow_changed_config",
        ("checkpoint is at step 2", "config.train.steps=1"),
        make=on_disk.in_trained(),
    ),
]

# What only the run itself can see.
RUN = [
    Row(
        "corrupt_record_in_a_thread",
        "",
        ("train/b/2.png", "cannot be read"),
        "folder",
        on_disk.damaged("train/b/2.png"),
    ),
    Row(
        "corrupt_record_in_a_worker_process",
        "--config.data.workers=1",
        ("train/b/2.png", "cannot be read"),
        "folder",
        on_disk.damaged("train/b/2.png"),
    ),
    Row(
        "corrupt_array_record",
        "",
        ("dots/1.0.0", "split 'train', record", "cannot be read"),
        "tfds",
        on_disk.array_record(on_disk.flip),
    ),
    Row(
        "all_records_corrupt",
        "--config.data.skip_corrupt",
        ("6 corrupt records in a row", ".png"),
        "folder",
        on_disk.damaged(*(f"train/{name}/{i}.png" for name in "ab" for i in range(3))),
    ),
    Row(
        "loss_not_finite",
        "--config.optimizer.learning_rate=1e30 --config.train.steps=6",
        ("step 2: ", "loss", "not finite; last finite metrics (step 1:", "Lower the learning rate"),
    ),
]


def rows(table):
    return pytest.mark.parametrize("row", table, ids=[row.id for row in table])


@pytest.fixture
def refused(tmp_path, request, monkeypatch):
    """Runs a row, which must be told before any of the named methods of `Experiment` is called."""

    def too_late(*_, **__):
        raise AssertionError("data was opened, or something compiled, before this could be told")

    def check(row, *forbidden):
        folder = tmp_path / "folder"
        folder.mkdir()
        made = row.make(folder, lambda: request.getfixturevalue("trained")) if row.make else []
        for name in forbidden:
            late = too_late if callable(getattr(Experiment, name)) else property(too_late)
            monkeypatch.setattr(Experiment, name, late)
        config = f"{CONFIG_FILE}:{row.variant}" if row.variant else CONFIG_FILE
        told(run(config, tmp_path / "run", *made, *row.flags.split()), *row.words)

    return check


@rows(CONFIG)
def test_config_is_refused_before_data_is_opened(row, refused):
    refused(row, "dataset", "init_state", "eval_step")


@rows(DATA)
def test_data_is_refused_before_anything_is_compiled(row, refused):
    refused(row, "init_state", "eval_step")


@rows(RUN)
def test_run_ends_in_one_line(row, refused):
    refused(row)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_records_can_be_skipped_and_are_counted(workers, tmp_path):
    flags = on_disk.damaged("train/b/2.png", "test/a/0.png")(tmp_path / "data", None)
    flags += ["--config.data.skip_corrupt", f"--config.data.workers={workers}"]
    status, out, err = run(f"{CONFIG_FILE}:folder", tmp_path / "run", *flags)
    assert status == 0, err
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    # Two batches of 8 go twice through the 6 records and once through some of them.
    assert 2 <= sum(line["skipped_records"] for line in lines if line["split"] == "train") <= 3


def test_corrupt_documents_can_be_left_out(tmp_path, caplog):
    on_disk.jsonl(tmp_path, None)
    source = {"name": "jsonl", "dir": str(tmp_path), "paths": {"train": "train.jsonl"}}
    make = lambda **options: data.build(
        {"name": "text", "source": source}, "train", layout=Layout(8), tokenizer=ByteTokenizer(), **options
    )
    with pytest.raises(UserError, match="train.jsonl:2"):
        make()
    assert sum(make(skip_corrupt=True).example(i)["input_mask"].sum() for i in range(3)) == len("some textthe end") + 4
    assert "1 of 3 documents are corrupt and left out; the first: " in caplog.text and "train.jsonl:2" in caplog.text


def test_changed_config_is_let_through(tmp_path, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    flags = ["--config.eval.limit=16", "--config.data.question=which?"]
    told(run(CONFIG_FILE, tmp_path, *flags), "data.question was 'digit?', is 'which?'", "eval.limit was 8, is 16")
    status, _, err = run(CONFIG_FILE, tmp_path, *flags, "--config.allow_changed_config")
    assert status == 0 and "resuming at step 2" in err
    assert json.loads((tmp_path / "config.json").read_text())["eval"]["limit"] == 16
    assert run(CONFIG_FILE, tmp_path, *flags, "--config.mode=plan")[0] == 0  # it is the folder's config now


def command(*argv, limits=""):
    """(status, stdout, stderr) of a command line, in a process of its own under the shell's `limits`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    program = ["sh", "-c", f'{limits} exec "$@"', "sh", sys.executable, "-m", "experiments.main"]
    done = subprocess.run([*program, *argv], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--config.train.stpes=3",), ("did you mean 'config.train.steps'?",)),
        (("--config.mesh.data=3",), ("config.mesh", "8 devices")),
    ],
)
def test_as_a_command(flags, words, tmp_path):
    result = command(f"--config={CONFIG_FILE}", f"--workdir={tmp_path / 'run'}", *flags)
    assert result[1] == "" and result[2] == told(result, *words) + "\n"  # nothing but the line


def test_disk_full(tmp_path):
    """No file can grow beyond 32 blocks (of 512 or 1024 bytes); the arrays of the checkpoint are larger."""
    result = command(f"--config={CONFIG_FILE}", f"--workdir={tmp_path}", limits="ulimit -f 32;")
    told(result, "checkpoint of step 2 could not be written", str(tmp_path / "checkpoints"), "File too large")
    assert [line[:4] for line in result[2].splitlines()][1:] == ["step", "step", "erro"]  # and no traceback of a thread
