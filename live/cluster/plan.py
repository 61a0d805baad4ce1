"""What a cluster is made of before it runs: engines with their commands, environments, ports and addresses."""

import json
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deflector.envs.cluster import ClusterSpec, NodeSpec, link_speed
from deflector.envs.errors import InputError
from deflector.envs.step_time import load_profile, rescaled
from deflector.live.cluster.flags import Up
from deflector.live.cluster.random_model import write_random_model
from deflector.live.vllm_plugin.emulated_model import write_emulated_model
from deflector.live.vllm_plugin.emulated_platform import EMULATED_VARIABLE, PORT_VARIABLE
from deflector.live.vllm_plugin.quiet_nixl import PAUSE_VARIABLE

SCHEDULER = "deflector.live.vllm_plugin.scheduler.DeflectionScheduler"
EXECUTOR = "deflector.live.vllm_plugin.emulated_executor.EmulatedExecutor"
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its name, vLLM would replace it on CPUs: a worker of its own and the engine then spin, waiting for each other."""
CONNECTOR = "deflector.live.vllm_plugin.emulated_connector"
MODEL_NAMES = {"cpu": "random-llama", "emulated": "emulated"}
CPU_MODEL_LEN = 16384

_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_NIXL_KEPT = {"kv_buffer_device": "cpu"}


@dataclass(frozen=True)
class Engine:
    """One engine to be started.

    Attributes:
        role: prefill, decode or mixed.
        number: Position in the cluster.
        url: Where it will answer.
        command: Its command line.
        variables: Added to its environment.
        log: File of what it says.
        node: What the router is told of it, url and role aside.
    """

    role: str
    number: int
    url: str
    command: list[str]
    variables: dict[str, str]
    log: str
    node: dict[str, Any]

    @property
    def name(self) -> str:
        """Such as prefill-0."""
        return f"{self.role}-{self.number}"


class Ports:
    """Free TCP ports of 127.0.0.1, kept for who asked: bound, with SO_REUSEPORT as vLLM's servers bind them, too."""

    def __init__(self) -> None:
        """None yet."""
        self._sockets: list[socket.socket] = []

    def take(self) -> int:
        """One more."""
        kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(("127.0.0.1", 0))
        self._sockets.append(kept)
        return int(kept.getsockname()[1])

    def release(self) -> None:
        """Gives them back."""
        for kept in self._sockets:
            kept.close()


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that were free for TCP and UDP a moment ago."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            tcp.bind(("127.0.0.1", 0))
            port = int(tcp.getsockname()[1])
            try:
                udp.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports


def make_plan(flags: Up, spec: ClusterSpec, python: str, folder: Path, ports: Ports) -> list[Engine]:
    """Every engine of a cluster, in the order of its nodes.

    Args:
        flags: What the user asks for.
        spec: The cluster.
        python: Of the environment that has vLLM.
        folder: Of the cluster: logs and models go there.
        ports: Where the engines will listen.

    Raises:
        InputError: If the flags do not go with the kind.
    """
    if flags.kind == "gpu" and flags.model is None:
        raise InputError("--kind gpu serves a model: name it with --model, such as meta-llama/Llama-3.1-8B-Instruct")
    if not 1 <= flags.layers <= 256:
        raise InputError(f"--layers {flags.layers}: give a number from 1 to 256")
    if flags.kind != "gpu" and flags.model is not None:
        raise InputError(f"--model: --kind {flags.kind} brings its own")
    nodes = spec.expanded_nodes
    slowdown = slowdown_of(flags, len(nodes))
    sides = free_ports(len(nodes))
    engines = []
    for number, node in enumerate(nodes):
        port = ports.take()
        log = str(folder / "logs" / f"{node.role}-{number}.log")
        steps = str(folder / "logs" / f"{node.role}-{number}.steps.jsonl") if flags.step_log else None
        place = _Place(number, sides[number], folder, node.link or spec.link, slowdown, steps)
        arguments, variables, facts = _KINDS[flags.kind](flags, node, place)
        command = [
            python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
            "--max-num-batched-tokens", str(node.token_budget), "--max-num-seqs", str(node.max_num_seqs),
            "--disable-uvicorn-access-log", *arguments, *flags.engine_flag,
        ]  # fmt: skip
        limits = {"max_num_batched_tokens": node.token_budget, "max_num_seqs": node.max_num_seqs}
        known = {**_QUIET, "VLLM_PLUGINS": "deflector", **variables}
        engines.append(Engine(node.role, number, f"http://127.0.0.1:{port}", command, known, log, limits | facts))
    return engines


