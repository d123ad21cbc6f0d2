"""`python -m experiments.main --config=configs/NAME.py[:ARG] --workdir=DIR [--config.a.b=value ...]`."""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from experiments import command_line
from vfm.allocator import keep_freed_memory
from vfm.errors import UserError


def _run(config: ConfigDict, workdir: str) -> None:
    from vfm.run import run  # only now: what is wrong with the flags is told at once

    run(config, workdir)


def cli(
    argv: Sequence[str] | None = None,
    start: Callable[[ConfigDict, str], None] = _run,
    usage: str = command_line.USAGE,
) -> int:
    """Runs a command line (default: that of the process) and returns the exit status.

    start: what to do with config and workdir; usage: the text of --help.
    0: done. 2: bad input, told in one line on stderr. 130: Ctrl-C. All other exceptions are bugs and go up.
    """
    keep_freed_memory()  # before a config imports JAX: what is held by then stays apart, and the peak is higher
    options = None
    try:
        options = command_line.parse(sys.argv[1:] if argv is None else argv)
        if options.config is None:
            print(usage)
        else:
            _log(options.verbosity)
            start(options.config, options.workdir)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        cause = _cause(error)
        if cause is None:
            raise
        if isinstance(cause, KeyboardInterrupt):
            return _leave(130, "interrupted; the same command resumes from the last checkpoint")
        if options and (options.verbosity or 0) >= 1:
            traceback.print_exc()
        return _leave(2, f"error: {cause}")


def _cause(error: BaseException | None) -> UserError | KeyboardInterrupt | None:
    """The one that an exception is, or was raised from: what goes through threads or C++ may come wrapped."""
    while error is not None and not isinstance(error, UserError | KeyboardInterrupt):
        error = error.__cause__
    return error


def _log(verbosity: int | None) -> None:
    """Warnings only, in plain words; with a verbosity all that absl shows at it, with time and place."""
    if verbosity is None:
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    else:
        from absl import logging as absl_logging

        absl_logging.use_absl_handler()
        absl_logging.set_verbosity(verbosity)


def _leave(status: int, line: str) -> int:
    print(line, file=sys.stderr, flush=True)
    if "vfm.distributed" in sys.modules:
        sys.modules["vfm.distributed"].close(status)  # the other processes, if there are any, end too
    return status


if __name__ == "__main__":
    sys.exit(cli())
