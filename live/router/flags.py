"""The flags of `deflector serve`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

# Nothing heavy: `deflector --help` reads this.

_TEXT = {"help_behavior_hint": ""}


@dataclass(frozen=True)
class Serve:
    """Route OpenAI requests to vLLM's prefill and decode engines, by any policy.

    Engines are named by --prefill and --decode, or in a YAML file (--config) that may say everything else too; flags go
    before the file. SIGTERM lets running requests finish; SIGHUP reads the file's policy anew.

    For example:

    deflector serve --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --policy kairos

    deflector serve --config endpoints.yaml --policy learned --admin-port 8001 --decision-log decisions.jsonl

    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"model": "m", "prompt": "Hi"}'
    """

    config: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """YAML file: docs/router.md lists its keys. `deflector cluster up` writes one."""
    prefill: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="URL", **_TEXT)] = ()
    """A prefill engine (kv_producer); may be given several times."""
    decode: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="URL", **_TEXT)] = ()
    """A decode engine (kv_consumer); may be given several times."""
    policy: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: kairos)")] = None
    """Routing policy with its parameters: see `deflector policies`."""
    profile: Annotated[str | None, arg(metavar="NAME", **_TEXT)] = None
    """Step-time profile of engines that name none: see `deflector profile list`; or a .json file."""
    host: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: 127.0.0.1)")] = None
    """Address to listen on."""
    port: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 8000)")] = None
    """Port to listen on; 0 takes any free one and says which."""
    admin_port: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: none)")] = None
    """Opens POST /policy and /nodes on this port of 127.0.0.1."""
    slo_ttft: Annotated[str | None, arg(metavar="SPEC", help_behavior_hint="(default: 0.25+4x)")] = None
    """TTFT SLO of requests that bring none: seconds, a multiple of the isolated prefill time such as 4x, or both."""
    slo_tbt: Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="(default: 0.1)")] = None
    """TBT SLO of requests that bring none."""
    decision_log: Annotated[str | None, arg(metavar="FILE", **_TEXT)] = None
    """Appends one line of JSON per decision."""
    warm_pairs: Annotated[bool | None, arg(help_behavior_hint="(default: yes)")] = None
    """Moves a small prompt over each pair of engines before being ready."""
    seed: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 0)")] = None
    """Of policies that draw random numbers."""


def merged(flags: Serve, raw: dict[str, Any]) -> dict[str, Any]:
    """What the file says, with what the flags say in its place; engines of both."""
    plain = ("policy", "profile", "host", "port", "admin_port", "decision_log", "warm_pairs", "seed")
    given = {name: getattr(flags, name) for name in plain if getattr(flags, name) is not None}
    nodes = raw.get("nodes", ())
    added = [{"role": "prefill", "url": url} for url in flags.prefill]
    added += [{"role": "decode", "url": url} for url in flags.decode]
    if added:
        given["nodes"] = [*nodes, *added] if isinstance(nodes, list | tuple) else nodes
    slo = {key: value for key, value in (("ttft", flags.slo_ttft), ("tbt_s", flags.slo_tbt)) if value is not None}
    if slo and isinstance(raw.get("slo", {}), dict):
        given["slo"] = raw.get("slo", {}) | slo
    if flags.config is not None and isinstance(raw.get("decision_log"), str):
        given.setdefault("decision_log", str(Path(flags.config).parent / raw["decision_log"]))
    return raw | given
