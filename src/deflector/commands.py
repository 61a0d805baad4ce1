"""The commands' flags, one dataclass each, and what carries each command out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from rich.console import Console
from tyro.conf import Positional, arg, subcommand

from deflector.envs.errors import InputError
from deflector.live.profiler.flags import Measure
from deflector.training.settings import Evaluate, Export, Judge, Saturation
from deflector.training.train_flags import Train

# Everything else is imported where it is used: `deflector --help` shall not wait for Numba, let alone for torch.

_Value = TypeVar("_Value")

PICTURES = (".png", ".svg", ".pdf")

FileFlag = Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")]
TextFlag = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
CountFlag = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
NumberFlag = Annotated[float | None, arg(metavar="X", help_behavior_hint="")]


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
    """Fit a profile to measured engine steps, or to measured kernels.

    DATA is a CSV file with the columns chunk_tokens, context_tokens, decode_batch, decode_kv_tokens, step_ms, or JSON
    lines such as {"chunks": [[0, 512]], "decodes": 3, "kv_tokens": 4096, "step_ms": 31.5}; either also gzipped. A file
    needs --name, --model, --gpu, --kv-bytes-per-token and --kv-tokens-capacity.

    Or DATA is a folder of kernel times in microseconds (dense.csv, attention.csv, per_sequence.csv, also gzipped) with
    a meta.json that names the model; then only what meta.json leaves open has to be given.

    For example:

    deflector profile fit steps.csv --name my-a100 --gpu A100-80GB --model Llama-3.1-8B --kv-bytes-per-token 131072
    --kv-tokens-capacity 400000 --json my-a100.json

    deflector profile fit benchmarks/data/rtx-pro-6000-llama-3.1-8b --kv-tokens-capacity 450000 --json rtx.json
    """

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """The step records, or the folder of kernel times."""
    name: TextFlag = None
    """What to call the profile; by default the folder's name."""
    model: TextFlag = None
    """Model that was measured; by default the one in meta.json."""
    gpu: TextFlag = None
    """GPU that it ran on."""
    kv_bytes_per_token: NumberFlag = None
    """Bytes of KV cache per token, over all tensor-parallel ranks; known for well-known models."""
    kv_tokens_capacity: CountFlag = None
    """Tokens whose KV an engine holds; by default what meta.json says."""
    engine: TextFlag = None
    """Engine and version; by default vllm, or what meta.json says."""
    tensor_parallel: CountFlag = None
    """GPUs per engine; by default 1, or what meta.json says."""
    block_size: CountFlag = None
    """Tokens per KV block; by default 16, or what meta.json says."""
    layers: CountFlag = None
    """A folder's model has so many layers; by default what meta.json says, or what is known of the model."""
    step_overhead_ms: float = 0.0
    """A folder's kernels leave out so much time per step; `deflector compare-run` finds it from a recorded run."""
    provenance: Literal["measured", "derived", "synthesised", "invented"] = "measured"
    """What the records are."""
    note: str = ""
    """Where they come from."""
    seed: int = 0
    """Chooses the fifth of the steps that the fit does not see and is judged on."""
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
        Annotated[Measure, subcommand("measure")]
        | Annotated[Fit, subcommand("fit")]
        | Annotated[List, subcommand("list")]
        | Annotated[Show, subcommand("show")]
    )


@dataclass(frozen=True)
class CompareRun:
    """Replay a recorded run of a real engine and compare request by request.

    FOLDER holds kernel times (dense.csv, attention.csv, per_sequence.csv), requests.jsonl (input_toks, output_toks,
    queued_ts, first_token_ts, last_token_ts in seconds; prefix_block_hashes and scheduled_ts if known) and meta.json
    (model, max_num_seqs, max_num_batched_tokens, num_gpu_blocks); any may be gzipped. The profile is fitted to the
    kernel times. One number is fitted to the run, the time per step beyond its kernels, on the first half of the
    requests; the second half judges it. Times count from queued_ts.

    For example:

    deflector compare-run benchmarks/data/rtx-pro-6000-llama-3.1-8b --json run.json --plot run.png
    """

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """The recorded run."""
    profile: TextFlag = None
    """Step times from this built-in profile or .json file instead of the folder's tables; the constant replaces its
    own step_overhead_ms."""
    step_constant_ms: NumberFlag = None
    """Milliseconds per step beyond the kernels, instead of the fitted number."""
    kv_blocks: CountFlag = None
    """KV blocks as vLLM counts them (num_gpu_blocks); by default what meta.json says, or plenty."""
    max_num_seqs: CountFlag = None
    """Sequences that run at once; by default what meta.json says."""
    max_num_batched_tokens: CountFlag = None
    """Tokens per step; by default what meta.json says."""
    prefix_caching: bool = True
    """Prompts share blocks of equal contents, unless meta.json says that they did not."""
    layers: CountFlag = None
    """Layers of the model; by default what meta.json says, or what is known of the model."""
    json: FileFlag = None
    """Write all figures here, those of each request too."""
    plot: FileFlag = None
    """Draw simulated over measured here (.png, .svg, .pdf)."""


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


