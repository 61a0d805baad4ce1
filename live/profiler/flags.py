"""The flags of `deflector profile measure`."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

# Nothing heavy: `deflector --help` reads this.

_TEXT = {"help_behavior_hint": ""}


@dataclass(frozen=True)
class Measure:
    """Measure a running engine's step times and its link, and write the profile.

    Drives the engine with the largest token budget over chunks, contexts, batches and KV through its public API, and
    reads the plugin's step log; a fifth of the experiments is kept to judge the fit by, and later ones go where it is
    poor. Then prompts are moved from a prefill to a decode engine, for the link's speed and set-up time. The engines
    must record their steps (deflector cluster up --step-log), and nobody else may use them meanwhile.

    What is measured is kept in --folder as it comes: the same command goes on where it was stopped.

    For example:

    deflector cluster up --kind cpu --step-log 1P1D

    deflector profile measure default --minutes 5 --json mine.json --endpoints mine.yaml --plots plots

    deflector replay mine.yaml --workload poisson_control --rate 2
    """

    cluster: Annotated[Positional[str], arg(metavar="CLUSTER", help_behavior_hint="(default: default)")] = "default"
    """A cluster that `deflector cluster up` has started, by its name, or the .yaml file of `deflector serve
    --config`."""
    minutes: Annotated[float, arg(metavar="X", help_behavior_hint="(default: 5)")] = 5.0
    """Time for the experiments; the first 25 are made in any case."""
    name: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: measured)")] = "measured"
    """What to call the profile."""
    gpu: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: this machine's processor)")] = ""
    """What the engines run on."""
    kv_bytes_per_token: Annotated[
        float | None, arg(metavar="X", help_behavior_hint="(default: from the model's config.json)")
    ] = None
    """Bytes of KV cache per token, over all tensor-parallel ranks."""
    company: bool = False
    """Keep the other engines busy meanwhile: where engines share a machine's cores, they slow each other down,
    and one that is measured alone looks faster than it will be."""
    link: bool = True
    """Measure transfers between a prefill engine and the decode engine, where there are both."""
    folder: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="(default: NAME.campaign)")] = None
    """Where experiments are kept."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: NAME.json)")] = None
    """Write the profile here; `--profile FILE` takes it."""
    endpoints: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """Write the cluster's .yaml with the measured profile and link here, for `serve` and `replay`."""
    plots: Annotated[str | None, arg(metavar="DIR", **_TEXT)] = None
    """Write pictures (PNG) into this folder: measured against fitted, and the link."""
    seed: Annotated[int, arg(metavar="N", help_behavior_hint="(default: 0)")] = 0
    """Chooses the experiments."""
