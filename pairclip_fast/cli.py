"""The command line: arguments to one options value, the room that does the work, exit codes.

Each command is a frozen dataclass whose field docstrings are its help. A command imports its room only when it runs, so
`--help` and usage errors never wait for torch. `--debug` (anywhere) shows tracebacks of expected failures as well.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pairclip_fast import __version__
from pairclip_fast.allocator import keep_freed_memory
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.places import default_folder
from pairclip_fast.errors import PairclipError, printable
from pairclip_fast.events import EventLog
from pairclip_fast.openmp import spin_briefly
from pairclip_fast.text.options import EmbedOptions
from pairclip_fast.train.options import EvalOptions, TrainOptions

EXIT_INTERRUPTED = 130
NARROWEST_TERMINAL = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a run's report: one self-contained HTML file."""

    run: Path
    """The run folder."""
    json: bool = False
    """Print the summary as one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check every byte of a data folder; lists all that is changed, missing, truncated or foreign."""

    data: Path = dataclasses.field(default_factory=default_folder)
    """The data folder."""
    json: bool = False
    """Print the findings as one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Say what this machine can do, what will be used, and why."""

    verify_kernels: bool = False
    """Also check the caption-bank operations against float64 and time them beside torch; takes seconds."""
    json: bool = False
    """Print the answers as one JSON object."""


Options = ShardOptions | EmbedOptions | TrainOptions | EvalOptions | ReportOptions | VerifyOptions | DoctorOptions
COMMANDS: dict[str, type[Options]] = {
    "shard": ShardOptions,
    "embed": EmbedOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "report": ReportOptions,
    "verify": VerifyOptions,
    "doctor": DoctorOptions,
}


def parse(arguments: Sequence[str]) -> Options:
    """Arguments to the options of one command; leaves with exit code 2 on wrong usage."""
    import tyro

    subcommands = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items()]
    union: Any = subcommands[0]
    for subcommand in subcommands[1:]:
        union = union | subcommand
    options: Options = tyro.cli(
        union,
        prog="pairclip-fast",
        description="Train small contrastive image-caption models fast. Start with: pairclip-fast shard, then pairclip-fast train --amp. "
        "(--version alone says which this is; --debug beside any command shows where an error came from.)",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    return options


def run(options: Options) -> None:
    """Do what the options say and print the result on stdout."""
    events = EventLog()
    match options:
        case ShardOptions():
            from pairclip_fast.data.commands import render_shard, run_shard

            show(run_shard(options, events=events), render_shard, as_json=options.json)
        case EmbedOptions():
            from pairclip_fast.text.commands import render_embed, run_embed

            show(run_embed(options, events=events), render_embed, as_json=options.json)
        case TrainOptions():
            from pairclip_fast.train.run_folder import choose

            choose(options)  # a wrong configuration is answered before the next line loads torch
            from pairclip_fast.train.commands import render_train, run_train
            from pairclip_fast.train.distributed import is_first_process

            summary = run_train(options)
            if is_first_process():
                show(summary, render_train, as_json=options.json)
        case EvalOptions():
            from pairclip_fast.train.run_folder import stored_config

            stored_config(options.run)  # likewise
            from pairclip_fast.train.commands import render_eval, run_eval

            show(run_eval(options, events=events), render_eval, as_json=options.json)
        case ReportOptions():
            from pairclip_fast.report.commands import render_report, run_report

            show(run_report(options.run, events=events), render_report, as_json=options.json)
        case VerifyOptions():
            from pairclip_fast.data.commands import refuse_damage, render_verify, run_verify
            from pairclip_fast.text.bank import CaptionBank

            found = run_verify(options.data, events=events, load_bank=CaptionBank.load)
            show(found, render_verify, as_json=options.json)
            refuse_damage(found)
        case DoctorOptions():
            from pairclip_fast.doctor import refuse_if_lacking, render_doctor, run_doctor

            answers = run_doctor(events=events, verify=options.verify_kernels)
            show(answers, render_doctor, as_json=options.json)
            refuse_if_lacking(answers)


def prepare_terminal() -> None:
    """Meet the odd terminals: closed, unable to show a character, or narrower than the frames of the help (tyro would never end)."""
    if sys.stdout is None:  # closed by the caller; the next file opened would otherwise become descriptor 1
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if shutil.get_terminal_size().columns < NARROWEST_TERMINAL:
        os.environ["COLUMNS"] = str(NARROWEST_TERMINAL)


def show(summary: dict[str, Any], render: Callable[[dict[str, Any]], str], *, as_json: bool) -> None:
    """Print a command's summary, as JSON or in words."""
    print(json.dumps(summary) if as_json else render(summary))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `pairclip-fast`; returns the exit code (see `errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    prepare_terminal()
    keep_freed_memory()
    spin_briefly()
    try:
        if words == ["--version"]:
            print(__version__)
        else:
            run(parse(words or ["--help"]))
        sys.stdout.flush()
    except PairclipError as error:
        if debug:
            raise
        sys.stderr.write(f"pairclip-fast: {printable(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("pairclip-fast: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone. Point stdout at nothing, or the interpreter complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
