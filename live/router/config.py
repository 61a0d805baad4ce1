"""What a router is told: its engines, its policy, the SLOs by default, limits and timeouts; strict YAML."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from deflector.envs.cluster import ClusterFacts, ClusterSpec, Link, NodeSpec, link_speed
from deflector.envs.errors import InputError
from deflector.envs.slo import SloSpec
from deflector.envs.step_time import DEFAULT_PROFILE, load_profile


def _checked_url(text: str) -> str:
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise ValueError(f"'{text}' is no address of an engine: write it as http://127.0.0.1:8100")
    return text.rstrip("/")


def _checked_link(name: str | None) -> str | None:
    if name is not None:
        link_speed(name)
    return name


def _checked_slo(text: str) -> str:
    SloSpec.parse(text)
    return text


class _Strict(BaseModel):
    """Refuses unknown keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LiveNode(NodeSpec):
    """One vLLM engine: what `envs.cluster.NodeSpec` says of it, and where it is."""

    count: Literal[1] = 1
    url: Annotated[str, AfterValidator(_checked_url)]
    """Such as http://127.0.0.1:8100; paths like /v1/completions are added."""
    api_key: SecretStr | None = None
    """Sent to the engine as a bearer token."""


class Slos(_Strict):
    """What a request is promised that brings no SLO headers of its own."""

    ttft: Annotated[str, AfterValidator(_checked_slo)] = "0.25+4x"
    """Seconds such as 2.0, a multiple of the prompt's isolated prefill time such as 4x, or their sum."""
    tbt_s: float = Field(0.1, gt=0, le=3600)


class Limits(_Strict):
    """What keeps the router's memory and its work bounded."""

    body_bytes: int = Field(32 << 20, ge=1024, le=1 << 30)
    """Longest request body; longer ones are answered 413."""
    answer_bytes: int = Field(64 << 20, ge=1024, le=1 << 30)
    """Longest answer of an engine that is not streamed."""
    header_bytes: int = Field(16384, ge=1024, le=1 << 20)
    """Longest header line."""
    requests: int = Field(1024, ge=1, le=100_000)
    """Requests in flight; more are answered 429."""
    attempts: int = Field(4, ge=1, le=16)
    """Tries of one request before its client hears of a failure."""


class Timeouts(_Strict):
    """Seconds, each for one stage of one request."""

    body_s: float = Field(30.0, gt=0, le=3600)
    """The client's body."""
    connect_s: float = Field(2.0, gt=0, le=600)
    """A connection to an engine."""
    first_byte_s: float = Field(120.0, gt=0, le=3600)
    """The prefill engine's answer, and the decode engine's first token."""
    idle_s: float = Field(30.0, gt=0, le=3600)
    """Between two pieces of a streamed answer."""
    answer_s: float = Field(600.0, gt=0, le=86400)
    """A whole answer that is not streamed."""
    drain_s: float = Field(120.0, ge=0, le=3600)
    """Running requests after SIGTERM."""
    health_s: float = Field(1.0, gt=0, le=60)
    """Between two health checks."""
    silence_s: float = Field(5.0, gt=0, le=600)
    """A node of which nothing at all has come for so long, a health check's answer among it, is dead."""


