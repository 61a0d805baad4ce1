"""The commands' flags, one dataclass each, and what carries each command out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg, subcommand

from deflector.envs.errors import InputError
from deflector.training.settings import Evaluate, Saturation

# Everything else is imported where it is used: `deflector --help` shall not wait for NumPy, let alone for Numba.

PICTURES = (".png", ".svg", ".pdf")

FileFlag = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]


@dataclass(frozen=True)
class Trace:
    """Show what matters of a trace: rate, burstiness, lengths.

    Reads Azure CSV, Mooncake JSON lines, BurstGPT CSV, and plain CSV with the columns arrival_s, prompt_tokens,
    output_tokens; any of them gzipped.

    For example:

    deflector trace AzureLLMInferenceTrace_code.csv.gz --plot azure.png
    """

    file: Annotated[Positional[str], arg(metavar="FILE")]
    """The trace."""
    seed: int = 0
    """Of the delays that spread out coarse time stamps (Mooncake)."""
    plot: FileFlag = None
    """Draw it here (.png, .svg, .pdf)."""
    json: FileFlag = None
    """Write the figures here."""


@dataclass(frozen=True)
class Fit:
    """Fit a profile to measured engine steps.

    DATA is a CSV file with the columns chunk_tokens, context_tokens, decode_batch, decode_kv_tokens, step_ms, or JSON
    lines such as {"chunks": [[0, 512]], "decodes": 3, "kv_tokens": 4096, "step_ms": 31.5}; either also gzipped.

    For example:

    deflector profile fit steps.csv --name my-a100 --gpu A100-80GB --model Llama-3.1-8B --kv-bytes-per-token 131072
    --kv-tokens-capacity 400000 --json my-a100.json
    """

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """The step records."""
    name: str
    """What to call the profile."""
    model: str
    """Model that the steps were measured on."""
    gpu: str
    """GPU that they were measured on."""
    kv_bytes_per_token: float
    """Bytes of KV cache per token, over all tensor-parallel ranks."""
    kv_tokens_capacity: int
    """Tokens whose KV an engine holds."""
    engine: str = "vllm"
    """Engine and version."""
    tensor_parallel: int = 1
    """GPUs per engine."""
    block_size: int = 16
    """Tokens per KV block."""
    provenance: Literal["measured", "derived", "synthesised", "invented"] = "measured"
    """What the records are."""
    note: str = ""
    """Where they come from."""
    seed: int = 0
    """Chooses the fifth of the records that the fit does not see and is judged on."""
    json: FileFlag = None
    """Write the profile here; `--profile FILE` then takes it."""


@dataclass(frozen=True)
class List:
    """List the built-in profiles.

    For example:

    deflector profile list
    """


@dataclass(frozen=True)
class Show:
    """Show a profile: where it comes from, how good its fit is, and its step times.

    For example:

    deflector profile show h100-llama-3.1-8b

    deflector profile show a100-deepseek-v2-lite:slope=2.5
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """A built-in profile or a .json file; knobs may follow."""


@dataclass(frozen=True)
class Profile:
    """Step-time profiles: how long an engine's steps take.

    For example:

    deflector profile list

    deflector profile show h100-llama-3.1-8b
    """

    action: (
        Annotated[Fit, subcommand("fit")] | Annotated[List, subcommand("list")] | Annotated[Show, subcommand("show")]
    )


@dataclass(frozen=True)
class Policies:
    """List the routing policies with their parameters.

    For example:

    deflector policies
    """

    json: FileFlag = None
    """Write the list here."""


def run_evaluate(flags: Evaluate, console: Console) -> None:
    """Carries out `deflector evaluate`."""
    from deflector.training.evaluate import evaluate

    evaluate(flags, console)


def run_saturation(flags: Saturation, console: Console) -> None:
    """Carries out `deflector saturation`."""
    from deflector.training.saturation import saturation_rps
    from deflector.training.tables import print_saturation
    from deflector.training.world import read_sites

    sites = read_sites(flags)
    found = [(site.spec.name, site.source.name, saturation_rps(site.spec, site.source)) for site in sites]
    print_saturation(console, found)
    rows = [{"cluster": cluster, "workload": name, "saturation_rps": rate} for cluster, name, rate in found]
    _write(flags.json, {"command": "saturation", "cells": rows})


def run_trace(flags: Trace, console: Console) -> None:
    """Carries out `deflector trace`."""
    from deflector.envs.trace_files import read_trace
    from deflector.envs.trace_summary import summarise
    from deflector.training.trace_report import print_summary

    if flags.plot is not None and Path(flags.plot).suffix not in PICTURES:
        raise InputError(f"--plot {flags.plot}: name a file that ends in one of {', '.join(PICTURES)}")
    workload = read_trace(flags.file, seed=flags.seed)
    summary = summarise(workload)
    print_summary(console, flags.file, summary)
    _write(flags.json, {"command": "trace", "file": flags.file} | summary.as_dict())
    if flags.plot is not None:
        # Only here: matplotlib takes its time to import.
        from deflector.training.trace_plot import plot_trace

        plot_trace(workload, Path(flags.file).name, flags.plot)
        console.print(f"Picture: {flags.plot}", highlight=False, soft_wrap=True)


def run_profile(flags: Profile, console: Console) -> None:
    """Carries out `deflector profile`."""
    from deflector.envs.step_time import load_profile, profile_names
    from deflector.training.profile_report import print_profile, print_profiles

    match flags.action:
        case List():
            print_profiles(console, [load_profile(name) for name in profile_names()])
        case Show(name):
            print_profile(console, load_profile(name))
        case Fit() as fit:
            _fit(fit, console)


def _fit(flags: Fit, console: Console) -> None:
    from deflector.envs.profile_fit import fit_profile
    from deflector.training.profile_report import print_profile

    profile = fit_profile(
        flags.data,
        name=flags.name,
        model=flags.model,
        gpu=flags.gpu,
        engine=flags.engine,
        kv_bytes_per_token=flags.kv_bytes_per_token,
        kv_tokens_capacity=flags.kv_tokens_capacity,
        tensor_parallel=flags.tensor_parallel,
        block_size=flags.block_size,
        provenance=flags.provenance,
        provenance_note=flags.note,
        seed=flags.seed,
    )
    print_profile(console, profile)
    _write(flags.json, profile.model_dump(mode="json", by_alias=True))


def run_policies(flags: Policies, console: Console) -> None:
    """Carries out `deflector policies`."""
    from deflector.policies.registry import describe_policies
    from deflector.training.tables import print_policies

    described = list(describe_policies())
    print_policies(console, described)
    rows = [{"policy": name, "parameters": parameters, "summary": line} for name, parameters, line in described]
    _write(flags.json, {"command": "policies", "policies": rows})


def _write(path: str | None, content: dict[str, object]) -> None:
    if path is None:
        return
    from deflector.training.results_file import write_json

    write_json(path, content)
