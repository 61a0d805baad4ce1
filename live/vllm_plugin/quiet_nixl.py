"""vLLM's entry point `vllm.general_plugins`: NIXL's progress thread pauses between two looks, where it is told to.

By default it spins, one core for every engine, which on a machine with fewer cores than engines is most of its time.
Active where the environment gives DEFLECTOR_NIXL_PAUSE_US; NIXL itself has the setting and offers it to nobody.
"""

import importlib
import os
from typing import Any

PAUSE_VARIABLE = "DEFLECTOR_NIXL_PAUSE_US"
_MODULES = ("nixl_cu13._api", "nixl_cu12._api", "nixl._api")
_DELAY = "pthrDelay"


def quiet_nixl() -> None:
    """Makes agents of this process pause; does nothing where NIXL is not there, or is another than is known here."""
    pause_us = os.environ.get(PAUSE_VARIABLE, "")
    if not pause_us.isdecimal():
        return
    for name in _MODULES:
        try:
            bindings: Any = importlib.import_module(name).nixlBind
            bindings.nixlAgentConfig = _pausing(bindings.nixlAgentConfig, int(pause_us))
        except (ImportError, AttributeError, TypeError):
            continue


def _pausing(config: Any, pause_us: int) -> Any:
    if not hasattr(config, _DELAY) or hasattr(config, "pause_us"):
        return config

    class PausingConfig(config):
        """Its progress thread's delay cannot be set to nothing."""

        pause_us = 0

        def __setattr__(self, key: str, value: Any) -> None:
            super().__setattr__(key, max(value, pause_us) if key == _DELAY else value)

    return PausingConfig
