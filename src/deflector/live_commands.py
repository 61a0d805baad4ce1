"""What carries out the commands that have to do with live engines."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from deflector.envs.errors import InputError
from deflector.live.cluster.flags import Cluster
from deflector.live.replay.flags import Replay
from deflector.live.router.flags import Serve

if TYPE_CHECKING:
    from deflector.live.router.config import RouterConfig

# Everything else is imported where it is used, as in commands.py.


def run_serve(flags: Serve, console: Console) -> None:
    """Carries out `deflector serve`."""
    _need("serve", "aiohttp", "httptools", "orjson", "prometheus_client", "uvloop")
    from deflector.live.router.config import checked_config, read_config
    from deflector.live.router.flags import merged
    from deflector.live.router.serve import say_to_stderr, serve

    def config() -> "RouterConfig":
        raw = read_config(flags.config) if flags.config is not None else {}
        return checked_config(merged(flags, raw), flags.config or "flags")

    serve(config(), lambda: config().policy, say_to_stderr)


def run_cluster(flags: Cluster, console: Console) -> None:
    """Carries out `deflector cluster`."""
    _need("cluster", "psutil")
    from deflector.live.cluster.commands import run_cluster

    run_cluster(flags, console)


def run_replay(flags: Replay, console: Console) -> None:
    """Carries out `deflector replay`."""
    _need("replay", "aiohttp", "httptools", "orjson", "prometheus_client", "uvloop")
    from deflector.replay import run_replay

    run_replay(flags, console)


def _need(command: str, *modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f"{command} needs {', '.join(missing)}: pip install 'deflector[serve]'")
