"""The scheduler's side of a KV connector with NIXL's protocol; the transfers themselves are simulated elsewhere."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata
from vllm.v1.request import RequestStatus


class EmulatedConnector(KVConnectorBase_V1):
    """Lets the decode engine pull a prompt's KV; notes in `pulls` what it has begun to pull."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pulls: list[tuple[str, int]] = []
        """(request, tokens to move), in order of their start; emptied by whoever simulates the transfers."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return request.num_prompt_tokens - num_computed_tokens, True
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            self.pulls.append((request.request_id, num_external_tokens))
            request.kv_transfer_params["do_remote_prefill"] = False

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        holds = (request.kv_transfer_params or {}).get("do_remote_decode", False)
        if holds and request.status == RequestStatus.FINISHED_LENGTH_CAPPED:
            return True, {"do_remote_prefill": True, "do_remote_decode": False}
        return False, None

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...
