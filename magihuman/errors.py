"""Errors that a user can act upon."""


class UserError(Exception):
    """Bad input or configuration: one line that names the bad value and the remedy.

    Command lines print the message without a traceback and exit with status 2 (see `report_and_exit`).
    """


class NotApplicable(UserError):
    """A step that does not apply to this input, such as an evaluation of puppets for other clips.

    As a command it is an error; as a step after a training it is skipped with a note.
    """


def report_and_exit(error: UserError) -> None:
    """Print `error` on stderr as one line and leave with status 2.

    Raises:
        SystemExit: always, with code 2.
    """
    import sys

    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
