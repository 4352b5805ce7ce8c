"""A stage as graphviz text: regions in integers are clusters, crossings between float and integers are coloured."""

from __future__ import annotations

from collections.abc import Iterator

from qfx.dump_model import Dump, NodeView, StageView

INTEGER, CROSSING, FLOAT, END = "#cfe8d5", "#f6c177", "#ffffff", "#e3e6ea"


def dot(dump: Dump) -> str:
    """One ``digraph`` a stage, without the constants; the same on every run."""
    return "\n".join(_digraph(dump, view) for view in dump.stages)


def _digraph(dump: Dump, view: StageView) -> str:
    nodes = {n.name: n for n in view.nodes if not n.constant}
    lines = [
        f"digraph {_quoted(f'{dump.model} {view.title}')} {{",
        f"  label={_quoted(f'{dump.model} {view.title}: {dump.recipe}, {dump.target}')};",
        '  node [shape=box, style="filled,rounded", fontname="Helvetica", fontsize=10];',
    ]
    for region in sorted({n.region for n in nodes.values() if n.region is not None}):
        lines += [
            f"  subgraph cluster_{region} {{",
            f"    label={_quoted(f'integers, region {region}')}; color=\"#4c9a6a\"; style=rounded;",
            *(f"    {line}" for n in nodes.values() if n.region == region for line in _node(n)),
            "  }",
        ]
    lines += [f"  {line}" for n in nodes.values() if n.region is None for line in _node(n)]
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in view.edges if a in nodes and b in nodes]
    return "\n".join([*lines, "}\n"])


def _node(node: NodeView) -> Iterator[str]:
    words = (node.name, node.kernel or node.target, node.kind, node.layer)
    label = "\\n".join(_escaped(word) for word in dict.fromkeys(words) if word)
    yield f'{_quoted(node.name)} [label="{label}", fillcolor="{_colour(node)}"];'


def _colour(node: NodeView) -> str:
    if node.op in ("placeholder", "output"):
        return END
    return CROSSING if node.crossing else INTEGER if node.integer else FLOAT


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
