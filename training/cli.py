"""The command line of the training scripts, and how every script ends."""

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from common.parameters import bind
from training.signals import Stopped

IN_THE_WAY = {errno.EEXIST: "there is a file where a folder must be", errno.EISDIR: "there is a folder, not a file"}
IN_THE_WAY[errno.ENOTDIR] = IN_THE_WAY[errno.EEXIST]


class Terminal(logging.Handler):
    """Shows each message as a line, above the progress bar: warnings on stderr and marked, others on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        stream = sys.stderr if warning else sys.stdout
        tqdm.write("warning: " * warning + record.getMessage(), file=stream)
        stream.flush()


TERMINAL = Terminal()


def show_log() -> None:
    """Shows what the project's own modules log, from INFO on; a library's user may do otherwise."""
    for name in ("common", "data", "modules", "ops", "training"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(TERMINAL)


def run(train: Callable[[], object], description: str) -> None:
    """Parses the command line, binds the gin config and calls `train`.

    Bad input ends with one message and exit status 1 (--traceback shows all), a run that SIGTERM or SIGINT stopped
    with 143 or 130.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog='Example: %(prog)s configs/decoder_sample.gin --gin "train.iterations=100" --gin "train.seed=1"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="gin file, e.g. one of configs/")
    parser.add_argument(
        "--gin", action="append", default=[], metavar="BINDING", help="override a parameter of the file; repeatable"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments = parser.parse_args()
    if not Path(arguments.config).is_file():
        sys.exit(f"error: there is no config file {arguments.config}")

    def work() -> None:
        bind(arguments.config, arguments.gin)
        train()

    guarded(work, arguments.traceback)


def guarded(work: Callable[[], object], traceback: bool, part: Path | None = None) -> None:
    """Calls `work`; what ends it early becomes one message and an exit status, an error with traceback itself.

    part: where what was written so far lies, if anything was; a second line says so.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on
    show_log()
    try:
        work()
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(_message(stopped), file=sys.stderr)
        sys.exit(stopped.status)
    except BrokenPipeError:  # who read the output has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (KeyboardInterrupt, Exception) as error:
        if traceback:
            raise
        stopped = isinstance(error, KeyboardInterrupt)  # where there is nothing to save
        left = f"\nWhat was written so far is in {part}." if part and part.exists() else ""
        print("stopped" if stopped else f"error: {_message(error)}", left, sep="", file=sys.stderr)
        sys.exit(128 + signal.SIGINT if stopped else 1)


def _message(error: BaseException) -> str:
    """Of what is no input error the kind and the first line."""
    while "\n  In call to configurable" in str(error) and error.__context__:  # gin raises it with lines of its own
        error = error.__context__
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename2 or error.filename}: {IN_THE_WAY.get(error.errno or 0, error.strerror)}"
    message = str(error)
    known = isinstance(error, (ValueError, OSError, FloatingPointError, Stopped))
    if known or message.startswith("Required bindings"):
        return message
    return f"{type(error).__name__}: {message.partition(chr(10))[0]} (--traceback shows where)"
