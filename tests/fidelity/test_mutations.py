"""The comparison would notice a simulator that is wrong: five deliberate bugs, each caught."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deflector

pytest.importorskip("vllm", reason="not in this environment: `make fidelity` runs these tests in one of their own")

HERE = Path(__file__).parent
CASES = 40
PLAY_UNTIL_DIFFERENT = f"""
from comparison import compare
from workloads import seeded_case
for seed in range({CASES}):
    difference = compare(seeded_case(seed)).difference
    if difference:
        print("DIFFERENT", difference)
        break
else:
    print("EQUAL")
"""

# name: file, what stands there once, what stands there instead
BUGS = {
    "a block too many": (
        "queues.py",
        "return (tokens + (1 << shift) - 1) >> shift",
        "return (tokens + (1 << shift)) >> shift",
    ),
    "last come, first served": (
        "lifecycle.py",
        "append(w, node, at.WAIT_HEAD, slot)\n    wake(w, node, now_s)\n\n\n@inner\ndef end_step",
        "insert_before(w, node, at.WAIT_HEAD, slot, w.i[node_base(w.i, node) + at.WAIT_HEAD]) "
        "if w.i[node_base(w.i, node) + at.WAIT_HEAD] >= 0 else append(w, node, at.WAIT_HEAD, slot)\n"
        "    wake(w, node, now_s)\n\n\n@inner\ndef end_step",
    ),
    "last prompt token of pulled KV not recomputed": (
        "scheduling.py",
        "join_decodes(w, node, slot, w.i[sb + at.PROMPT] - 1, w.i[sb + at.OUTPUT])",
        "join_decodes(w, node, slot, w.i[sb + at.PROMPT], w.i[sb + at.OUTPUT])",
    ),
    "the first of the running preempted": (
        "scheduling.py",
        "lost_itself = w.i[nb + at.RUN_TAIL] == slot\n            preempt(w, node, w.i[nb + at.RUN_TAIL], now_s)",
        "lost_itself = w.i[nb + at.RUN_HEAD] == slot\n            preempt(w, node, w.i[nb + at.RUN_HEAD], now_s)",
    ),
    "budget not shared with the running": (
        "scheduling.py",
        "budget - decodes - chunk_tokens, chunk_tokens, q)",
        "budget, chunk_tokens, q)",
    ),
}


def played(folder: Path) -> str:
    """What the comparison prints with the package in a folder, its kernel interpreted: no minute of compiling."""
    environment = os.environ | {"PYTHONPATH": str(folder), "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PLAY_UNTIL_DIFFERENT]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that may be spoilt; links become files."""
    shutil.copytree(Path(deflector.__file__).parent, tmp_path / "deflector")
    return tmp_path


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_simulator_is_noticed(package: Path, bug: str) -> None:
    name, right, wrong = BUGS[bug]
    path = package / "deflector" / "envs" / "simulator" / name
    source = path.read_text()
    assert source.count(right) == 1, "the simulator has changed: place the bug anew"
    path.write_text(source.replace(right, wrong))
    assert "DIFFERENT" in played(package)


def test_the_copy_without_a_bug_is_equal(package: Path) -> None:
    assert "EQUAL" in played(package)
