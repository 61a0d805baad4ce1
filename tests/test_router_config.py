"""The router's configuration: strict, with errors that help."""

from pathlib import Path
from typing import Any

import pytest

from deflector.cli import run
from deflector.envs.cluster import NodeField
from deflector.envs.errors import InputError
from deflector.live.router.config import RouterConfig, checked_config, facts_of, read_config
from deflector.live.router.flags import Serve, merged

PREFILL = {"role": "prefill", "url": "http://127.0.0.1:8100"}
DECODE = {"role": "decode", "url": "http://127.0.0.1:8200"}


def config(**values: Any) -> RouterConfig:
    return checked_config({"nodes": [PREFILL, DECODE]} | values, "router.yaml")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"polcy": "kairos"}, "polcy: no such key; perhaps you meant policy"),
        ({"limits": {"request": 3}}, "limits.request: no such key; perhaps you meant requests"),
        (
            {"nodes": [PREFILL | {"max_seqs": 4}, DECODE]},
            "nodes.0.max_seqs: no such key; perhaps you meant max_num_seqs",
        ),
        ({"timeouts": {"idle_s": 0}}, "timeouts.idle_s: Input should be greater than 0"),
        ({"slo": {"ttft": "soon"}}, "slo.ttft: TTFT SLO 'soon' is not understood"),
        ({"link": "teapot"}, "link: link 'teapot' is neither a speed"),
        ({"nodes": []}, "nodes: "),
        ({"nodes": [PREFILL]}, "none can decode"),
        ({"nodes": [PREFILL, DECODE, DECODE]}, "http://127.0.0.1:8200 is there twice"),
        ({"nodes": [PREFILL, DECODE | {"url": "localhost:8200"}]}, "nodes.1.url: 'localhost:8200' is no address"),
        ({"nodes": [PREFILL, DECODE | {"url": "http://h:99999"}]}, "nodes.1.url: "),
        ({"nodes": [PREFILL, DECODE | {"profile": "h100-llama-3.1-8b"}]}, "KV cannot move between"),
        ({"nodes": [PREFILL, DECODE | {"profile": "no-such"}]}, "no-such"),
    ],
)
def test_bad_configuration_is_refused_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        config(**values)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n", "nodes: [\n", "\x00", ""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"router\.yaml"):
        read_config(path)


def test_nodes_bring_their_limits_and_take_the_routers_profile_and_link() -> None:
    limits = {"max_num_batched_tokens": 4096, "max_num_seqs": 17, "kv_blocks": 1000}
    made = config(nodes=[PREFILL | limits, DECODE | {"link": "tcp"}], profile="h100-llama-3.1-8b", link="nvlink")
    facts = facts_of(made, made.nodes)
    assert [profile.name for profile in facts.profiles] == ["h100-llama-3.1-8b"]
    assert facts.nodes[0, [NodeField.MAX_BATCHED_TOKENS, NodeField.MAX_SEQS, NodeField.KV_BLOCKS]].tolist() == [
        4096, 17, 1000,
    ]  # fmt: skip
    assert facts.nodes[:, NodeField.EGRESS_BYTES_PER_S].tolist() == [228.2e9, 0.5e9]


def test_flags_go_before_the_file_and_add_their_nodes() -> None:
    raw = {"policy": "never", "port": 1, "nodes": [PREFILL], "slo": {"ttft": "4x", "tbt_s": 0.5}}
    flags = Serve(decode=(DECODE["url"],), policy="kairos", slo_tbt=0.2)
    made = checked_config(merged(flags, raw), "flags")
    assert (made.policy, made.port, made.slo.ttft, made.slo.tbt_s) == ("kairos", 1, "4x", 0.2)
    assert [(node.role, node.url) for node in made.nodes] == [(n["role"], n["url"]) for n in (PREFILL, DECODE)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nodes"),
        (("--prefill", "http://127.0.0.1:1"), "none can decode"),
        (("--decode", "http://127.0.0.1:1", "--policy", "kiros"), "did you mean kairos"),
        (("--decode", "http://127.0.0.1:1", "--policy", "oracle_lookahead"), "knows the future"),
        (("--decode", "http://127.0.0.1:1", "--policy", "learned:/nowhere"), "nowhere"),
        (("--config", "/nowhere.yaml"), "nowhere.yaml"),
        (("--decode", "http://127.0.0.1:1", "--port", "70000"), "port"),
        (("--decode", "http://127.0.0.1:1", "--decision-log", "/nowhere/log"), "/nowhere/log"),
    ],
)
def test_serve_refuses_bad_flags_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("deflector: error: ")
    assert says in said[0]
