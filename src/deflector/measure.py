"""`deflector profile measure`: a campaign on a running engine, its profile, its link, the pictures.

On this floor because it joins both sides of the house: live measures, training draws.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
import yaml
from rich.console import Console

from deflector.envs.errors import InputError
from deflector.envs.step_time import StepTimeProfile, load_profile
from deflector.envs.written import write_json
from deflector.live.profiler.campaign import Campaign
from deflector.live.profiler.company import busy
from deflector.live.profiler.drive import EngineUnderTest
from deflector.live.profiler.flags import Measure
from deflector.live.profiler.transfers import LinkFit, measure_link, now_seed
from deflector.live.replay.client import Target, find_target, new_session
from deflector.live.replay.cluster_file import find_cluster
from deflector.live.router.config import LiveNode, RouterConfig, read_config
from deflector.training.profile_report import print_profile
from deflector.training.progress import Progress

REQUEST_S = 300.0
_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True)
class _Found:
    campaign: Campaign
    profile: StepTimeProfile
    link: LinkFit | None


def run_measure(flags: Measure, console: Console) -> None:
    """Carries out the command.

    Raises:
        InputError: In one line, with the remedy.
        OSError: If results cannot be written.
    """
    if not 0 < flags.minutes <= 24 * 60:
        raise InputError(f"--minutes {flags.minutes:g}: give a number from 0 to 1440")
    path, config = find_cluster(flags.cluster)
    with Progress() as progress:
        found = uvloop.run(_measure(flags, config, progress))
    print_profile(console, found.profile)
    for warning in found.campaign.warnings():
        console.print(f"Warning: {warning}", style="yellow", highlight=False)
    target = flags.json or f"{flags.name}.json"
    write_json(target, found.profile.model_dump(mode="json", by_alias=True))
    console.print(f"Profile: {target}", highlight=False, soft_wrap=True)
    if found.link is not None:
        console.print(
            f"Link: {found.link.gb_per_s:.3g} GB/s and {found.link.setup_s * 1e3:.3g} ms per transfer, "
            f"{found.link.front_s * 1e3:.3g} ms in the engines' servers",
            highlight=False,
        )
    if flags.endpoints is not None:
        _write_endpoints(Path(flags.endpoints), path, Path(target), found)
        console.print(f"Endpoints: {flags.endpoints}", highlight=False, soft_wrap=True)
    if flags.plots is not None:
        # Only here: matplotlib takes its time to import.
        from deflector.training.measured_plot import plot_fit, plot_link

        train, test = found.campaign.split()
        for picture in [plot_fit(found.profile, train, test, Path(flags.plots))] + (
            [plot_link(found.link.points, found.link.gb_per_s, found.link.setup_s,
                       found.profile.kv_bytes_per_token, Path(flags.plots))] if found.link else []
        ):  # fmt: skip
            console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


async def _measure(flags: Measure, config: RouterConfig, progress: Progress) -> _Found:
    decode = next(node for node in config.nodes if node.role != "prefill")
    prefill = next((node for node in config.nodes if node.role != "decode" and node is not decode), None)
    async with new_session(REQUEST_S) as session:
        target = await _target(session, decode)
        # All engines have one profile: it is measured where steps are largest.
        largest = max(
            [node for node in (decode, prefill) if node is not None],
            key=lambda node: node.max_num_batched_tokens or 0,
        )
        tested = await _target(session, largest)
        engine = EngineUnderTest(tested, now_seed())
        limits = await engine.limits()
        facts = await _facts(flags, tested, largest, limits.kv_tokens)
        budget_s = flags.minutes * 60
        campaign = Campaign(Path(flags.folder or f"{flags.name}.campaign"), limits, facts, flags.seed, budget_s)
        progress.begin(f"measuring {tested.url}, {len(campaign.measured)} experiments so far", total=int(budget_s))
        others = [node for node in config.nodes if node is not largest] if flags.company else []
        async with busy([await _target(session, node) for node in others], now_seed()):
            await campaign.run(engine, _seconds(progress))
        profile = campaign.fit()
        link = None
        if flags.link and prefill is not None:
            progress.begin("measuring transfers", total=30)
            source = await _target(session, prefill)
            link = await measure_link(source, target, limits, profile, now_seed(), progress.advance)
    return _Found(campaign, profile, link)


def _seconds(progress: Progress) -> Callable[[float], None]:
    return lambda passed_s: progress.advance(int(passed_s))


async def _target(session: Any, node: LiveNode) -> Target:
    return await find_target(session, node.url, node.api_key.get_secret_value() if node.api_key else None)


async def _facts(flags: Measure, target: Target, node: LiveNode, kv_tokens: int) -> dict[str, Any]:
    """What a profile says besides its times."""
    async with target.session.get(target.url + "/version", headers=target.headers) as answer:
        version = (await answer.json()).get("version", "") if answer.status == 200 else ""
    async with target.session.get(target.url + "/v1/models", headers=target.headers) as answer:
        root = Path(str((await answer.json())["data"][0].get("root", "")))
    bytes_per_token = flags.kv_bytes_per_token
    if bytes_per_token is None and target.model == "emulated":
        bytes_per_token = load_profile(node.profile).kv_bytes_per_token  # Its config.json is made up.
    return {
        "name": flags.name,
        "model": target.model,
        "gpu": flags.gpu or platform.processor() or platform.machine(),
        "engine": f"vllm {version}".strip(),
        "kv_bytes_per_token": bytes_per_token or _bytes_per_token(root / "config.json"),
        "kv_tokens_capacity": kv_tokens,
        "block_size": node.block_size,
    }


def _bytes_per_token(path: Path) -> float:
    """Of a model whose config.json is at hand: K and V of every layer, in the model's own precision."""
    try:
        model = json.loads(path.read_text())
        heads = model.get("num_key_value_heads", model["num_attention_heads"])
        size = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
        precision = _BYTES[model.get("dtype") or model.get("torch_dtype") or "bfloat16"]
        return float(2 * model["num_hidden_layers"] * heads * size * precision)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"--kv-bytes-per-token is missing, and {path} does not tell it ({type(error).__name__}: {error})"
        ) from None


def _write_endpoints(target: Path, source: Path, profile: Path, found: _Found) -> None:
    """The cluster's own file with the measured facts in the place of the assumed ones."""
    raw = read_config(source)
    for node in raw["nodes"]:
        node["profile"] = str(profile.resolve())
        if found.link is not None:
            node["link"] = found.link.text
    partial = target.with_suffix(target.suffix + ".partial")
    text = yaml.safe_dump(raw, sort_keys=False)
    partial.write_text(f"# {source.name} with what deflector profile measure has found\n{text}")
    partial.replace(target)
