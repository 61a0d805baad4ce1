"""What all tests share: repeatable hypothesis runs, no display, caches of their own."""

import os
from collections.abc import Iterator

import hypothesis
import matplotlib
import pytest

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", derandomize=False, deadline=None)  # looks for new failures
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
matplotlib.use("Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: its threads would fight for busy cores


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Points `DEFLECTOR_CACHE_DIR` at an empty folder, for the tests and the processes that they start.

    Compiled kernels stay where envs/compiled.py puts them: they are named after their sources, and slow to rebuild.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEFLECTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