class RouterConfig(_Strict):
    """Everything that `deflector serve` is told."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0: any free one."""
    policy: str = "kairos"
    seed: int = Field(0, ge=0)
    profile: str = DEFAULT_PROFILE
    """Step-time profile of nodes that name none."""
    link: Annotated[Link, AfterValidator(_checked_link)] = "inter-node"
    """Link of nodes that name none."""
    nodes: tuple[LiveNode, ...] = Field(min_length=1, max_length=256)
    slo: Slos = Slos.model_validate({})
    limits: Limits = Limits.model_validate({})
    timeouts: Timeouts = Timeouts.model_validate({})
    report_interval_s: float = Field(0.1, ge=0.01, le=60)
    """Between two looks at a node's state."""
    characters_per_token: float = Field(4.0, gt=0.1, le=100)
    """To begin with; learned from the engines' own counts."""
    recalibrate_s: float | None = Field(None, ge=0.1, le=86400)
    """So often, the step times of each node's profile are scaled to what its engine reports; without it, when asked."""
    warm_pairs: bool = True
    """Moves one small prompt over every pair of prefill and decode nodes before it says that it is ready."""
    api_keys: tuple[SecretStr, ...] = Field((), max_length=1000)
    """Clients must bring one of them; without any, everybody is served."""
    admin_key: SecretStr | None = None
    """Opens POST /policy and /nodes on the router's own port to who brings it."""
    admin_port: int | None = Field(None, ge=0, le=65535)
    """Opens them on this port of 127.0.0.1 to everybody."""
    decision_log: Path | None = None
    """JSON lines, one per decision."""

    def ttft_slo(self) -> SloSpec:
        """The promise on the first token."""
        return SloSpec.parse(self.slo.ttft)


def read_config(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, unchecked.

    Raises:
        InputError: If it cannot be read, or holds something else.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: not a mapping of keys such as policy, nodes, slo")
    return raw


def checked_config(raw: dict[str, Any], where: str) -> RouterConfig:
    """A configuration from what a file and flags say.

    Raises:
        InputError: In one line that names the key; an unknown one with its neighbour.
    """
    try:
        config = RouterConfig.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {_problem(error)}") from error
    check_nodes(config, config.nodes)
    return config


def checked_node(raw: object) -> LiveNode:
    """One node, as an administrator adds it.

    Raises:
        InputError: As `checked_config`.
    """
    try:
        return LiveNode.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"node: {_problem(error)}") from error


def check_nodes(config: RouterConfig, nodes: Iterable[LiveNode]) -> None:
    """Refuses nodes that could not serve together.

    Raises:
        InputError: If none can decode, two have one address, or KV could not move between their models.
    """
    specs = list(nodes)
    if all(node.role == "prefill" for node in specs):
        raise InputError("nodes: none can decode: add one with role decode (--decode URL) or mixed")
    urls = [node.url for node in specs]
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise InputError(f"nodes: {twice[0]} is there twice")
    models = sorted({load_profile(profile_of(node, config)).model for node in specs})
    if len(models) > 1:
        raise InputError(f"nodes: KV cannot move between {' and '.join(models)}: use profiles of one model")


def profile_of(node: LiveNode, config: RouterConfig) -> str:
    """The name of a node's profile."""
    return node.profile if "profile" in node.model_fields_set else config.profile


def facts_of(config: RouterConfig, nodes: Iterable[LiveNode]) -> ClusterFacts:
    """The arrays that policies read, one row per node in this order."""
    return cluster_of(config, nodes).facts()


def cluster_of(config: RouterConfig, nodes: Iterable[LiveNode]) -> ClusterSpec:
    """The cluster that these nodes make, as the simulator takes it."""
    plain = [
        NodeSpec.model_validate(
            node.model_dump(exclude={"url", "api_key"})
            | {"profile": profile_of(node, config), "link": node.link or config.link}
        )
        for node in nodes
    ]
    roles = [node.role for node in plain]
    name = "".join(f"{roles.count(role)}{role[0].upper()}" for role in ("prefill", "decode", "mixed") if role in roles)
    return ClusterSpec.model_validate(
        {"nodes": plain, "link": config.link, "report_interval_s": config.report_interval_s, "name": name}
    )


def _problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.3)
        hint = f"perhaps you meant {near[0]}" if near else f"known are {', '.join(known)}"
        return f"{where}: no such key; {hint}"
    return f"{where or 'configuration'}: {first['msg'].removeprefix('Value error, ')}"


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """The keys that a mapping at this place of the configuration may have."""
    parts: dict[str, type[BaseModel]] = {"slo": Slos, "limits": Limits, "timeouts": Timeouts, "nodes": LiveNode}
    model: type[BaseModel] = RouterConfig
    if place:
        model = parts.get(str(place[0]), LiveNode)
    return [key for key in model.model_fields if not (model is LiveNode and key == "count")]
