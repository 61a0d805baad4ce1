"""vLLM's entry point `vllm.endpoint_plugins` (0.27 and later): GET /deflector/state and /deflector/steps."""

from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from deflector.live.vllm_plugin.engine_settings import PREFIX
from deflector.live.vllm_plugin.engine_state import LAST
from deflector.live.vllm_plugin.step_log import read_steps

PATH, STEPS_PATH = "/deflector/state", "/deflector/steps"


class StateEndpoint:
    """Adds one route; vLLM loads it where VLLM_PLUGINS names `deflector`."""

    name = "deflector"
    required_tasks = None

    def __init__(self) -> None:
        """No step log yet."""
        self._step_log: Path | None = None

    def attach_router(self, app: Any) -> None:
        """Adds the routes."""

        @app.get(PATH)
        async def state() -> JSONResponse:
            return JSONResponse(LAST.answer())

        @app.get(STEPS_PATH)
        async def steps(offset: int = 0) -> Response:
            if self._step_log is None:
                return JSONResponse({"error": {"message": "steps are not recorded: deflector_step_log"}}, 404)
            data, behind = read_steps(self._step_log, offset)
            return Response(data, media_type="application/x-ndjson", headers={"x-deflector-offset": str(behind)})

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learns where steps are recorded."""
        config = getattr(args, "additional_config", None)
        path = config.get(PREFIX + "step_log") if isinstance(config, dict) else None
        self._step_log = None if path is None else Path(path)
