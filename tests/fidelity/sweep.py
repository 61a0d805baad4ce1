"""Plays many random cases on the simulator and on vLLM's scheduler, and counts what they agree on.

Exit status: 0 if they agree in every step, 1 if not.
"""

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")

BATCH = 10


def play(seeds: range, asynchronous: bool) -> tuple[Counter[str], list[str]]:
    """What a batch of cases held, and the differences that it found."""
    from comparison import compare
    from workloads import seeded_case

    warnings.simplefilter("ignore")
    held, differences = Counter[str](), []
    for seed in seeds:
        result = compare(seeded_case(seed), asynchronous=asynchronous)
        held += result.held
        held["cases"] += 1
        held["disagreements"] += bool(result.difference)
        differences += [result.difference] if result.difference else []
    return held, differences


def results(seeds: range, workers: int, asynchronous: bool) -> Iterator[tuple[Counter[str], list[str]]]:
    batches = [seeds[k : k + BATCH] for k in range(0, len(seeds), BATCH)]
    if workers == 1:
        yield from (play(batch, asynchronous) for batch in batches)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(play, batches, [asynchronous] * len(batches))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow (default: 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--show", type=int, default=3, help="differences to print in full (default: %(default)s)")
    parser.add_argument("--asynchronous", action="store_true", help="use the scheduler for asynchronous engines")
    args = parser.parse_args()
    held, start_s, shown = Counter[str](), time.monotonic(), 0
    for batch, differences in results(range(args.seed, args.seed + args.cases), args.workers, args.asynchronous):
        held += batch
        for difference in differences[: args.show - shown]:
            shown += 1
            print(f"\n{difference}", flush=True)
        passed_s = time.monotonic() - start_s
        print(
            f"\r{held['cases']}/{args.cases} cases, {held['steps']:,} steps, {held['disagreements']} disagreements, "
            f"{passed_s:.0f} s", end="", file=sys.stderr, flush=True,
        )  # fmt: skip
    print(file=sys.stderr)
    for name in ("cases", "disagreements", *sorted(held.keys() - {"cases", "disagreements"})):
        print(f"{held[name]:>12,}  {name}")
    return 1 if held["disagreements"] else 0


if __name__ == "__main__":
    sys.exit(main())