def run_judge(flags: Judge, console: Console) -> None:
    """Carries out `deflector judge`."""
    from deflector.training.judge_report import run_judge

    run_judge(flags, console)


def run_saturation(flags: Saturation, console: Console) -> None:
    """Carries out `deflector saturation`."""
    from deflector.envs.saturation import saturation_rps
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

    _check_picture(flags.plot)
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
        case Measure() as measure:
            from deflector.measure import run_measure

            run_measure(measure, console)


def _fit(flags: Fit, console: Console) -> None:
    from deflector.envs.profile_fit import fit_profile
    from deflector.envs.run_profile import fit_folder
    from deflector.training.profile_report import print_profile

    if Path(flags.data).is_dir():
        profile = fit_folder(
            flags.data,
            kv_tokens_capacity=flags.kv_tokens_capacity,
            layers=flags.layers,
            name=flags.name,
            model=flags.model,
            gpu=flags.gpu,
            engine=flags.engine,
            kv_bytes_per_token=flags.kv_bytes_per_token,
            tensor_parallel=flags.tensor_parallel,
            block_size=flags.block_size,
            provenance=flags.provenance,
            provenance_note=flags.note,
            step_overhead_ms=flags.step_overhead_ms,
            seed=flags.seed,
        )
    else:
        if flags.layers is not None or flags.step_overhead_ms:
            raise InputError(
                "--layers, --step-overhead-ms: they go with a folder of kernel times, not with step records"
            )
        profile = fit_profile(
            flags.data,
            name=_needed(flags.name, "name"),
            model=_needed(flags.model, "model"),
            gpu=_needed(flags.gpu, "gpu"),
            engine=flags.engine or "vllm",
            kv_bytes_per_token=_needed(flags.kv_bytes_per_token, "kv-bytes-per-token"),
            kv_tokens_capacity=_needed(flags.kv_tokens_capacity, "kv-tokens-capacity"),
            tensor_parallel=1 if flags.tensor_parallel is None else flags.tensor_parallel,
            block_size=16 if flags.block_size is None else flags.block_size,
            provenance=flags.provenance,
            provenance_note=flags.note,
            seed=flags.seed,
        )
    print_profile(console, profile)
    _write(flags.json, profile.model_dump(mode="json", by_alias=True))


def _needed(value: _Value | None, flag: str) -> _Value:
    if value is None:
        raise InputError(f"--{flag} is missing: a fit to step records needs it: see deflector profile fit --help")
    return value


def run_compare_run(flags: CompareRun, console: Console) -> None:
    """Carries out `deflector compare-run`."""
    from deflector.training.progress import Progress
    from deflector.training.run_comparison import EXPECTED_REPLAYS, RunSettings, compare_run
    from deflector.training.run_report import print_comparison

    _check_picture(flags.plot)
    for value, name in ((flags.kv_blocks, "kv-blocks"), (flags.layers, "layers")):
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: give a number of 1 or more")
    settings = RunSettings(
        folder=flags.folder,
        profile=flags.profile,
        layers=flags.layers,
        kv_blocks=flags.kv_blocks,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        prefix_caching=flags.prefix_caching,
        step_constant_ms=flags.step_constant_ms,
    )
    with Progress() as progress:
        progress.begin("Replaying", total=1 if flags.step_constant_ms is not None else EXPECTED_REPLAYS)
        comparison = compare_run(settings, progress.advance)
    print_comparison(console, flags.folder, comparison)
    _write(flags.json, {"command": "compare-run", "folder": flags.folder} | comparison.as_dict())
    if flags.plot is not None:
        # Only here: matplotlib takes its time to import.
        from deflector.training.run_plot import plot_comparison

        plot_comparison(comparison, Path(flags.folder).resolve().name, flags.plot)
        console.print(f"Picture: {flags.plot}", highlight=False, soft_wrap=True)


def _check_picture(path: str | None) -> None:
    if path is not None and Path(path).suffix not in PICTURES:
        raise InputError(f"--plot {path}: name a file that ends in one of {', '.join(PICTURES)}")


def run_train(flags: Train, console: Console) -> None:
    """Carries out `deflector train`."""
    try:
        from deflector.training.train import train
    except ModuleNotFoundError as error:
        raise InputError(f"train needs {error.name}, which is not here: pip install 'deflector[train]'") from error
    train(flags, console)


def run_export(flags: Export, console: Console) -> None:
    """Carries out `deflector export`."""
    try:
        from deflector.training.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise InputError(
            f"export reads checkpoints with torch, and there is no {error.name} here: pip install 'deflector[train]'"
        ) from error
    exported = export_checkpoint(flags.source, flags.out)
    console.print(
        f"{exported.checkpoint}: {exported.parameters:,} weights to {flags.out}: use it as learned:{flags.out}",
        highlight=False,
        soft_wrap=True,
    )
    _write(flags.json, {"command": "export", "out": flags.out} | exported.as_dict())


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
    from deflector.envs.written import write_json

    write_json(path, content)
