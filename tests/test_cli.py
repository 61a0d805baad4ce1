"""The command line from outside: exit codes, one-line messages, help, and commands that are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deflector.cli import run
from deflector.envs.step_time import DEFAULT_PROFILE, load_profile

TINY = (
    *("evaluate", "--workload", "poisson_control", "--rate", "2", "--policies", "never,kairos", "--seeds", "0-1"),
    *("--duration", "20", "--warmup", "5", "--no-decision-timing"),
)


def deflector(*arguments: str | Path, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    command = [sys.executable, "-m", "deflector", *map(str, arguments)]
    wide = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=900, env=wide)


@pytest.fixture(name="refused")
def refused_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to exit with 2, here in this process, and returns its one line on stderr."""

    def refused(*arguments: str | Path) -> str:
        assert run([str(argument) for argument in arguments]) == 2
        complaint = capfd.readouterr().err
        assert re.fullmatch(r"deflector: error: [^\n]+\n", complaint), complaint
        return complaint

    return refused


Refused = Callable[..., str]


def trace_file(folder: Path, rows: str) -> Path:
    path = folder / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return path


def cluster_file(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--policies never,karios", "karios"),
        ("--policies kairos:alpha=x", "alpha"),
        ("--profile a100-lama", r"a100-lama.*a100-llama-3.1-8b"),
        ("--workload long_tail_brust", "did you mean long_tail_burst"),
        ("--slo-tbt 0", "--slo-tbt 0: give a positive number"),
        ("--slo-ttft 0", "TTFT SLO"),
        ("--slo-ttft 2y", "0.25[+]4x"),
        ("--cluster 2P", "decode"),
        ("--cluster 2D", "prefill"),
        ("--cluster 2X", "2P2D"),
        ("--cluster nix.yaml", "nix.yaml"),
        ("--link warp", "warp.*nvlink"),
        ("--seeds 3-1", "--seeds 3-1"),
        ("--load 0", "--rate and --load"),
        ("--rate -1", "--rate -1"),
        ("--warmup 30", "within the warm-up of 30 s"),
        ("--duration -5", "--duration"),
        ("--jobs 0", "--jobs 0"),
        ("--baseline least_ttft", "--baseline least_ttft: not among --policies never,kairos"),
        ("--trace nix.csv", "--trace and --workload: give one of the two"),
        ("--polcies never", "perhaps you meant --policies"),
        ("--report-interval -1", "--report-interval -1"),
        ("--json /nowhere/out.json", "--json /nowhere/out.json: cannot write there"),
        ("--json /", "--json /: this is a folder"),
        ("--plots /dev/null/x", "--plots /dev/null/x"),
    ],
)
def test_bad_flags_end_in_one_line(refused: Refused, flags: str, message: str) -> None:
    assert re.search(message, refused(*TINY, *flags.split()))


def test_usage_errors_name_what_there_is(refused: Refused) -> None:
    assert "available subcommands: evaluate" in refused("evalute")
    assert "Missing from deflector trace: FILE" in refused("trace")
    assert "see deflector profile --help" in refused("profile", "fits")
    assert "one of .png, .svg, .pdf" in refused("trace", "nix.csv", "--plot", "nix.xyz")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,10,5\n1,-3,5\n", "row 3: prompt_tokens is -3"),
        ("0,10,5\n1,3000000,5\n2,10,5\n", r"row 3: .* is 3000005.*KV tokens"),
        ("1,10,5\n0,10,5\n", "row 3: .*sort"),
        ("", "row 1"),
    ],
)
def test_bad_traces_are_refused_by_row(refused: Refused, tmp_path: Path, rows: str, message: str) -> None:
    path = trace_file(tmp_path, rows)
    line = refused("evaluate", "--trace", path, "--warmup", "0")
    assert str(path) in line
    assert re.search(message, line)


def test_other_bad_files_are_refused(refused: Refused, tmp_path: Path) -> None:
    missing = tmp_path / "missing.csv"
    missing.write_text("arrival_s,prompt_tokens\n0,1\n")
    assert "output_tokens" in refused("trace", missing)
    noise = tmp_path / "noise.csv"
    noise.write_bytes(bytes(range(256)) * 20)
    assert str(noise) in refused("trace", noise)
    profile = tmp_path / "profile.json"
    text = load_profile(DEFAULT_PROFILE).to_json()
    profile.write_text(re.sub(r'"kv_bytes_per_token": [0-9.]+', '"kv_bytes_per_token": NaN', text))
    assert "kv_bytes_per_token" in refused("profile", "show", profile)


