"""vLLM's entry point `vllm.endpoint_plugins` (0.27 and later): GET /deflector/state."""

from typing import Any

from fastapi.responses import JSONResponse

from deflector.live.vllm_plugin.engine_state import LAST

PATH = "/deflector/state"


class StateEndpoint:
    """Adds one route; vLLM loads it where VLLM_PLUGINS names `deflector`."""

    name = "deflector"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Adds it."""

        @app.get(PATH)
        async def state() -> JSONResponse:
            return JSONResponse(LAST.answer())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Nothing to prepare."""
