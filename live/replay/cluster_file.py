"""The file that describes a cluster, by the cluster's name or its own."""

from pathlib import Path

from deflector.envs.errors import InputError
from deflector.live.cluster.running import cluster_folder, find
from deflector.live.router.config import RouterConfig, checked_config, read_config


def find_cluster(cluster: str) -> tuple[Path, RouterConfig]:
    """The file that describes a cluster, and what it says.

    Args:
        cluster: A cluster that runs, by its name, or a .yaml file.

    Raises:
        InputError: If there is none, or the file is broken.
    """
    path = Path(cluster)
    if path.suffix not in (".yaml", ".yml"):
        if find(cluster) is None:
            raise InputError(f"cluster '{cluster}' does not run: deflector cluster up, or give a .yaml file")
        path = cluster_folder(cluster) / "endpoints.yaml"
    return path, checked_config(read_config(path), str(path))