def test_prompts_of_a_shape_longer_than_any_kv_are_refused(refused: Refused, tmp_path: Path) -> None:
    small = cluster_file(tmp_path, "nodes: [{role: prefill}, {role: decode, kv_blocks: 100}]")
    line = refused("evaluate", "--cluster", small, "--workload", "high_prefill_low_decode", "--rate", "2")
    assert "1600 KV tokens" in line
    assert "kv_blocks" in line


def test_bad_input_leaves_no_traceback_and_nothing_on_stdout() -> None:
    result = deflector(*TINY, "--policies", "karios")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("deflector: error: ")
    assert result.stderr.count("\n") == 1


# --- Output --------------------------------------------------------------------------------------------------------


def test_evaluate_prints_a_table_and_writes_figures(tmp_path: Path) -> None:
    result = deflector(*TINY, "--json", tmp_path / "out.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert "SLO met" in result.stdout
    assert len(json.loads((tmp_path / "out.json").read_text())["cells"]) == 4
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_ends_in_one_line_and_the_table_is_printed() -> None:
    result = deflector(*TINY, "--json", "/dev/full")
    assert result.returncode == 2
    assert re.fullmatch(r"deflector: error: /dev/full: No space left on device: [^\n]+\n", result.stderr)
    assert "SLO met" in result.stdout
    assert not Path("/dev/full.partial.jsonl").exists()
    assert not Path("/dev/full").is_file()
    with open("/dev/full", "w") as full:
        result = deflector("profile", "list", stdout=full.fileno())
    assert result.returncode == 2
    assert re.fullmatch(r"deflector: error: output: No space left on device: [^\n]+\n", result.stderr)


def test_results_to_stdout_and_a_reader_that_leaves_early() -> None:
    result = deflector(*TINY, "--json", "/dev/stdout")
    assert result.returncode == 0
    assert '"schema": 1' in result.stdout
    command = f"{sys.executable} -m deflector profile list | head -c 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--help", ["deflector evaluate --cluster 2P2D", "saturation", "policies", "trace", "profile"]),
        ("evaluate --help", ["For example:", "--trace", "--slo-ttft", "0.25+4x"]),
        ("saturation --help", ["For example:", "--cluster"]),
        ("policies --help", ["For example:"]),
        ("trace --help", ["For example:", "--plot"]),
        ("profile --help", ["For example:", "fit", "list", "show"]),
        ("profile fit --help", ["For example:", "--kv-tokens-capacity"]),
    ],
)
def test_help_teaches(arguments: str, words: list[str]) -> None:
    result = deflector(*arguments.split())
    assert result.returncode == 0
    assert not [word for word in words if word not in result.stdout]


def test_help_waits_for_no_heavy_library() -> None:
    script = "import sys; from deflector.cli import run; run(['train', '--help']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900)
    assert "usage" in result.stdout
    heavy = {"numba", "torch", "stable_baselines3", "wandb", "matplotlib", "pydantic"}
    assert heavy & {*result.stdout.splitlines()[-1].split()} == set()


def test_small_commands(tmp_path: Path) -> None:
    assert "a100-deepseek-v2-lite" in deflector("profile", "list").stdout
    assert "Llama" in deflector("profile", "show", "h100-llama-3.1-8b").stdout
    policies = tmp_path / "policies.json"
    assert "kairos" in deflector("policies", "--json", policies).stdout
    assert "kairos" in [entry["policy"] for entry in json.loads(policies.read_text())["policies"]]
    assert deflector("--version").stdout.startswith("deflector ")
    trace = trace_file(tmp_path, "".join(f"{at},100,20\n" for at in range(100)))
    result = deflector("trace", trace, "--json", tmp_path / "trace.json", "--plot", tmp_path / "trace.png")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "trace.json").read_text())["requests"] == 100
    assert (tmp_path / "trace.png").stat().st_size > 10_000


# --- Killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, number: signal.Signals, code: int) -> None:
    flags = [*TINY, "--seeds", "0-999", "--duration", "100", "--json", str(tmp_path / "out.json")]
    journal = tmp_path / "out.json.partial.jsonl"
    command = [sys.executable, "-m", "deflector", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 3):
            time.sleep(0.005)
        os.kill(process.pid, number)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == code
    assert complaint == ("deflector: stopped: interrupted\n" if number == signal.SIGINT else "")
    kept = [line for line in journal.read_text().split("\n")[:-1] if line]
    assert 3 <= len(kept) < 2000
    result = deflector(*flags)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())["cells"]) == 2000
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]
