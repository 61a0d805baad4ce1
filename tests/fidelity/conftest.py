"""vLLM and what it imports warn of many things that are not ours: here, warnings are no errors."""

import importlib.util
import warnings
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm_engine  # noqa: F401  (imported here once, and loudly if it is broken)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
