"""An output folder that appears as a whole, or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence

from vfm.errors import UserError


@contextlib.contextmanager
def whole(
    output: pathlib.Path, overwrite: bool, inputs: Sequence[pathlib.Path], own: Callable[[str], bool]
) -> Iterator[pathlib.Path]:
    """A folder to write into, beside `output`, that gets its name at the end of the block, and is gone if it fails.

    An output that is there is left untouched till then. It is replaced only with `overwrite`, and only if it holds
    nothing but files with names that `own` knows, and none of the inputs. What a killed process has left is cleared.
    UserError otherwise, and where another process is writing the same output.
    """
    partial, old = output.with_name(f"{output.name}.partial"), output.with_name(f"{output.name}.old")
    if old.exists() and not output.exists():  # killed between two renames
        os.rename(old, output)
    if output.exists():
        if not output.is_dir():
            raise UserError(f"the output {str(output)!r} is a file; give a folder")
        if content := sorted(path.name for path in output.iterdir()):
            if foreign := [name for name in content if not own(name)]:
                raise UserError(f"the output folder {str(output)!r} holds other files ({foreign[0]}); give another one")
            if not overwrite:
                raise UserError(f"the output folder {str(output)!r} exists; give another one, or --overwrite")
            if inside := [path for path in inputs if output.resolve() in path.resolve().parents]:
                raise UserError(f"the input {str(inside[0])!r} is in the folder to overwrite; give another --output")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / ".lock").open("w")
    except OSError as error:
        raise UserError(f"the output folder {str(output)!r} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing {str(output)!r}") from error
        try:
            for path in partial.iterdir():
                if path.name != ".lock":
                    path.unlink()
            yield partial
            (partial / ".lock").unlink()
            if output.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(output, old)
            os.rename(partial, output)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
