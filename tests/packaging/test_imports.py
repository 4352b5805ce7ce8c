"""Who may import whom: the layers of the house, read from the source with ``ast``; nothing is imported here.

A module may import from its own layer and from those above it in the table. Imports inside functions and under
``TYPE_CHECKING`` count too: a layer that knows the one behind it knows it in both ways.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]

# Place a new module here. A package stands for all that is in it, unless a module of it is named itself.
LAYERS: dict[str, tuple[str, ...]] = {
    "values": ("affine", "errors", "metrics", "spec", "training"),
    "numerics": (
        "cpu",
        "fake_quant",
        "foreign_observer",
         "distributed",
        "jit",
        "kernels",
        "memory",
        "observers",
        "ops",
        "part",
        "recompute",
        "trained_fake_quant",
        "training_modules",
    ),
    "graphs": (
        "accuracy_control",
        "allocation",
        "artifact_file",
        "artifact_operators",
        "artifact_tensors",
        "attempt",
        "attributes",
        "auto_recipe",
        "bit_allocation",
        "budget",
        "calibration",
        "calling",
        "calls",
        "capture",
        "carried",
        "choices",
        "consumers",
        "digests",
        "divergence",
        "dry_run",
        "eval_form",
        "example_values",
        "examples",
        "exported",
        "fisher",
        "foreign_pass",
        "graph_json",
        "graph_module",
        "growth",
        "html_page",
        "inference",
        "integer_constants",
        "integer_weights",
        "interchange",
        "json_values",
        "kept_calls",
        "knapsack",
        "layers",
        "measure",
        "meta",
        "modes",
        "noise",
        "onnx_graph",
        "onnx_table",
        "operators",
        "optional",
        "origin",
        "patterns",
        "pipeline",
        "plain_results",
        "portable",
        "printer",
        "qconfig_mapping",
        "qconfig_spec",
        "range_use",
        "recipe",
        "recipe_file",
        "regions",
        "registry",
        "replay",
        "rewrite",
        "roundings",
        "samples",
        "scan",
        "schedule",
        "score_cache",
        "sensitivity_page",
        "sensitivity_plot",
        "sensitivity_table",
        "shadow",
        "shapes",
        "stage",
        "structure",
        "subject",
        "targets",
        "verify",
        "whole_file",
        "widths",
    ),
    "passes": ("passes",),
    "front": (
        "",
        "agreement",
        "api",
        "artifact",
        "batch_statistics",
        "bit_search",
        "clipping",
        "comparison",
        "compat",
        "compat_options",
        "distillation",
        "doctor",
        "dump_bisect",
        "dump_diff",
        "dump_dot",
        "dump_formats",
        "dump_measures",
        "dump_model",
        "dump_noise",
        "dump_page",
        "dump_passes",
        "dump_values",
        "dump_why",
        "dumping",
        "dynamo",
        "dynamo_graph",
        "dynamo_names",
        "dynamo_outline",
        "dynamo_ranges",
        "dynamo_regions",
        "dynamo_settings",
        "findings",
        "lowered",
        "native_report",
        "node_table",
        "node_views",
        "onnx_export",
        "parity",
        "pt2_export",
        "recording",
        "remedies",
        "report",
        "report_json",
        "rounding_sites",
        "testing",
    ),
    "tools": ("tools",),
}
# Beside the layers: reference models know nothing of qfx, and only tools may use them.
MODELS = "models"
USES_MODELS = ("models", "tools")

# What reference models may import besides Python's library: at the top, and inside functions.
MODELS_AT_TOP = {"torch"}
MODELS_IN_FUNCTIONS = {"numpy", "sklearn", "torch"}

# The torch that is deprecated for removal: no name of it may be used.
FORBIDDEN_PREFIXES = ("torch.ao", "torch.ops.quantized")
FORBIDDEN_NAMES = ("quint8", "qint8", "qint32", "quint4x2", "quint2x4")


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is dotted, ``top`` says that it is imported together with its module."""

    target: str
    line: int
    top: bool


