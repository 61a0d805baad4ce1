"""Where an episode takes place: a cluster, its profiles turned up or down, on another link, reporting more often."""

from functools import lru_cache

from deflector.envs.cluster import ClusterFacts, ClusterSpec, parse_cluster
from deflector.envs.errors import InputError


def site(
    cluster: str | ClusterSpec,
    profile: str,
    link: str | None = None,
    *,
    scale: float = 1.0,
    slope: float | None = None,
    report_interval_s: float | None = None,
) -> tuple[ClusterSpec, ClusterFacts]:
    """A cluster and its arrays; equal ones share them.

    Args:
        cluster: As `parse_cluster` takes it, or ready: then `profile` and `link` do not matter.
        profile: Of nodes that name none.
        link: Of nodes that name none; the cluster's own if None.
        scale: Factor on the step times of all nodes.
        slope: Growth of all step times above their profiles' knees; the profiles' own if None.
        report_interval_s: Between a node's load reports; the cluster's own if None.

    Raises:
        InputError: In one line, with the remedy.
    """
    spec, facts = _built(cluster, profile, link, scale, slope)
    if report_interval_s is not None:
        spec = spec.model_copy(update={"report_interval_s": report_interval_s})
    return spec, facts


@lru_cache(maxsize=4096)
def _built(
    cluster: str | ClusterSpec, profile: str, link: str | None, scale: float, slope: float | None
) -> tuple[ClusterSpec, ClusterFacts]:
    spec = cluster if isinstance(cluster, ClusterSpec) else parse_cluster(cluster, profile=profile, link=link)
    knobs = ([f"scale={scale!r}"] if scale != 1.0 else []) + ([f"slope={slope!r}"] if slope is not None else [])
    if knobs:
        turned = [node.model_copy(update={"profile": _turned(node.profile, knobs)}) for node in spec.nodes]
        spec = spec.model_copy(update={"nodes": tuple(turned)})
    facts = spec.facts()
    if not facts.can_prefill.any():
        raise InputError(f"cluster '{spec.name}': no node can prefill for others: add a prefill or mixed node")
    return spec, facts


def _turned(profile: str, knobs: list[str]) -> str:
    base, _, own = profile.rpartition(":")
    if base and "=" in own:
        raise InputError(
            f"profile '{profile}': profile_scale and chunk_slope turn profiles without knobs of their own: name "
            f"'{base}', or leave them out"
        )
    return f"{profile}:{','.join(knobs)}"
