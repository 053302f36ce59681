"""The ways a command ends short of success, each with its exit code. Messages are written for the person
who typed the command: what was wrong, what was expected, what to do."""


class UserError(Exception):
    """The input cannot be used. Printed as one message, exit code 2."""

    exit_code = 2


class BusyError(UserError):
    """A temporary failure: the request is right, and the same command can succeed later. A lock is held, a server is
    away, a disk is full, a process is lost. Exit code 75 (EX_TEMPFAIL)."""

    exit_code = 75


class DamagedError(Exception):
    """Bytes on disk are not what was committed. Printed as one message, exit code 3."""

    exit_code = 3


class LostError(Exception):
    """Another process of the same run ended; what happened it says itself. The same command continues: exit code 75."""

    exit_code = BusyError.exit_code


class Interrupted(Exception):
    """SIGINT or SIGTERM was obeyed and the state saved. Exit code 130; the message says how to continue."""

    exit_code = 130