def module_files() -> dict[str, Path]:
    """Module name -> file, over the real folders; the name relative to ``qfx`` ("" is ``qfx/__init__.py``)."""
    files: dict[str, Path] = {}
    for folder, prefix in (("qfx", ()), ("passes", ("passes",)), ("models", ("models",)), ("tools", ("tools",))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            parts = (*prefix, *relative.with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()
MODULES = sorted(FILES)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(tree: ast.AST, top: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below ``tree`` and whether importing the module runs it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, top
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            yield from statements(ast.Module(node.body, []), False)
            yield from statements(ast.Module(node.orelse, []), top)
        else:
            yield from statements(node, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(module: str) -> list[Import]:
    """The imports of one module, absolute; ``from package import name`` gives ``package.name``."""
    path = FILES[module]
    absolute = ".".join(filter(None, ("qfx", module)))
    package = absolute if path.name == "__init__.py" else absolute.rpartition(".")[0]
    found = []
    for node, top in statements(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, top) for alias in node.names]
        else:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found += [Import(f"{source}.{alias.name}", node.lineno, top) for alias in node.names]
    return found


IMPORTS = {module: imports_of(module) for module in MODULES}


def own_module(target: str) -> str | None:
    """The module of ours (relative to ``qfx``) that an imported name lies in, or None."""
    parts = target.split(".")
    if parts[0] != "qfx":
        return None
    candidates = (".".join(parts[1:end]) for end in range(len(parts), 0, -1))
    return next(name for name in candidates if name in FILES or not name)


def layer_of(module: str) -> str | None:
    """The layer of a module: that of the longest name in the table which is the module or a package around it."""
    parts = module.split(".")
    for name in [".".join(parts[:end]) for end in range(len(parts), 0, -1)]:
        for layer, members in LAYERS.items():
            if name in members:
                return layer
    return None


def is_model(module: str) -> bool:
    return module.split(".")[0] == MODELS


def where(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{line}"


def test_the_tree_was_found() -> None:
    assert {"errors", "spec", "passes", "models", "tools"} <= set(MODULES)
    assert not [m for m in MODULES if m.startswith(("passes.passes", "qfx"))]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    assert is_model(module) or layer_of(module), (
        f"{FILES[module].relative_to(ROOT)} is in no layer: place '{module}' in LAYERS of {Path(__file__).name}, "
        "as far up as what it imports allows"
    )


def test_no_module_has_two_layers() -> None:
    members = [name for names in LAYERS.values() for name in names]
    assert len(members) == len(set(members))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up_only(module: str) -> None:
    order = list(LAYERS)
    wrong = []
    for item in IMPORTS[module]:
        target = own_module(item.target)
        if target is None:
            continue
        if is_model(module) or is_model(target):
            if not (is_model(target) and module.split(".")[0] in USES_MODELS):
                wrong.append(f"{where(module, item.line)} imports {item.target}: models stand alone, for tools")
            continue
        mine, theirs = layer_of(module), layer_of(target)
        if mine and theirs and order.index(theirs) > order.index(mine):
            wrong.append(f"{where(module, item.line)} imports {item.target}: '{mine}' may not know '{theirs}'")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    graph = nx.DiGraph()
    for module in MODULES:
        targets = {own_module(item.target) for item in IMPORTS[module] if item.top}
        graph.add_edges_from((module, target) for target in targets if target not in (None, module))
    cycles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not cycles, f"these modules import one another: {cycles}"


@pytest.mark.parametrize("module", MODULES)
def test_only_declared_dependencies_at_import(module: str) -> None:
    """What is imported with a module is declared; an optional package is imported inside the function that needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    allowed = MODELS_AT_TOP if is_model(module) else declared
    wrong = [
        f"{where(module, item.line)} imports {item.target}: allowed here are {sorted(allowed)}"
        for item in IMPORTS[module]
        if item.top and item.target.split(".")[0] not in {"qfx", *allowed, *sys.stdlib_module_names}
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in MODULES if is_model(m)])
def test_models_need_torch_only(module: str) -> None:
    allowed = {"qfx", *MODELS_IN_FUNCTIONS, *sys.stdlib_module_names}
    wrong = [item for item in IMPORTS[module] if item.target.split(".")[0] not in allowed]
    assert not wrong, "\n".join(f"{where(module, item.line)} imports {item.target}" for item in wrong)


def forbidden_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names of torch's deprecated quantization used in code; docstrings, comments and messages may speak of them."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            if name.startswith(FORBIDDEN_PREFIXES) or name.rpartition(".")[2] in FORBIDDEN_NAMES:
                yield name, node.lineno


@pytest.mark.parametrize("module", [m for m in MODULES if m.split(".")[0] != "tools"])
def test_no_deprecated_torch(module: str) -> None:
    uses = sorted(set(forbidden_uses(ast.parse(FILES[module].read_text()))))
    assert not uses, "\n".join(f"{where(module, line)} uses {name}" for name, line in uses)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.ao.quantization as q",
        "from torch import ao",
        "from torch.ao.nn import quantized",
        "torch.quint8",
        "x.to(torch.qint8)",
        "torch.ops.quantized.linear(x)",
        "torch.ops.quantized_decomposed.quantize_per_tensor(x)",
    ],
)
def test_deprecated_torch_would_be_seen(source: str) -> None:
    assert list(forbidden_uses(ast.parse(source)))
    assert not list(forbidden_uses(ast.parse(f'"""{source}"""  # {source}')))


def test_hidden_imports_would_be_seen() -> None:
    source = """
import a
try:
    import b
except ImportError:
    import c
if TYPE_CHECKING:
    import d
else:
    import e
def f():
    with x:
        import g
class C:
    import h
    def m(self):
        match x:
            case 1:
                import i
"""
    found = {node.names[0].name: top for node, top in statements(ast.parse(source))}
    assert found == {"a": True, "b": True, "c": True, "d": False, "e": True, "g": False, "h": True, "i": False}
