"""`dtrain`: the command.

    dtrain demo                 see a training run survive the death of its processes
    dtrain checkpoint ls RUN    look at the checkpoints of a run; see `dtrain checkpoint --help`
    dtrain nodes -- train.py    several nodes on one machine, to kill them, cut them off, slow them down
    dtrain store                the store that torchrun's agents meet at, outside of the nodes
    dtrain --version

A command is a frozen dataclass: its fields are the options, and `run` does the work and returns the exit code. To add
one, write it in a module of its own beside this one and name it in `commands`; a group of commands, such as
`dtrain checkpoint ls`, is an app within the app.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

from tyro.conf import FlagCreatePairsOff
from tyro.extras import SubcommandApp

from dtrain import __version__
from dtrain.cli import checkpoint
from dtrain.cli.console import OnNodes
from dtrain.cli.demo import Demo
from dtrain.cli.store import Store
from dtrain.cli.table import silence_stdout
from dtrain.errors import Damaged, DtrainError

DESCRIPTION = """Fault-tolerant PyTorch training. `dtrain COMMAND --help` tells the options of a command,
`dtrain --version` the version."""


class Command(Protocol):
    """What stands for one command, its options filled in."""

    def run(self) -> int:
        """Do the work. :returns: the exit code."""


def commands() -> SubcommandApp:
    """All commands by name, in the order of the help."""
    app = SubcommandApp()
    app.command(name="demo")(Demo)
    app.command(name="nodes")(OnNodes)
    app.command(name="store")(Store)
    app.command(checkpoint.app(), name="checkpoint", help="Look at the checkpoints of a run, check and convert them.")
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    :param arguments: those of the command line, without the program's name; by default this process's own.
    :raises SystemExit: always. 0 and 1 are the command's to give; 2 is an error in what was asked for, told in one
        line; 130 is Ctrl-C. A checkpoint that turns out to be damaged is 1.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["--version"], ["-V"]):
        print(f"dtrain {__version__}")
        sys.exit(0)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        command: Command = commands().cli(
            prog="dtrain", description=DESCRIPTION, args=given or ["--help"], config=(FlagCreatePairsOff,)
        )
        code = command.run()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        silence_stdout()
        sys.exit(128 + signal.SIGPIPE)
    except Damaged as error:
        print(f"dtrain: damaged: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except (DtrainError, OSError) as error:
        print(f"dtrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _leave(signum: int, frame: FrameType | None) -> None:
    """Leave as after an error, so that whoever has something to clear away does so."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
