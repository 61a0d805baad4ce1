"""The emulated KV wire between engines: bytes over bandwidth as the time of a transfer, a datagram as its end."""

import contextlib
import json
import os
import socket
import time
from typing import Any

from vllm.v1.outputs import KVConnectorOutput

from deflector.live.vllm_plugin.emulated_platform import PORT_VARIABLE

LEASE_S = 30.0
"""A prefill engine frees KV that nobody has pulled after so long, as NIXL's connector does."""
MOST_BYTES = 4096


class Wire:
    """The worker's side of the connector: one transfer after another comes in."""

    def __init__(self, vllm_config: Any, bytes_per_token: float, bytes_per_s: float) -> None:
        """Opens the port that `PORT_VARIABLE` names."""
        self._bytes_per_token, self._bytes_per_s = bytes_per_token, bytes_per_s
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(("127.0.0.1", wire_port()))
        self._free_s = 0.0
        self._incoming: list[tuple[float, str, str, int]] = []
        self._leases: dict[str, float] = {}

    def turn(self, metadata: Any) -> KVConnectorOutput:
        """Begins the transfers that the scheduler asks for, and tells which have ended since."""
        now_s = time.monotonic()
        if metadata is not None:
            for request_id, tokens, remote_id, remote_port in metadata.pulls:
                self._free_s = max(now_s, self._free_s) + tokens * self._bytes_per_token / self._bytes_per_s
                self._incoming.append((self._free_s, request_id, remote_id, remote_port))
            for request_id in metadata.holds:
                self._leases[request_id] = now_s + LEASE_S
        received = {request_id for end_s, request_id, _, _ in self._incoming if end_s <= now_s}
        for end_s, _, remote_id, remote_port in self._incoming:
            if end_s <= now_s:
                self._tell(remote_id, remote_port)
        self._incoming = [pull for pull in self._incoming if pull[0] > now_s]
        return KVConnectorOutput(finished_sending=self._sent(now_s) or None, finished_recving=received or None)

    def _tell(self, remote_id: str, remote_port: int) -> None:
        with contextlib.suppress(OSError):  # Untold, it frees its blocks when the lease ends.
            self._socket.sendto(json.dumps(remote_id).encode(), ("127.0.0.1", remote_port))

    def _sent(self, now_s: float) -> set[str]:
        """Requests of ours whose KV has been pulled, or whose lease is over."""
        done = {request_id for request_id, end_s in self._leases.items() if end_s <= now_s}
        while True:
            try:
                pulled = json.loads(self._socket.recv(MOST_BYTES))
            except BlockingIOError:
                break
            except (OSError, ValueError):
                continue
            if pulled in self._leases:
                done.add(pulled)
        for request_id in done:
            del self._leases[request_id]
        return done

    def close(self) -> None:
        """Closes the port."""
        self._socket.close()


def wire_port() -> int:
    """The engine's own port.

    Raises:
        RuntimeError: If the environment names none.
    """
    text = os.environ.get(PORT_VARIABLE, "")
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise RuntimeError(f"{PORT_VARIABLE}={text!r}: an emulated engine with KV transfers needs a port of its own")
    return int(text)
