"""The flags of `deflector train`: short names for what is changed most, and a way to every other key."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from deflector.training.settings import default

_FROM_CONFIG = default("the configuration's")


@dataclass(frozen=True)
class Train:
    """Train a routing policy in the simulator.

    A network that scores every node, trained by MaskablePPO (or PPO, A2C), or by CMA-ES, which also tunes an analytical
    policy's parameters. One configuration says everything: defaults, then --preset or --config, then flags. The run's
    folder holds it, the learning curve, checkpoints, and the exported policies best/ and latest/, which `deflector
    evaluate --policies learned:DIR` takes. A run that was killed goes on with --resume as if nothing had happened.

    A checkpoint (.zip) is stable-baselines3's own and can hold code: it is read by --resume and `deflector export`
    alone, and of it only the tensors. Share exported policies, not checkpoints.

    For example:

    deflector train --workload all --load 0.5-1.1 --decisions 5000000 --out runs/first

    deflector train --teacher slo_price --set on_policy.epochs=4 validation.patience=5 --out runs/second

    deflector train --print-config > train.yaml

    deflector train --preset shipped --out runs/shipped
    """

    config: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """YAML; --print-config shows every key."""
    preset: Annotated[Literal["shipped"] | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """shipped: the configuration of the policy that comes with the package, `learned`."""
    out: Annotated[str | None, arg(metavar="DIR", help_behavior_hint=default("runs/ALGORITHM-seedN"))] = None
    """The run's folder."""
    resume: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Go on with a run from its newest checkpoint, by its own configuration."""
    algorithm: Annotated[
        Literal["maskable_ppo", "ppo", "a2c", "evolution"] | None, arg(help_behavior_hint=default("maskable_ppo"))
    ] = None
    """What learns."""
    decisions: Annotated[int | None, arg(metavar="N", help_behavior_hint=default("2,000,000"))] = None
    """Routing decisions to learn from."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint=default("0"))] = None
    """The same seed gives the same policy, bit for bit, on one thread."""
    lanes: Annotated[int | None, arg(metavar="N", help_behavior_hint=default("256"))] = None
    """Clusters simulated side by side."""
    cluster: Annotated[str | None, arg(metavar="NAME[,NAME...]", help_behavior_hint=default("2P2D"))] = None
    """Clusters; each episode has one of them."""
    profile: Annotated[str | None, arg(metavar="NAME[,NAME...]", help_behavior_hint=_FROM_CONFIG)] = None
    """Step-time profiles: see `deflector profile list`."""
    workload: Annotated[str | None, arg(metavar="NAME[,NAME...]", help_behavior_hint=default("all"))] = None
    """Generated workloads, or all."""
    load: Annotated[str | None, arg(metavar="X or X-Y", help_behavior_hint=default("0.5-1.1"))] = None
    """Arrival rate as a share of the cluster's saturation; each episode draws its own between the two."""
    slo_ttft: Annotated[str | None, arg(metavar="SPEC", help_behavior_hint=default("0.25+4x"))] = None
    """TTFT SLO: seconds, a multiple of the isolated prefill, or their sum."""
    slo_tbt: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint=default("0.1"))] = None
    """SLO on the P99 of a request's gaps between tokens."""
    teacher: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Imitate this policy first: see `deflector policies`."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE [...]", help_behavior_hint="")] = ()
    """Any other key, such as on_policy.learning_rate=5e-4."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Also show the run there. wandb without a key works offline."""
    print_config: bool = False
    """Print the whole configuration as YAML, and do nothing else."""
    json: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write what came of it here."""

    def changes(self) -> list[str]:
        """The flags as `KEY=VALUE`, --set last."""
        named = {
            "algorithm": self.algorithm,
            "decisions": self.decisions,
            "seed": self.seed,
            "lanes": self.lanes,
            "scenario.cluster": _listed(self.cluster),
            "scenario.profile": _listed(self.profile),
            "scenario.workload": _listed(self.workload),
            "scenario.load": None if self.load is None else f"[{self.load.replace('-', ', ')}]",
            "scenario.slo_ttft": _listed(self.slo_ttft),
            "scenario.slo_tbt_s": self.slo_tbt,
            "warm_start.teacher": self.teacher,
        }
        return [f"{key}={value}" for key, value in named.items() if value is not None] + list(self.set)


def _listed(text: str | None) -> str | None:
    return None if text is None else "[" + ", ".join(f"'{part}'" for part in text.split(",")) + "]"
