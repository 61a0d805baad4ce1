"""What `deflector evaluate`, `saturation` and `export` are asked: the flags as written, and readers of their lists."""

import math
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from deflector.envs.errors import InputError

MOST_SEEDS = 10_000


def default(text: str) -> str:
    """What `--help` shows in the place of a default."""
    return f"(default: {text})"


@dataclass(frozen=True)
class World:
    """Which clusters under which requests."""

    cluster: Annotated[str, arg(metavar="NAME[,NAME...]")] = "2P2D"
    """2P2D means two prefill and two decode nodes, 4M four mixed ones; or the path of a .yaml file."""
    profile: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=default("a100-deepseek-v2-lite"))] = None
    """Step-time profile of nodes that name none: see `deflector profile list`; or the path of a .json file."""
    link: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=default("inter-node, 7.8 GB/s"))] = None
    """Link between nodes: nvlink, roce, inter-node, mis-routed, tcp, or a number of GB/s."""
    workload: Annotated[str | None, arg(metavar="NAME[,...]", help_behavior_hint=default("long_tail_burst"))] = None
    """Generated workloads: low_prefill_low_decode, low_prefill_high_decode, high_prefill_low_decode,
    high_prefill_high_decode, long_tail_burst, poisson_control; or all for these six."""
    trace: Annotated[tuple[str, ...], arg(metavar="FILE [FILE...]", help_behavior_hint="")] = ()
    """Real traces in the place of --workload: Azure, Mooncake, BurstGPT or plain CSV, also gzipped."""


@dataclass(frozen=True)
class Evaluate(World):
    """Compare routing policies on the same requests, with 95 % intervals over paired seeds.

    A cell is a cluster x workload x load; every policy runs every seed of every cell, and all policies of a seed see
    the same requests. The table shows, per cell, the share of requests that met both SLOs, the change of P95 TTFT
    against the baseline, and what that P95 is made of.

    For example:

    deflector evaluate --workload long_tail_burst --load 0.7 --policies never,kairos,least_ttft --seeds 0-9

    deflector evaluate --trace azure_code.csv.gz --rate 2,4,8 --cluster 2P2D,1P3D --json out.json --plots plots
    """

    load: Annotated[str | None, arg(metavar="X[,X...]", help_behavior_hint=default("0.7; a trace's own speed"))] = None
    """Rates as shares of the cell's saturation: see `deflector saturation`."""
    rate: Annotated[str | None, arg(metavar="R[,R...]", help_behavior_hint="")] = None
    """Rates in requests/s, in the place of --load; a trace is stretched in time to each."""
    policies: Annotated[str, arg(metavar="NAME[,NAME...]")] = "never,kairos,least_ttft,conditional,slo_price"
    """Policies, each with its parameters, such as kairos:alpha=1.0,beta=0.5: see `deflector policies`."""
    baseline: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=default("never, else the first policy"))] = (
        None
    )
    """Policy that the others are compared with."""
    seeds: Annotated[str, arg(metavar="N[-N][,...]")] = "0-9"
    """Seeds, as numbers and ranges."""
    slo_ttft: Annotated[str, arg(metavar="SPEC")] = "0.25+4x"
    """TTFT SLO: seconds such as 2.0, a multiple of the prompt's isolated prefill time such as 4x, or their sum."""
    slo_tbt: Annotated[float, arg(metavar="SECONDS")] = 0.1
    """SLO on the P99 of a request's gaps between tokens."""
    duration: Annotated[
        float | None, arg(metavar="SECONDS", help_behavior_hint=default("600; a trace's whole length"))
    ] = None
    """Arrivals stop after so long; every request is then played to its end."""
    warmup: Annotated[float, arg(metavar="SECONDS")] = 60.0
    """Requests that arrive earlier are simulated and not counted."""
    report_interval: Annotated[
        float | None, arg(metavar="SECONDS", help_behavior_hint=default("0.1, or the .yaml file's"))
    ] = None
    """Time between a node's load reports; 0 gives the router exact knowledge."""
    decision_timing: bool = True
    """Measure the time that a decision takes, for --json."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write every figure here; null stands for an infinite one, or none. A command that is killed goes on where it was
    when it is given again."""
    plots: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Write pictures (PNG) into this folder."""
    jobs: Annotated[int | None, arg(metavar="N", help_behavior_hint=default("all cores"))] = None
    """Threads."""


@dataclass(frozen=True)
class Saturation(World):
    """Find the highest rate at which always-disaggregate keeps its queues bounded.

    Loads of `deflector evaluate` are shares of this rate. It is found in the simulator by bisection, in about a second,
    and cached.

    For example:

    deflector saturation --cluster 2P2D,1P3D --workload all
    """

    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the rates here."""


