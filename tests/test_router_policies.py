"""The policy in charge of the router: the same object as in the simulator, and not trusted blindly."""

import asyncio
from dataclasses import replace

import pytest

from deflector.envs.errors import InputError
from deflector.envs.state import ClusterState, Decision, Path, Reason, Request
from deflector.live.router.book import Flight
from deflector.live.router.config import LiveNode, checked_config
from deflector.live.router.fleet import Fleet
from deflector.live.router.policy_slot import PolicySlot, can_be_done
from deflector.policies.policy import Policy, make_policy

NODES = [
    {"role": role, "url": f"http://127.0.0.1:{port}"}
    for port, role in enumerate(("prefill", "prefill", "decode", "decode"), 1)
]
REQUEST = Request(1, 5.0, 3000, 100, 1.0, 0.1)


def fleet() -> Fleet:
    return Fleet(checked_config({"nodes": NODES}, "test"), now_s=0.0)


class Stubborn:
    """Answers always the same, or fails."""

    def __init__(self, answer: Decision | Exception) -> None:
        self._answer = answer

    def reset(self, seed: int) -> None: ...

    def decide(self, state: ClusterState, request: Request) -> Decision:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def slot_with(policy: Policy) -> PolicySlot:
    slot = PolicySlot(fleet(), "kairos", seed=0)
    slot._policy = policy
    return slot


@pytest.mark.parametrize("name", ["never", "kairos", "least_ttft", "slo_price", "triage", "learned"])
def test_router_decides_as_the_policy_does_on_the_same_state(name: str) -> None:
    world = fleet()
    for k, tokens in enumerate((9000, 100, 4000, 700)):
        flight = Flight(tokens, 0.1, world.nodes[2 + k % 2], world.nodes[k % 2])
        flight.begin(1.0)
        if k > 1:
            flight.prefilled()
            flight.first_token()
    answer = PolicySlot(world, name, seed=0).decide_now(REQUEST, ())
    expected = make_policy(name).decide(world.state(REQUEST.arrival_s), REQUEST)
    assert repr(answer.decision) == repr(expected)  # A prediction that is nan equals no other.
    assert (answer.policy, answer.reason) == (name, answer.decision.reason.name.lower())


def test_nodes_that_failed_a_request_are_not_chosen_again() -> None:
    slot = PolicySlot(fleet(), "never", seed=0)
    assert slot.decide_now(REQUEST, {0, 2}).decision.prefill_node == 1
    assert slot.decide_now(REQUEST, {0, 2}).decision.decode_node == 3
    without = slot.decide_now(REQUEST, {0, 1}).decision
    assert (without.path, without.reason) == (Path.LOCAL, Reason.NO_PREFILL_NODE)
    assert slot.decide_now(REQUEST, {2, 3}).decision.path == Path.REJECT


GOOD = Decision(Path.DISAGGREGATE, 0, 2, Reason.CHOSEN)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(GOOD, prefill_node=2),
        replace(GOOD, decode_node=1),
        replace(GOOD, decode_node=7),
        replace(GOOD, prefill_node=-1),
        replace(GOOD, path=Path.DEFLECT, decode_node=0),
    ],
)
def test_decision_that_no_node_can_carry_out_is_replaced(wrong: Decision) -> None:
    answer = slot_with(Stubborn(wrong)).decide_now(REQUEST, ())
    assert answer.reason == "policy_impossible"
    assert can_be_done(answer.decision, fleet().state(5.0))
    assert not can_be_done(wrong, fleet().state(5.0))


def test_policy_that_fails_costs_no_request() -> None:
    answer = slot_with(Stubborn(RuntimeError("broken"))).decide_now(REQUEST, ())
    assert (answer.reason, answer.decision.path) == ("policy_error", Path.DISAGGREGATE)


def test_policies_are_exchanged_and_bad_ones_refused() -> None:
    slot = PolicySlot(fleet(), "kairos", seed=0)
    asyncio.run(slot.exchange("never"))
    assert (slot.text, slot.name) == ("never", "never")
    for bad in ("nevr", "learned:/nowhere", "kairos:alpha=x", "oracle_lookahead"):
        with pytest.raises(InputError):
            asyncio.run(slot.exchange(bad))
        assert slot.text == "never"


def test_nodes_come_and_go_while_a_policy_is_in_charge() -> None:
    world = fleet()
    slot = PolicySlot(world, "learned", seed=0)
    slot.decide_now(REQUEST, ())
    added = world.add(LiveNode.model_validate({"role": "decode", "url": "http://127.0.0.1:9"}), 5.0)
    slot.decide_now(REQUEST, ())
    assert slot.decide_now(REQUEST, {2, 3}).decision.decode_node == 4
    added.draining = True
    assert slot.decide_now(REQUEST, {2, 3}).decision.path == Path.REJECT
    world.remove(added)
    assert world.facts.num_nodes == 4
    for node in world.decode_nodes[:1]:
        world.remove(node)
    with pytest.raises(InputError, match="none can decode"):
        world.remove(world.decode_nodes[0])
    with pytest.raises(InputError, match="is there twice"):
        world.add(world.nodes[0].spec, 5.0)
