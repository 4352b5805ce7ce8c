"""The benchmarks: ``python -m qfx.tools.bench [NAME ...] [--data DIR] [--json FILE]`` prints figures beside their bars.

Without names all are run. Times are ratios of one run on one machine: the candidates take turns in one process (or
each has a process of its own), in rounds, and medians count. The exit status is 1 where a bar is missed or a benchmark
fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from qfx.targets import TARGETS, choose
from qfx.tools.bench_accuracy import cifar10, perplexity, sqnr
from qfx.tools.bench_artifact import artifact
from qfx.tools.bench_backend import backend
from qfx.tools.bench_compat import compat_sqnr
from qfx.tools.bench_cost import memory, quantize_time
from qfx.tools.bench_coverage import coverage, timm, torchvision, transformers
from qfx.tools.bench_decode import decode
from qfx.tools.bench_dump import dump_page
from qfx.tools.bench_figures import Figure, Options, Skip, brief, table
from qfx.tools.bench_onnx import exported
from qfx.tools.bench_parity import parity
from qfx.tools.bench_search import allocation_time, rank_agreement, scan_time, searched
from qfx.tools.bench_training import agreement, training
from qfx.tools.env import machine
from qfx.tools.latency_figures import latency

Benchmark = Callable[[Options], Iterator[Figure]]

BENCHMARKS: dict[str, Benchmark] = {
    "coverage": coverage,
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "parity": parity,
    "backend": backend,
    "compat": compat_sqnr,
    "sqnr": sqnr,
    "cifar10": cifar10,
    "perplexity": perplexity,
    "quantize-time": quantize_time,
    "dump": dump_page,
    "memory": memory,
    "latency": latency,
    "decode": decode,
    "training": training,
    "agreement": agreement,
    "scan": scan_time,
    "rank": rank_agreement,
    "allocation": allocation_time,
    "search": searched,
    "onnx": exported,
    "artifact": artifact,
}


def header(options: Options) -> list[tuple[str, str]]:
    """The machine and the versions that the figures hold for."""
    return [*machine(), ("target", choose(options.target).name)]


def measure(name: str, benchmark: Benchmark, options: Options) -> list[Figure]:
    """All figures of one benchmark; a skip or an error on the way ends it and is the last of them."""
    figures = []
    try:
        for figure in benchmark(options):
            figures.append(figure)
            print(f"  {name}: {figure.what}", file=sys.stderr, flush=True)
    except Skip as reason:
        figures.append(Figure.skip(name, str(reason)))
    except Exception as error:  # one benchmark's failure must not cost the figures of the others
        traceback.print_exc()
        figures.append(Figure.fail(name, brief(error)))
    return figures


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qfx.tools.bench", description="Run the benchmarks of qfx.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of " + ", ".join(BENCHMARKS) + "; default: all")
    parser.add_argument("--data", type=Path, help="folder of real data and weights, for cifar10 and perplexity")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--target", default="auto", choices=("auto", *TARGETS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, default: %(default)s")
    known = parser.parse_args(argv)
    if unknown := set(known.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    options = Options(target=given.target, data=given.data)
    facts = header(options)
    print(tabulate(facts, tablefmt="plain", disable_numparse=True))
    results: dict[str, list[Figure]] = {}
    for name in given.names or BENCHMARKS:
        start = time.perf_counter()
        results[name] = measure(name, BENCHMARKS[name], options)
        print(f"\n{name} ({time.perf_counter() - start:.0f} s)\n{table(results[name])}", flush=True)
    if given.json:
        plain = {name: [dataclasses.asdict(f) | {"verdict": f.verdict} for f in fs] for name, fs in results.items()}
        text = json.dumps({"machine": dict(facts), "figures": plain}, indent=1, ensure_ascii=False)
        given.json.write_text(text + "\n", encoding="utf-8")
    return 0 if all(f.good for figures in results.values() for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
