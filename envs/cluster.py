"""A cluster on paper: nodes and their roles, engine limits, links, faults; from YAML or a short form such as `2P2D`.

`ClusterSpec` is what people write, `ClusterFacts` the same as flat arrays that compiled code and routers read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from deflector.envs.errors import InputError
from deflector.envs.step_time import DEFAULT_PROFILE, StepTimeProfile, load_profile

MAX_NODES = 256

LINK_PRESETS: dict[str, tuple[float, float]] = {
    "nvlink": (228.2, 0.05e-3),
    "roce": (25.0, 0.05e-3),
    "inter-node": (7.8, 0.05e-3),
    "mis-routed": (1.8, 129e-3),
    "tcp": (0.5, 1e-3),
}
"""Name -> (GB/s per node and direction, set-up seconds).

nvlink: NCCL send/recv between A100s of one DGX, 64 MB. roce: 200 Gbit/s NIC. inter-node: NCCL send/recv between two
A100 DGX, one GPU each. mis-routed: NIXL 1P1D on one host over 40,064 descriptors (vllm#34054: 173.8 ms a transfer and
129 ms to post it). tcp: NIXL falling back to TCP (vllm#52607). Set-up times other than the measured 129 ms are
assumptions.
"""


class NodeRole(IntEnum):
    """What a router may send to a node."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2
    """Both: it can prefill for others and decode."""


class NodeField(IntEnum):
    """Columns of `ClusterFacts.nodes`; every value is a float64."""

    ROLE = 0
    PROFILE = 1
    """Row of `ClusterFacts.tables`."""
    MAX_BATCHED_TOKENS = 2
    MAX_SEQS = 3
    BLOCK_SIZE = 4
    KV_BLOCKS = 5
    EGRESS_BYTES_PER_S = 6
    INGRESS_BYTES_PER_S = 7
    LINK_SETUP_S = 8
    KV_BYTES_PER_TOKEN = 9
    SLOWNESS = 10
    NOISE_SIGMA = 11
    DRIFT_PER_S = 12
    PREFIX_CACHING = 13
    """1.0: prompts share blocks of equal contents."""


class _Strict(BaseModel):
    """Refuses unknown keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Link = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
"""Name of a link preset, or GB/s; a number in YAML is as good as its text."""


class NodeSpec(_Strict):
    """One engine, or `count` equal ones."""

    role: Literal["prefill", "decode", "mixed"]
    count: int = Field(1, ge=1, le=MAX_NODES)
    profile: str = DEFAULT_PROFILE
    max_num_batched_tokens: int | None = Field(None, ge=1, le=131072)
    """Token budget of a step; vLLM's default for online serving, 2048, where it decodes, 8192 on a prefill node."""
    max_num_seqs: int = Field(256, ge=1, le=4096)
    block_size: Literal[1, 2, 4, 8, 16, 32, 64, 128] = 16
    kv_blocks: int | None = Field(None, ge=1)
    """KV capacity in blocks; the profile's own by default."""
    link: Link | None = None
    """Name of a link preset, or GB/s as a number; the cluster's by default."""
    slowness: float = Field(1.0, gt=0, le=100)
    noise_sigma: float = Field(0.0, ge=0, le=2)
    drift_per_s: float = Field(0.0, ge=0, le=1)
    prefix_caching: bool = False
    """Prompts share KV blocks of equal contents, as far as the workload names them (`Workload.prefix_ids`)."""

    @property
    def token_budget(self) -> int:
        """Tokens that one step may hold."""
        return self.max_num_batched_tokens or (8192 if self.role == "prefill" else 2048)


class Fault(_Strict):
    """Something that happens to a node at a time."""

    at_s: float = Field(ge=0)
    node: int = Field(ge=0)
    kind: Literal["die", "return", "slow", "silence", "speak"]
    slowness: float = Field(1.0, gt=0, le=100)
    """For `slow`: the node's new factor on step times."""


class ClusterSpec(_Strict):
    """A whole cluster. Node ids are positions after `count` is expanded."""

    nodes: tuple[NodeSpec, ...] = Field(min_length=1)
    link: Link = "inter-node"
    report_interval_s: float = Field(0.1, ge=0, le=60)
    report_loss: float = Field(0.0, ge=0, lt=1)
    """Probability that a load report is lost."""
    faults: tuple[Fault, ...] = ()
    on_death: Literal["fail", "retry"] = "retry"
    name: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        expanded = self.expanded_nodes
        if len(expanded) > MAX_NODES:
            raise ValueError(f"{len(expanded)} nodes are more than the {MAX_NODES} supported")
        if not any(node.role in ("decode", "mixed") for node in expanded):
            raise ValueError("no node can decode: add one with role decode or mixed")
        for fault in self.faults:
            if fault.node >= len(expanded):
                last = len(expanded) - 1
                raise ValueError(f"fault at {fault.at_s} s names node {fault.node}, the last one is {last}")
        for node in expanded:
            link_speed(node.link or self.link)
        return self

    @property
    def expanded_nodes(self) -> list[NodeSpec]:
        """One entry per engine."""
        return [node for node in self.nodes for _ in range(node.count)]

    def facts(self) -> "ClusterFacts":
        """The same as arrays.

        Raises:
            InputError: If a profile is unknown or broken.
        """
        nodes = self.expanded_nodes
        names = list(dict.fromkeys(node.profile for node in nodes))
        profiles = [load_profile(name) for name in names]
        longest = max(node.token_budget + node.max_num_seqs for node in nodes)
        rows = np.zeros((len(nodes), len(NodeField)))
        for row, node in zip(rows, nodes, strict=True):
            index = names.index(node.profile)
            gigabytes_per_s, setup_s = link_speed(node.link or self.link)
            row[NodeField.ROLE] = NodeRole[node.role.upper()]
            row[NodeField.PROFILE] = index
            row[NodeField.MAX_BATCHED_TOKENS] = node.token_budget
            row[NodeField.MAX_SEQS] = node.max_num_seqs
            row[NodeField.BLOCK_SIZE] = node.block_size
            row[NodeField.KV_BLOCKS] = node.kv_blocks or profiles[index].kv_tokens_capacity // node.block_size
            row[NodeField.EGRESS_BYTES_PER_S] = row[NodeField.INGRESS_BYTES_PER_S] = gigabytes_per_s * 1e9
            row[NodeField.LINK_SETUP_S] = setup_s
            row[NodeField.KV_BYTES_PER_TOKEN] = profiles[index].kv_bytes_per_token
            row[NodeField.SLOWNESS] = node.slowness
            row[NodeField.NOISE_SIGMA] = node.noise_sigma
            row[NodeField.DRIFT_PER_S] = node.drift_per_s
            row[NodeField.PREFIX_CACHING] = node.prefix_caching
        return ClusterFacts(rows, np.stack([profile.table(longest) for profile in profiles]), tuple(profiles))


@dataclass(frozen=True, slots=True, eq=False)
class ClusterFacts:
    """What never changes about a cluster, as arrays; equal to itself alone.

    Attributes:
        nodes: (num_nodes, len(NodeField)) float64.
        tables: (num_profiles, length) float64, one `StepTimeProfile.table` per row.
        profiles: The profiles behind `tables`.
    """

    nodes: npt.NDArray[np.float64]
    tables: npt.NDArray[np.float64]
    profiles: tuple[StepTimeProfile, ...]

    @property
    def num_nodes(self) -> int:
        """Number of engines."""
        return len(self.nodes)

    @property
    def kv_tokens_capacity(self) -> npt.NDArray[np.float64]:
        """KV tokens that each node can hold."""
        capacity: npt.NDArray[np.float64] = self.nodes[:, NodeField.KV_BLOCKS] * self.nodes[:, NodeField.BLOCK_SIZE]
        return capacity

    @property
    def can_prefill(self) -> npt.NDArray[np.bool_]:
        """Nodes that may prefill for others."""
        return self.nodes[:, NodeField.ROLE] != NodeRole.DECODE

    @property
    def can_decode(self) -> npt.NDArray[np.bool_]:
        """Nodes that may decode."""
        return self.nodes[:, NodeField.ROLE] != NodeRole.PREFILL

    @property
    def longest_prompt_and_output_tokens(self) -> int:
        """KV tokens of the largest node that decodes: nothing longer can ever finish."""
        return int(self.kv_tokens_capacity[self.can_decode].max())


def link_speed(name: str) -> tuple[float, float]:
    """(GB/s, set-up seconds) of a preset's name, a number of GB/s, or both as in `0.9+12ms`.

    Raises:
        ValueError: If it is neither.
    """
    if name in LINK_PRESETS:
        return LINK_PRESETS[name]
    speed, plus, setup = name.partition("+")
    try:
        gigabytes_per_s = float(speed)
        setup_s = float(setup.removesuffix("ms")) * 1e-3 if plus else 0.05e-3
    except ValueError:
        gigabytes_per_s, setup_s = 0.0, 0.0
    if not 0 < gigabytes_per_s < float("inf") or not 0 <= setup_s < 60:
        presets = ", ".join(LINK_PRESETS)
        raise ValueError(f"link '{name}' is neither a speed in GB/s, such as 7.8 or 0.9+12ms, nor one of {presets}")
    return gigabytes_per_s, setup_s


def parse_cluster(text: str, *, profile: str | None = None, link: str | None = None) -> ClusterSpec:
    """Reads `2P2D` (prefill and decode nodes), `3M` (mixed nodes), or the path of a YAML file.

    Args:
        text: Short form or path.
        profile: Step-time profile of every node that names none; the default one if None.
        link: Link of every node that names none; the spec's own if None.

    Raises:
        InputError: With the reason in one line.
    """
    match = re.fullmatch(r"(?:(\d+)P)?(?:(\d+)D)?(?:(\d+)M)?", text, flags=re.IGNORECASE)
    if match and text:
        counts = zip(("prefill", "decode", "mixed"), match.groups(), strict=True)
        raw: object = {"nodes": [{"role": role, "count": int(n)} for role, n in counts if n and int(n)], "name": text}
    elif Path(text).suffix in (".yaml", ".yml"):
        raw = _read_yaml(Path(text))
    else:
        raise InputError(f"cluster '{text}': write it as 2P2D (prefill, decode), 4M (mixed), or name a .yaml file")
    if isinstance(raw, dict):
        raw.setdefault("name", Path(text).stem)
        if link is not None:
            raw.setdefault("link", link)
        if profile is not None and isinstance(raw.get("nodes"), Sequence):
            raw["nodes"] = [{"profile": profile, **node} if isinstance(node, dict) else node for node in raw["nodes"]]
    try:
        spec = ClusterSpec.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(f"cluster '{text}'{': ' + where if where else ''}: {what}") from error
    if not any(node.role in ("prefill", "mixed") for node in spec.nodes):
        raise InputError(f"cluster '{text}': no node can prefill for others: add one with role prefill or mixed")
    models = sorted({load_profile(node.profile).model for node in spec.nodes})
    if len(models) > 1:
        raise InputError(f"cluster '{text}': KV cannot move between {' and '.join(models)}: use profiles of one model")
    return spec


def _read_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cluster file {path}: {' '.join(str(error).split())}") from error
