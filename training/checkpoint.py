"""What is read of a checkpoint: SB3's .zip may hold code, so its tensors and nothing else."""

import zipfile
from pathlib import Path
from typing import Any

from stable_baselines3.common.save_util import load_from_zip_file

from deflector.envs.errors import InputError

WANTED = "name a checkpoint that deflector train wrote"
_MOST_BYTES = 1 << 30


def read_parameters(path: Path) -> dict[str, Any]:
    """States of network and optimiser in a .zip that SB3's `model.save()` wrote, as `set_parameters` takes them.

    Nothing in it is unpickled but tensors (torch's `weights_only`): code that it may hold does not run.

    Raises:
        InputError: If it is no such file.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path}: there is no such file: {WANTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_BYTES:
            raise InputError(f"checkpoint {path}: it unpacks to {size:,} bytes, more than any checkpoint: {WANTED}")
        _, parameters, _ = load_from_zip_file(path, load_data=False, device="cpu")
    except InputError:
        raise
    except Exception as error:  # torch's and zipfile's readers raise anything on what they cannot read.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"checkpoint {path}: it cannot be read for tensors ({reason}): {WANTED}") from error
    return parameters
