"""The scheduler's side of the emulated KV wire, with NIXL's `do_remote_*` protocol.

`--kv-transfer-config '{"kv_connector": "EmulatedConnector", "kv_connector_module_path":
"deflector.live.vllm_plugin.emulated_connector", "kv_role": "kv_producer"}'`
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.request import RequestStatus

from deflector.live.vllm_plugin.emulated_wire import wire_port


@dataclass
class WireOrders(KVConnectorMetadata):
    """What the scheduler tells the wire in one step.

    Attributes:
        pulls: (request, tokens, remote request, remote port).
        holds: Requests that have finished and whose KV waits to be pulled.
    """

    pulls: list[tuple[str, int, str, int]] = field(default_factory=list)
    holds: list[str] = field(default_factory=list)


class EmulatedConnector(KVConnectorBase_V1):
    """Lets a decode engine pull what a prefill engine holds; the executor plays the wire."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what vLLM gives its connectors."""
        super().__init__(*args, **kwargs)
        self._port = wire_port()
        self._orders = WireOrders()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None:
        """There is no worker."""

    def wait_for_layer_load(self, *args: Any, **kwargs: Any) -> None:
        """There is no worker."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """There is no worker."""

    def wait_for_save(self) -> None:
        """There is no worker."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """All of a prompt that was prefilled elsewhere comes over the wire."""
        transfer = request.kv_transfer_params or {}
        if not transfer.get("do_remote_prefill"):
            return 0, False
        missing = request.num_prompt_tokens - num_computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Its blocks are there: the transfer begins with the next step; or nothing is missing, and P may free its."""
        transfer = request.kv_transfer_params or {}
        if not transfer.get("do_remote_prefill"):
            return
        pull = request.request_id, num_external_tokens, transfer["remote_request_id"], transfer["remote_port"]
        self._orders.pulls.append(pull)
        transfer["do_remote_prefill"] = False

    def build_connector_meta(self, scheduler_output: Any) -> WireOrders:
        """The orders of one step."""
        orders, self._orders = self._orders, WireOrders()
        return orders

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """A prompt that was prefilled for another engine: its blocks stay until they are pulled."""
        transfer = request.kv_transfer_params or {}
        if not transfer.get("do_remote_decode") or request.status != RequestStatus.FINISHED_LENGTH_CAPPED:
            return False, None
        self._orders.holds.append(request.request_id)
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": f"emulated-{self._port}",
            "remote_block_ids": list(block_ids),
            "remote_request_id": request.request_id,
            "remote_host": "127.0.0.1",
            "remote_port": self._port,
        }