@dataclass(frozen=True)
class Export:
    """Make a policy that routers and evaluations take, of a checkpoint of a training run.

    SOURCE is a run's folder, whose newest checkpoint is taken, or a checkpoint's .zip. A checkpoint can hold code: it
    is read for its tensors only, its code is never run, and no command but train and export reads one at all. The
    policy is a folder of two files that cannot hold code (policy.safetensors, policy.json) and need no torch; it routes
    clusters of any size.

    For example:

    deflector export runs/first --out my-policy

    deflector evaluate --policies never,kairos,learned:my-policy
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A run's folder, or a .zip among its checkpoints with its .json beside it."""
    out: Annotated[str, arg(metavar="DIR")]
    """Folder of the policy; one that is there already is replaced."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write what was exported here: checkpoint, size, hashes."""


@dataclass(frozen=True)
class Judge:
    """Say what policies gain and lose, from runs that `deflector evaluate --json` has written.

    The first file is the suite; every other one asks whether the gain holds elsewhere: other sizes, hardware, traces.
    Policies are compared on the runs that both have played, with 95 % intervals bootstrapped over runs. Verdicts are
    held against the goals of this project: see docs/evaluation.md.

    For example:

    deflector evaluate --workload all --load 0.7,0.95 --policies kairos,slo_price,learned --seeds 0-4 --json suite.json

    deflector judge suite.json --candidates learned
    """

    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE [FILE...]")]
    """Files of deflector evaluate --json."""
    candidates: Annotated[str, arg(metavar="NAME[,NAME...]")] = "learned"
    """Policies to be judged."""
    reference: Annotated[str, arg(metavar="NAME")] = "kairos"
    """Policy that gains are counted from."""
    rivals: Annotated[
        str | None, arg(metavar="NAME[,NAME...]", help_behavior_hint=default("the analytical ones in the files"))
    ] = None
    """Policies of which the best in each cell, chosen with hindsight, is what regret is measured against."""
    oracle: Annotated[str, arg(metavar="NAME")] = "oracle_lookahead"
    """Policy that knows the future, where it has played."""
    decode_bound: Annotated[str, arg(metavar="NAME[,NAME...]")] = "low_prefill_high_decode"
    """Workloads in which decode is what binds."""
    cells: bool = False
    """Also show every cell."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write every figure here."""


def read_numbers(text: str, flag: str) -> list[float]:
    """Reads `0.5,0.7` as positive numbers, in their order and once each.

    Raises:
        InputError: Naming the flag.
    """
    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise InputError(f"{flag} {text}: '{part}' is not a positive number: write it as 0.5,0.7")
        numbers.append(number)
    return list(dict.fromkeys(numbers))


def read_seeds(text: str) -> list[int]:
    """Reads `0-4,7` as 0, 1, 2, 3, 4, 7.

    Raises:
        InputError: If it is no list of numbers and ranges.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(f"--seeds {text}: '{part}' is neither a number nor a range: write it as 0-9 or 0,3,7")
        if int(last or first) - int(first) >= MOST_SEEDS:
            raise InputError(f"--seeds {text}: '{part}' is more than {MOST_SEEDS:,} seeds: use fewer")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))
