"""The command line of the training scripts, and how every script ends."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from common.parameters import bind
from training.signals import Stopped


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


def guarded(work: Callable[[], object], traceback: bool) -> None:
    """Calls `work`; what ends it early becomes one message and an exit status, an error with traceback itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on
    try:
        work()
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(_message(stopped), file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:  # where there is nothing to save
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if traceback:
            raise
        sys.exit(f"error: {_message(error)}")


def _message(error: Exception) -> str:
    """Without the lines that gin adds; of what is no input error the kind and the first line."""
    message = str(error).split("\n  In call to configurable")[0]
    known = isinstance(error, (ValueError, OSError, FloatingPointError, Stopped))
    if known or message.startswith("Required bindings"):
        return message
    return f"{type(error).__name__}: {message.partition(chr(10))[0]} (--traceback shows where)"
