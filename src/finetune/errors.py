"""The ways a run ends other than well, each with the exit code of the command line; and what does not end it."""

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


class FinetuneError(Exception):
    """Base of the errors that are meant for the user: the message is all that is printed, without a traceback."""

    exit_code = 1


class ConfigError(FinetuneError):
    """A setting, option or environment that cannot work; raised before anything heavy is done."""

    exit_code = 2


class NonFiniteError(FinetuneError):
    """Loss or gradient stayed NaN or infinite for the configured number of steps in a row, or the weights became so."""

    exit_code = 3


class DataError(FinetuneError):
    """Data that cannot be read or used as the configuration asks."""

    exit_code = 4


class PushPending(FinetuneError):
    """The model is trained and saved, but the Hub does not hold it yet; the message names the command that finishes."""

    exit_code = 5


class CheckpointError(FinetuneError):
    """No usable checkpoint where one was asked for, or where some stand but none is whole; or none can be written."""

    exit_code = 1


class ProcessError(FinetuneError):
    """A process of the run was killed, hangs, or ran out of memory."""

    exit_code = 1


class Preempted(FinetuneError):
    """A signal stopped the run after its checkpoint was saved; the same command resumes it.

    exit_code is 75 after SIGTERM or SIGUSR1 (a scheduler should requeue) and 130 after SIGINT.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def surviving(what: str, *, required: bool) -> Iterator[None]:
    """An OSError inside, such as a full disk, costs `what` alone, unless it is required."""
    try:
        yield
    except OSError as error:
        if required:
            raise
        log.warning("no %s (%s); what was written before is whole, going on", what, error)
