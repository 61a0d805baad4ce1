"""`deflector`, one command for everything: reads the flags, runs the command, and answers for its exit code.

0: done. 1: our fault. 2: bad input, bad usage, or results that could not be written, in one line. 130: Ctrl-C.
"""

import contextlib
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from tyro.conf import subcommand

import deflector
from deflector import commands, live_commands
from deflector.envs.errors import InputError
from deflector.live.cluster.flags import Cluster
from deflector.live.replay.flags import Replay
from deflector.live.router.flags import Serve
from deflector.training.settings import Evaluate, Export, Judge, Saturation
from deflector.training.train_flags import Train

OVERVIEW = """Learn and deploy prefill deflection for disaggregated LLM serving.

Compare the paper's policy (kairos) with ordinary disaggregation (never) and its rivals, in the simulator:

deflector evaluate --cluster 2P2D --workload long_tail_burst --load 0.7 --policies never,kairos,least_ttft

The same on a real trace, at several rates, with all figures and pictures on disk:

deflector evaluate --trace azure_code.csv.gz --rate 2,4,8 --json out.json --plots plots

Train a policy, and compare it:

deflector train --out runs/first

deflector evaluate --policies never,kairos,learned:runs/first/best

Put a policy in front of vLLM's prefill and decode engines:

deflector serve --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --policy kairos

Every command explains itself: deflector evaluate --help"""

PIPED_COLUMNS = 120
"""Width of tables that go to a file or a pipe."""

COMMANDS: dict[type, tuple[str, Callable[[Any, Console], None]]] = {
    Evaluate: ("evaluate", commands.run_evaluate),
    Judge: ("judge", commands.run_judge),
    Saturation: ("saturation", commands.run_saturation),
    Serve: ("serve", live_commands.run_serve),
    Cluster: ("cluster", live_commands.run_cluster),
    Replay: ("replay", live_commands.run_replay),
    Train: ("train", commands.run_train),
    Export: ("export", commands.run_export),
    commands.Policies: ("policies", commands.run_policies),
    commands.Trace: ("trace", commands.run_trace),
    commands.Profile: ("profile", commands.run_profile),
    commands.CompareRun: ("compare-run", commands.run_compare_run),
}
"""A command's flags -> its name, and what carries it out."""

_COMMAND_WORDS = {name for name, _ in COMMANDS.values()} | {"fit", "list", "show", "up", "status", "down"}


def main() -> None:
    """Runs the command line and ends the process."""
    code = run(sys.argv[1:])
    if code == 130:
        os._exit(code)  # Not waiting for simulations under way in other threads.
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: What follows `deflector`; nothing shows the overview.

    Returns:
        The exit code.
    """
    warnings.formatwarning = _format_warning
    try:
        code = _run(arguments or ["--help"])
        sys.stdout.flush()
        return code
    except InputError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _forget_output_on_failure()
        _complain("interrupted", kind="stopped")
        return 130
    except BrokenPipeError:
        _forget_output()  # Whoever read our output, such as `head`, has had enough.
        return 0
    except OSError as error:
        _forget_output_on_failure()
        where = f"{error.filename}: " if error.filename else "output: "
        return _complain(f"{where}{error.strerror or error}: free some space, or name another place")


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"deflector {deflector.__version__}")
        return 0
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command = tyro.cli(
                _commands(brief=arguments[0] in ("-h", "--help")),
                prog="deflector",
                description=OVERVIEW,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            return 0
        raise InputError(_one_line(box.getvalue(), arguments)) from None
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    COMMANDS[type(command)][1](command, Console(width=PIPED_COLUMNS if piped else None))
    return 0


def _commands(brief: bool) -> Any:
    """The union of all commands, as tyro takes it; in brief, with the first line of what each says of itself."""
    described = (
        Annotated[flags, subcommand(name, description=(flags.__doc__ or "").splitlines()[0] if brief else None)]
        for flags, (name, _) in COMMANDS.items()
    )
    return Union[tuple(described)]  # noqa: UP007  (made at run time)


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """What tyro says in a box, as one line: names of flags at one level of indentation, their help at the next."""
    lines = [re.sub(r"^[│╭╰] ?|[│╮╯]$", "", line).rstrip() for line in box.splitlines()[1:-1]]
    blocks = "\n".join(line for line in lines if not line.startswith(" " * 8)).split("─" * 5)
    problem = " ".join(blocks[0].split()).rstrip(".")
    for block in blocks[1:]:
        words = " ".join(block.strip("─ \n").split())
        if words.startswith("Perhaps"):
            problem += f"; perhaps you meant {' '.join(re.findall('--[a-z-]+', words)[:1])}"
        elif words.startswith("Available"):
            problem += f"; {words.lower()}"
    named = itertools.takewhile(_COMMAND_WORDS.__contains__, arguments)
    return f"{problem}: see {' '.join(['deflector', *named, '--help'])}"


def _complain(text: str, kind: str = "error") -> int:
    with contextlib.suppress(OSError):
        print(f"deflector: {kind}: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return 2


def _format_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    return f"deflector: warning: {message}\n"


def _forget_output_on_failure() -> None:
    """Writes out what is buffered for stdout; drops it if that fails, lest Python complains again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        _forget_output()


def _forget_output() -> None:
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
