"""`python -m experiments.main --config=configs/NAME.py[:ARG] --workdir=DIR [--config.a.b=value ...]`."""

import sys

from absl import app, flags
from ml_collections import config_flags

from vfm.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "config file, with :ARG for a variant", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; starting again in it resumes")


def main(_):
    from vfm.run import run

    run(CONFIG.value, WORKDIR.value)


def cli():
    """Runs `main`; bad input ends in one line on stderr and status 2."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        app.run(main)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    cli()
