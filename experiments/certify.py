"""Runs every comparison with trusted libraries that can run here: `python -m experiments.certify [--only=REGEX]`.

Writes docs/certificates.md: what, oracle and its version, largest difference, tolerance, date; some checks alone are
written only where --output says. Exit status 1 if a check that ran failed. The oracles are the extra `parity`.
"""

import pathlib
import re
import sys

from absl import flags

from experiments.command_line import parse_flags

OUTPUT = "docs/certificates.md"


def cli(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    from vfm.errors import UserError

    values = flags.FlagValues()
    flags.DEFINE_string("only", "", "run only the checks whose name holds a match of this regex", flag_values=values)
    flags.DEFINE_string("output", "", "where the table goes", flag_values=values)
    flags.DEFINE_boolean("help", False, "what the command does", flag_values=values)
    try:
        parse_flags(values, sys.argv[1:] if argv is None else argv)
        if values.help:
            print(__doc__.strip())
            return 0
        try:
            only = re.compile(values.only)
        except re.error as error:
            raise UserError(f"--only={values.only} is not a regular expression: {error}") from None
        from vfm.parity import certificates

        chosen = [check for check in certificates.checks() if only.search(check.what)]
        if not chosen:
            raise UserError(f"--only={values.only} matches no check")
        found = []
        for number, check in enumerate(chosen, start=1):
            found.append(certificates.certify(check))
            value = found[-1].difference
            state = "pass" if found[-1].passed else found[-1].note or "FAIL"
            print(
                f"[{number}/{len(chosen)}] {check.what}: {'–' if value is None else f'{value:.1e}'} "
                f"(tolerance {check.tolerance:.0e}) {state}",
                flush=True,
            )
        if values.output or not values.only:
            output = pathlib.Path(values.output or OUTPUT)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(certificates.table(found), encoding="utf-8")
            print(f"wrote {output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(not c.passed and not c.skipped for c in found) else 0


if __name__ == "__main__":
    sys.exit(cli())
