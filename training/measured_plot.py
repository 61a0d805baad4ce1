"""Pictures of a measured profile: steps against its formula, and the link's transfers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from deflector.envs.profile_fit import StepRecords
from deflector.envs.step_time import StepTimeProfile
from deflector.training.plot_style import COLORS, MARKERS

LEAST_MS = 0.5
REGIONS = ("prefill only", "decode only", "prefill beside decodes")


def plot_fit(profile: StepTimeProfile, train: StepRecords, test: StepRecords, folder: Path) -> Path:
    """Measured over predicted step times, and the step time that a chunk adds beside a batch (the paper's Figure 1)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for region, name in enumerate(REGIONS):
        for records, alpha, label in ((train, 0.12, None), (test, 0.9, name)):
            of_it = records.take(records.region == region)
            predicted_ms = 1e3 * profile.step_time_s(of_it.chunk_tokens, of_it.q, of_it.batch, of_it.kv_tokens)
            left.scatter(
                predicted_ms, of_it.step_ms, s=9, alpha=alpha, color=COLORS[(5, 4, 3)[region]],
                marker=MARKERS[region], linewidths=0, label=label,
            )  # fmt: skip
    ends = np.array([train.step_ms.min(), train.step_ms.max()])
    left.plot(ends, ends, color=COLORS[0], linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="Predicted step time (ms)", ylabel="Measured step time (ms)")
    error = profile.fit_error.overall
    said = f": mean error {error.mape * 100:.1f} % on steps held out" if error else ""
    left.set_title(f"{profile.name}{said}", fontsize=10)
    left.legend(title="bold: held out, pale: fitted", fontsize=8, title_fontsize=8)
    chunks = np.unique(np.geomspace(16, profile.valid.step_tokens, 40).astype(int)).astype(float)
    contexts = (0, 1024, 8192) if (profile.valid.context_tokens or 0) >= 8192 else (0, 1024)
    for context, batch in ((context, batch) for batch in (1, 32) for context in contexts):
        kv_tokens = batch * 1024.0
        alone_ms = 1e3 * float(profile.step_time_s(0, 0, batch, kv_tokens))
        with_ms = 1e3 * profile.step_time_s(chunks, chunks * (context + chunks / 2), batch, kv_tokens)
        right.plot(
            chunks, with_ms - alone_ms, color=COLORS[(5, 4, 3)[contexts.index(context)]],
            linestyle="-" if batch == 1 else "--", label=f"context {context:,}, batch {batch}",
        )  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="Chunk (tokens)", ylabel="Added to the step (ms)")
    right.set_title("What a deflected chunk costs running streams", fontsize=10)
    right.legend(fontsize=8)
    return _save(figure, folder / f"{profile.name}-fit.png")


def plot_link(
    points: Sequence[tuple[int, float]], gb_per_s: float, setup_s: float, kv_bytes_per_token: float, folder: Path
) -> Path:
    """Transfers as measured, and the line through them."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    tokens, seconds = np.array(points, dtype=float).T
    # Now and then a transfer stalls for seconds: a linear axis would show nothing else.
    axes.scatter(tokens, np.maximum(seconds * 1e3, LEAST_MS), s=14, color=COLORS[4], label="measured")
    line = np.geomspace(tokens.min(), tokens.max(), 50)
    axes.plot(line, 1e3 * (setup_s + line * kv_bytes_per_token / (gb_per_s * 1e9)), color=COLORS[5], label="fitted")
    axes.set(
        xscale="log", yscale="log", xlabel="Prompt (tokens)", ylabel=f"Transfer (ms; {LEAST_MS:g} is that or less)"
    )
    axes.set_title(f"KV link: {gb_per_s:.3g} GB/s and {setup_s * 1e3:.3g} ms each", fontsize=10)
    axes.legend()
    return _save(figure, folder / "link.png")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
