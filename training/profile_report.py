"""Step-time profiles on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deflector.envs.step_time import VALIDITY_MARGIN, StepTimeProfile

PROMPT_SIZES = (128, 512, 2048, 8192)
BATCH_SIZES = (1, 8, 32, 128)
CONTEXT_TOKENS = 1000


def print_profiles(console: Console, profiles: Sequence[StepTimeProfile]) -> None:
    """Prints one line per profile."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("\nprofile", no_wrap=True)
    table.add_column("\nfrom")
    for head in ("KV\nk tokens", "prefill of\n2048, ms", "decode of 32\nat 1k, ms", "fit error\n%"):
        table.add_column(head, justify="right")
    for profile in profiles:
        overall = profile.fit_error.overall
        table.add_row(
            Text(profile.name, style="bold"),
            profile.provenance,
            f"{profile.kv_tokens_capacity / 1000:,.0f}",
            f"{_prefill_ms(profile, 2048):.1f}",
            f"{_decode_ms(profile, 32):.1f}",
            "-" if overall is None else f"{overall.mape * 100:.1f}",
        )
    console.print(table)


def print_profile(console: Console, profile: StepTimeProfile) -> None:
    """Prints where a profile comes from, how good its fit is, and its step times."""
    parallel = f", tensor parallel {profile.tensor_parallel}" if profile.tensor_parallel > 1 else ""
    console.print(Text(profile.name, style="bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    valid = profile.valid
    ranges = {"step": valid.step_tokens, "context": valid.context_tokens, "KV of a batch": valid.kv_tokens}
    for name, value in (
        ("model", f"{profile.model} on {profile.gpu}{parallel}, {profile.engine}"),
        ("provenance", f"{profile.provenance}: {profile.provenance_note}"),
        ("valid up to", "; ".join(f"{name} {tokens:,} tokens" for name, tokens in ranges.items() if tokens)),
        ("KV cache", f"{profile.kv_tokens_capacity:,} tokens of {profile.kv_bytes_per_token:,.0f} bytes"),
        ("fit error", _fit_error(profile)),
    ):
        facts.add_row(name, Text(value))
    console.print(facts)
    console.print()
    sizes = [tokens for tokens in PROMPT_SIZES if tokens <= VALIDITY_MARGIN * valid.step_tokens]
    prompts = [f"{_prefill_ms(profile, tokens):.1f}" for tokens in sizes]
    decodes = [f"{_decode_ms(profile, batch):.1f}" for batch in BATCH_SIZES]
    _print_times(console, "prompt tokens in one step", sizes, prompts)
    _print_times(console, f"sequences of {CONTEXT_TOKENS:,} tokens, decoding", BATCH_SIZES, decodes)


def _print_times(console: Console, title: str, sizes: Sequence[int], times_ms: Sequence[str]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column(title, min_width=34)
    for size in sizes:
        table.add_column(f"{size:,}", justify="right", min_width=6)
    table.add_row("step time, ms", *times_ms)
    console.print(table)


def _fit_error(profile: StepTimeProfile) -> str:
    regions = {name: getattr(profile.fit_error, name) for name in ("overall", "prefill", "decode", "mixed")}
    known = [
        f"{name} {error.mape * 100:.1f} %, P95 {error.p95 * 100:.1f} %" for name, error in regions.items() if error
    ]
    return "mean absolute: " + "; ".join(known) if known else "not known: nothing measured to compare with"


def _prefill_ms(profile: StepTimeProfile, tokens: int) -> float:
    return float(profile.step_time_s(tokens, tokens * tokens / 2, 0, 0)) * 1000


def _decode_ms(profile: StepTimeProfile, batch: int) -> float:
    return float(profile.step_time_s(0, 0, batch, batch * CONTEXT_TOKENS)) * 1000
