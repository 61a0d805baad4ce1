"""The flags of `deflector cluster`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

# Nothing heavy: `deflector --help` reads this.

_TEXT = {"help_behavior_hint": ""}

Kind = Literal["gpu", "cpu", "emulated"]


@dataclass(frozen=True)
class Up:
    """Start prefill and decode engines on this machine, wait until they are healthy, and leave them running.

    emulated: real vLLM servers whose steps take a profile's time instead of computing; 20 s and 1 GB per engine.
    cpu: real vLLM on the CPU with a random model of 5 million parameters and NIXL; 40 s and 2.5 GB per engine.
    gpu: vLLM as it is installed, one GPU per engine.

    The first two install what they need into an environment of their own on first use: 2.7 GB, two minutes.

    For example:

    deflector cluster up --kind emulated 2P2D

    deflector cluster up --kind gpu --model meta-llama/Llama-3.1-8B-Instruct --profile h100-llama-3.1-8b 1P3D
    """

    spec: Annotated[Positional[str], arg(metavar="CLUSTER")]
    """Prefill and decode engines such as 2P2D, or a cluster's .yaml file."""
    kind: Annotated[Kind, arg(**_TEXT)] = "emulated"
    """What stands behind an engine. (default: emulated)"""
    name: Annotated[str, arg(metavar="NAME", **_TEXT)] = "default"
    """Of the cluster, where there are several. (default: default)"""
    profile: Annotated[str | None, arg(metavar="NAME", **_TEXT)] = None
    """Step-time profile of engines that name none: what emulated ones take for their steps, and what the router and
    the engines predict with."""
    slowdown: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 1 per two engines)")] = None
    """Emulated engines take so many times as long as the profile says, so that this machine keeps up."""
    model: Annotated[str | None, arg(metavar="NAME", **_TEXT)] = None
    """Model of gpu engines: a name at Hugging Face, or a folder."""
    layers: Annotated[int, arg(metavar="N", **_TEXT)] = 4
    """Of the cpu kind's model. With more of them, computing takes up more of the time, and serving less: 16 suit a
    machine whose few cores do both. (default: 4)"""
    max_model_len: Annotated[int, arg(metavar="N", **_TEXT)] = 32768
    """Longest prompt and output together. (default: 32768)"""
    step_log: Annotated[bool, arg(**_TEXT)] = False
    """Record every step of every engine as JSON lines, beside the logs."""
    engine_flag: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FLAG", **_TEXT)] = ()
    """Passed on to every engine, such as --engine-flag=--gpu-memory-utilization=0.8; may be given several times."""
    python: Annotated[str | None, arg(metavar="PATH", **_TEXT)] = None
    """Python of an environment that has vLLM, instead of one of our own (gpu: this one)."""
    environment: Annotated[str | None, arg(metavar="DIR", **_TEXT)] = None
    """Where our own environment is, or is to be; by default in your cache folder."""
    timeout_s: Annotated[float, arg(metavar="SECONDS", **_TEXT)] = 300.0
    """How long engines may take to become healthy. (default: 300)"""
    foreground: Annotated[bool, arg(**_TEXT)] = False
    """Stay, and take the cluster down at Ctrl-C."""


@dataclass(frozen=True)
class Status:
    """Show what runs.

    For example:

    deflector cluster status --json status.json
    """

    name: Annotated[str | None, arg(metavar="NAME", **_TEXT)] = None
    """One cluster only."""
    json: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """Write it here."""


@dataclass(frozen=True)
class Down:
    """Take a cluster down; nothing of it keeps running.

    For example:

    deflector cluster down
    """

    name: Annotated[str, arg(metavar="NAME", **_TEXT)] = "default"
    """Which one. (default: default)"""
    all: bool = False
    """All of them."""


@dataclass(frozen=True)
class Cluster:
    """Start, show and stop vLLM engines on this machine.

    For example:

    deflector cluster up --kind emulated 2P2D

    deflector cluster status

    deflector cluster down
    """

    action: (
        Annotated[Up, subcommand("up")] | Annotated[Status, subcommand("status")] | Annotated[Down, subcommand("down")]
    )
