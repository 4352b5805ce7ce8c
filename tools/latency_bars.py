"""How much faster than the best peer the target ``native`` is to be, and whether it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qfx.tools.bench_figures import Figure, at_least, at_most
from qfx.tools.latency_result import Result, Row

NATIVE = "qfx native"


@dataclass(frozen=True)
class LatencyBar:
    """``at_most``: native's time as a fraction of the best peer's, at the SQNR of the best int8 peer or better.

    ``peer``, computing in ``computes``, was the best when the bar was set: where it does not run, as bfloat16 on a CPU
    without it, the bar says nothing. Where another one is faster, that one counts.
    """

    model: str
    batch: int
    at_most: float
    peer: str
    computes: str


BARS = (
    LatencyBar("resnet18", 1, 0.70, "openvino int8", "int8"),
    LatencyBar("resnet50", 1, 0.75, "openvino int8", "int8"),
    LatencyBar("resnet50", 16, 0.75, "openvino int8", "int8"),
    LatencyBar("mobilenet_v2", 1, 0.85, "openvino int8", "int8"),
    LatencyBar("vit_s16", 1, 0.50, "openvino float", "bf16"),
    LatencyBar("bert_base", 1, 0.50, "openvino float", "bf16"),
)


def judged(of: Result, bars: Sequence[LatencyBar] = BARS) -> Iterator[Figure]:
    """The figures of the bars for this model and batch size, none where there is no bar."""
    for bar in bars:
        if (bar.model, bar.batch) == (of.model, of.batch):
            yield from _figures(of, bar)


def _figures(of: Result, bar: LatencyBar) -> Iterator[Figure]:
    native, peer, best = of.row(NATIVE), of.row(bar.peer), of.best_peer()
    what = f"{of.model}, batch {of.batch}: {NATIVE} as a fraction of the best peer"
    if native is None:
        yield Figure.skip(what, f"{NATIVE} did not run; the bar is {at_most(bar.at_most)}")
    elif best is None or peer is None or peer.computes != bar.computes:
        yield Figure.skip(what, f"{bar.peer} in {bar.computes} did not run; the bar is {at_most(bar.at_most)}")
    else:
        yield Figure(what, of.ratio(native, best), "x", at_most(bar.at_most), best.name)
        yield from _accuracy(of, native)


def _accuracy(of: Result, native: Row) -> Iterator[Figure]:
    int8 = of.best_peer("int8")
    if int8 is not None:
        what = f"{of.model}, batch {of.batch}: SQNR of {NATIVE}"
        yield Figure(what, native.sqnr_db, "dB", at_least(int8.sqnr_db), f"the bar is the SQNR of {int8.name}")