def slowdown_of(flags: Up, engines: int) -> float:
    """Of emulated engines, by default as much as two cores need to keep up; of others, 1.

    Raises:
        InputError: If it makes no sense.
    """
    if flags.kind != "emulated":
        if flags.slowdown is not None:
            raise InputError(f"--slowdown: only emulated engines can be slowed down, not --kind {flags.kind}")
        return 1.0
    if flags.slowdown is None:
        return max(1.0, engines / 2)
    if not 0.1 <= flags.slowdown <= 1000:
        raise InputError(f"--slowdown {flags.slowdown:g}: give a factor from 0.1 to 1000")
    return flags.slowdown


_Made = tuple[list[str], dict[str, str], dict[str, Any]]
"""Arguments, environment variables, and what the router is told."""


@dataclass(frozen=True)
class _Place:
    """Where one engine stands: what is its own among engines that are otherwise alike."""

    number: int
    side_port: int
    folder: Path
    link: str
    slowdown: float
    steps: str | None


def _emulated(flags: Up, node: NodeSpec, place: _Place) -> _Made:
    profile = load_profile(node.profile)
    model = place.folder / "models" / profile.name
    write_emulated_model(model, profile, flags.max_model_len)
    gigabytes_per_s, _ = link_speed(place.link)
    config = _plugin_config(rescaled(node.profile, place.slowdown), place.steps) | {
        "deflector_slowdown": node.slowness,
        "deflector_slowdown_file": str(place.folder / f"{node.role}-{place.number}.slowdown"),
        "deflector_link_gb_per_s": gigabytes_per_s / place.slowdown,
    }
    blocks = node.kv_blocks or profile.kv_tokens_capacity // node.block_size
    arguments = [
        "--model", str(model), "--served-model-name", MODEL_NAMES["emulated"], "--skip-tokenizer-init",
        "--max-model-len", str(flags.max_model_len), "--block-size", str(node.block_size), "--enforce-eager",
        "--num-gpu-blocks-override", str(blocks), "--async-scheduling", "--scheduler-cls", SCHEDULER,
        "--distributed-executor-backend", EXECUTOR, "--additional-config", json.dumps(config),
        "--kv-transfer-config", _transfer("EmulatedConnector", node.role, {"kv_connector_module_path": CONNECTOR}),
    ]  # fmt: skip
    facts = {
        "profile": rescaled(node.profile, place.slowdown),
        "link": str(gigabytes_per_s / place.slowdown),
        "block_size": node.block_size,
        "kv_blocks": blocks,
    }
    return arguments, {EMULATED_VARIABLE: "1", PORT_VARIABLE: str(place.side_port), "OMP_NUM_THREADS": "1"}, facts


def _cpu(flags: Up, node: NodeSpec, place: _Place) -> _Made:
    model = place.folder / "models" / f"{MODEL_NAMES['cpu']}-{flags.layers}"
    write_random_model(model, flags.layers)
    arguments = [
        "--model", str(model), "--served-model-name", MODEL_NAMES["cpu"], "--skip-tokenizer-init", "--enforce-eager",
        "--dtype", "float32", "--max-model-len", str(min(flags.max_model_len, CPU_MODEL_LEN)),
        "--scheduler-cls", SCHEDULER + "Sync", "--distributed-executor-backend", ONE_PROCESS,
        "--additional-config", json.dumps(_plugin_config(node.profile, place.steps)),
        "--kv-transfer-config", _transfer("NixlConnector", node.role, _NIXL_KEPT),
    ]  # fmt: skip
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        PAUSE_VARIABLE: "300",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.side_port),
    }
    return arguments, variables, {"profile": node.profile}


def _gpu(flags: Up, node: NodeSpec, place: _Place) -> _Made:
    arguments = [
        "--model", str(flags.model), "--max-model-len", str(flags.max_model_len), "--scheduler-cls", SCHEDULER,
        "--block-size", str(node.block_size),
        "--additional-config", json.dumps(_plugin_config(node.profile, place.steps)),
        "--kv-transfer-config", _transfer("NixlConnector", node.role, {}),
    ]  # fmt: skip
    variables = {
        "CUDA_VISIBLE_DEVICES": str(place.number),
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(place.side_port),
        "HF_HUB_OFFLINE": "0",
    }
    return arguments, variables, {"profile": node.profile, "block_size": node.block_size}


_KINDS = {"emulated": _emulated, "cpu": _cpu, "gpu": _gpu}


def _plugin_config(profile: str, steps: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {"deflector_profile": profile}
    return config | {"deflector_step_log": steps} if steps is not None else config


def _transfer(connector: str, role: str, more: dict[str, str]) -> str:
    kv_role = {"prefill": "kv_producer", "decode": "kv_consumer", "mixed": "kv_both"}[role]
    config = {"kv_connector": connector, "kv_role": kv_role} | more
    if role != "prefill":
        config["kv_load_failure_policy"] = "recompute"
    return json.dumps(config)


def as_json(engines: Sequence[Engine]) -> list[dict[str, Any]]:
    """The plan, to be written down for the supervisor."""
    return [asdict(engine) | {"name": engine.name} for engine in engines]
