"""vLLM's entry point `vllm.platform_plugins`: lets an emulated engine keep asynchronous scheduling, as on a GPU.

Active where the environment says DEFLECTOR_EMULATED=1; vLLM's platform for CPUs, which it builds on, turns asynchronous
scheduling off.
"""

import os
from typing import Any

EMULATED_VARIABLE = "DEFLECTOR_EMULATED"
PORT_VARIABLE = "DEFLECTOR_WIRE_PORT"
"""UDP port on 127.0.0.1 of an emulated engine's KV wire: its own for each."""


def register() -> str | None:
    """The class's name, or None: vLLM then finds its platform itself."""
    return f"{__name__}.EmulatedPlatform" if os.environ.get(EMULATED_VARIABLE) == "1" else None


def __getattr__(name: str) -> Any:
    # Made on demand: vLLM asks register() before its platforms may be imported.
    if name != "EmulatedPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform

    class EmulatedPlatform(CpuPlatform):
        """A CPU whose engine waits for a result as for a GPU's."""

        device_name = "emulated"

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            """As on CPUs, but for asynchronous scheduling."""
            asynchronous = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            vllm_config.scheduler_config.async_scheduling = asynchronous

    EmulatedPlatform.__qualname__ = EmulatedPlatform.__name__
    globals()[name] = EmulatedPlatform
    return EmulatedPlatform
