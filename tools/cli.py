"""The `cbit` command: a group of verbs, each loaded when it is called.

One `Error:` line on stderr, never a traceback; exit 0 done, 1 refused, 2 misuse.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from contextlib import suppress
from importlib import import_module

import click

from .. import __version__
from ..hw.errors import CbitError

VERBS = {
    "boot": "boot:boot",
    "cpuid": "cpuid:cpuid",
    "diff": "diff:diff",
    "dram": "dram:dram",
    "models": "cpuid:models",
    "msr": "msr:msr",
    "run": "run:run",
}
"""Verb to `module:function` below tools/; loading one does not load the others."""


class Verbs(click.Group):
    """The verbs of `VERBS`, imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of --help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb, or None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name].partition(":")
        command = getattr(import_module(f"..{module}", __name__), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cbit")
def cli() -> None:
    """An emulated AMD machine with memory encryption, driven from the shell."""


def main() -> None:
    """Run the command line and end the process."""
    # A command is short and makes few cycles: look for them less often.
    gc.set_threshold(100_000)
    code = run(sys.argv[1:])
    sys.stderr.flush()
    # Stdout is flushed by `run`. The host takes a machine's memory back faster than
    # Python gives it.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; return the exit code. Errors go to stderr as one line."""
    try:
        code = cli.main(args=arguments, prog_name="cbit", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as help_shown:
        help_shown.show()
        sys.stdout.flush()
        return 2
    except click.UsageError as misuse:
        return _fail(misuse.format_message(), 2)
    except click.ClickException as refused:
        return _fail(refused.format_message(), 1)
    except CbitError as refused:
        return _fail(str(refused), 1)
    except BrokenPipeError:
        # The reader went away: leave quietly, also at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as failed:
        if failed.errno == errno.ENOMEM:
            return _fail(f"this computer's memory does not suffice: {failed}", 1)
        name = f"{failed.filename}: " if failed.filename else ""
        return _fail(f"{name}{failed.strerror or failed}", 1)
    except MemoryError as lack:
        return _fail(f"this computer's memory does not suffice: {lack}", 1)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # what was said before the error; it may be the error
        sys.stdout.flush()
    line = " ".join(message.split())
    click.echo(f"Error: {line}", err=True)
    return code
