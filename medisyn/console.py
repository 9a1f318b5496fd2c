"""How the command talks: one line per failure, quiet libraries, an exit code that says what happened.

- 0: done. 2: bad input or circumstances that the user can mend. 130: Ctrl-C. 1: a mistake in medisyn itself.
- `MEDISYN_DEBUG=1` shows the traceback instead of the line.

    app = typer.Typer(cls=OneLineErrors)
"""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

LIBRARIES = ("accelerate", "datasets", "diffusers", "huggingface_hub", "open_clip", "peft", "transformers")
LONGEST_MESSAGE = 600  # characters

# What bad input, a full disk, a missing extra, or too little memory look like.
EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


class OneLineErrors(typer.core.TyperGroup):
    """The command group: failures become one line on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line; see typer. Always leaves by SystemExit, or by the error itself in debug mode."""
        kwargs["standalone_mode"] = False
        with quiet_libraries():
            try:
                code = super().main(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the last place where an error can become a line
                if os.environ.get("MEDISYN_DEBUG") == "1":
                    raise
                typer.echo(f"error: {one_line(error)}", err=True)
                code = 2 if hasattr(error, "format_message") or isinstance(error, EXPECTED) else 1
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Ctrl-C is an ordinary way to stop."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; what is finished is kept, and the same command continues", err=True)
            raise typer.Exit(130) from None


def one_line(error: BaseException) -> str:
    """An error's message on one line; the name of its class if that says more."""
    if hasattr(error, "format_message"):  # typer's own
        command = getattr(getattr(error, "ctx", None), "command_path", "medisyn")
        text = f"{error.format_message().rstrip('.')} (see {command} --help)"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    elif isinstance(error, KeyError) or not isinstance(error, EXPECTED):
        text = f"{type(error).__name__}: {error} (MEDISYN_DEBUG=1 shows where)"
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + " ".join(record.getMessage().split())


class _OnceForEachModel(logging.Filter):
    """What the pipeline says of every batch, such as prompts that are too long, is said once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[tuple[str, int]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        is_new = place not in self.said or ".pipelines." not in record.name
        self.said.add(place)
        return is_new


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' warnings and notes, not their errors; medisyn's own go to stderr as single lines."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    own, handler = logging.getLogger("medisyn"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    handler.addFilter(_OnceForEachModel())
    before = own.level, own.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            own.addHandler(handler)
            own.propagate = False
            own.setLevel(logging.INFO)
            yield
        finally:
            own.removeHandler(handler)
            own.setLevel(before[0])
            own.propagate = before[1]
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For scripts, what `OneLineErrors` is for the command: a failure is one line and exit code 2, Ctrl-C is 130."""
    with quiet_libraries():
        try:
            yield
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
            sys.exit(130)
        except EXPECTED as error:
            if os.environ.get("MEDISYN_DEBUG") == "1":
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)


def run_command(arguments: Sequence[str]) -> None:
    """For scripts, `medisyn ARGUMENTS` in this process, printed before; ends the process where it fails."""
    from .cli import app

    print("medisyn", shlex.join(arguments), flush=True)
    try:
        app(list(arguments), prog_name="medisyn")
    except SystemExit as stop:
        if stop.code:
            raise


def quiet_progress_bars() -> None:
    """Leave only medisyn's own progress bars (and downloads, on a terminal)."""
    import datasets
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
