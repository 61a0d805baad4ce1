"""The flags of `deflector replay`."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

# Nothing heavy: `deflector --help` reads this.

_TEXT = {"help_behavior_hint": ""}


@dataclass(frozen=True)
class Replay:
    """Play a workload or a trace against a live cluster, and judge it as `evaluate` does.

    Requests leave on schedule whatever the servers do. Each policy gets a router of its own in front of the cluster's
    engines, one after the other, and the same requests. The simulator's word on the same requests stands beside it
    (--no-predict leaves it out).

    For example:

    deflector cluster up 2P2D

    deflector replay default --policies never,kairos --load 0.7 --busiest 20

    deflector replay endpoints.yaml --trace azure_code.csv.gz --rate 2 --policies kairos,learned --seeds 0-2

    deflector replay endpoints.yaml --url http://127.0.0.1:8000 --rate 3
    """

    cluster: Annotated[Positional[str], arg(metavar="CLUSTER", help_behavior_hint="(default: default)")] = "default"
    """A cluster that `deflector cluster up` has started, by its name, or the .yaml file of `deflector serve
    --config`."""
    url: Annotated[str | None, arg(metavar="URL", **_TEXT)] = None
    """Send everything to this router (or engine), which runs already, with the policy that it has."""
    api_key: Annotated[str | None, arg(metavar="KEY", **_TEXT)] = None
    """Sent as a bearer token to --url."""
    policies: Annotated[str, arg(metavar="NAME[,NAME...]", help_behavior_hint="(default: never,kairos)")] = (
        "never,kairos"
    )
    """Policies, each with its parameters, learned:PATH among them: see `deflector policies`."""
    baseline: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: never, else the first policy)")
    ] = None
    """Policy that the others are compared with."""
    workload: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: long_tail_burst)")] = None
    """Generated workload: see `deflector evaluate --help`."""
    trace: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """A real trace in the place of --workload: Azure, Mooncake, BurstGPT or plain CSV, also gzipped."""
    load: Annotated[float | None, arg(metavar="X", help_behavior_hint="(default: 0.7; a trace's own speed)")] = None
    """Rate as a share of the saturation of the cluster that the file describes, by the simulator."""
    rate: Annotated[float | None, arg(metavar="R", **_TEXT)] = None
    """Rate in requests/s, in the place of --load; a trace is stretched in time to it."""
    duration: Annotated[
        float | None, arg(metavar="SECONDS", help_behavior_hint="(default: 60; with --busiest 600, or a whole trace)")
    ] = None
    """Arrivals stop after so long; every request is then waited for."""
    busiest: Annotated[float | None, arg(metavar="SECONDS", **_TEXT)] = None
    """Of all that, play the stretch of so many seconds with the most prompt tokens: a burst without the wait for it."""
    warmup: Annotated[float, arg(metavar="SECONDS", help_behavior_hint="(default: 0)")] = 0.0
    """Requests that arrive earlier are sent and not counted."""
    seeds: Annotated[str, arg(metavar="N[-N][,...]", help_behavior_hint="(default: 0)")] = "0"
    """Seeds, as numbers and ranges: each is one more run of every policy."""
    slo_ttft: Annotated[str | None, arg(metavar="SPEC", help_behavior_hint="(default: the file's)")] = None
    """TTFT SLO: seconds such as 2.0, a multiple of the prompt's isolated prefill time such as 4x, or their sum."""
    slo_tbt: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: the file's)")] = None
    """SLO on the P99 of a request's gaps between tokens."""
    timeout: Annotated[float, arg(metavar="SECONDS", help_behavior_hint="(default: 600)")] = 600.0
    """A request that has not ended after so long has failed."""
    predict: bool = True
    """Simulate the same requests on the same cluster, and compare."""
    json: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """Write every figure here. A command that is stopped goes on where it was when it is given again."""
    plots: Annotated[str | None, arg(metavar="DIR", **_TEXT)] = None
    """Write pictures (PNG) into this folder."""
