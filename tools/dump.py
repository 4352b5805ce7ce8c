"""Shows a model's graph at any stage of the compiler, and what happened in between.

Run: ``qfx-dump MODEL`` or ``python -m qfx.tools.dump MODEL``.

The model is a reference model's name, ``package.module:factory`` (a callable that returns a model, or a model and its
example inputs), or the file of a saved model.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import qfx
from qfx.auto_recipe import AutoRecipe
from qfx.dump_formats import FORMATS
from qfx.dump_why import nearest
from qfx.dumping import STAGES
from qfx.errors import ConfigError, QfxError, QfxWarning
from qfx.examples import as_example
from qfx.memory import reused
from qfx.models import MODELS, MODELS_SMALL
from qfx.printer import DTYPES
from qfx.recipe import PRESETS
from qfx.targets import TARGETS
from qfx.whole_file import write_whole

ROWS = 16
"""Of an array of calibration data that make one batch."""

_OBJECTS = 20_000  # that are made before the youngest are looked through; Python's own number is 700

_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>\w+)\[(?P<sizes>\s*\d+(?:\s*,\s*\d+)*\s*)?\](?:<(?P<below>[1-9]\d*))?"
)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        prog="qfx-dump", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("model", help=f"{', '.join(MODELS)}; package.module:factory; or a file.qfx")
    add("--small", action="store_true", help="the reference model at a size for tests")
    add(
        "--input",
        action="append",
        default=[],
        metavar="TYPE[SIZES]",
        help="what the model is called with, such as 'f32[2,3,224,224]' or 'ids=i64[1,16]<1000' (integers below 1000); "
        "once for every argument",
    )
    add("--stages", metavar="NAME,...", help=f"of {', '.join(STAGES)}; by default the last, for json and html all")
    add("--diff", metavar="A..B", help="what became of each node between two stages")
    add("--layer", metavar="GLOB", help="show these layers only, such as 'layer1.*'")
    add("--why", metavar="NODE_OR_LAYER", help="explain a node, or every operator of a layer")
    add("--pass-by-pass", action="store_true", help="what each pass rewrote, and how long it took")
    add("--bisect", type=float, metavar="DB", help="the first pass behind which the output's SQNR is below DB")
    add("--format", default="table", metavar="NAME", help=f"one of {', '.join(FORMATS)}")
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        help="noise, histograms and times of every node; by default where the format shows them",
    )
    add("--recipe", default="int8", help=f"{', '.join(PRESETS)}, auto, or a file.toml of a recipe")
    add("--target", default="auto", help=f"auto, {', '.join(TARGETS)}")
    add("--calibration", metavar="FILE.npz|N", help="arrays of inputs, or N random batches; by default the example")
    add("--output", type=Path, metavar="FILE", help="write here, not to the console")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 where the user can mend what is wrong, which is told on stderr."""
    given = arguments(argv)
    with _few_collections(), reused(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", QfxWarning)
        try:
            text = shown(given)
            if given.output is not None:
                write_whole(given.output, text.encode())
        except QfxError as error:
            return _complain(str(error))
        except OSError as error:
            return _complain(f"{error.filename or given.model}: {error.strerror or error}")
    for warning in told:
        if issubclass(warning.category, QfxWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    if given.output is None:
        sys.stdout.write(text)
    return 0


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let Python look for garbage less often, and not in what was imported: that takes a second in all, and finds none.

    Graphs and exported programs are cycles that hold tensors, so it is not turned off. A program that ends looks for
    none at all: that would take another second.
    """
    atexit.register(gc.freeze)
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _complain(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def shown(given: argparse.Namespace) -> str:
    """What the options ask for."""
    model, example = subject(given.model, given.input, small=given.small)
    saved = isinstance(model, Path)
    if saved and (given.calibration is not None or given.recipe != "int8"):
        raise ConfigError(
            f"{given.model} is quantized already: it takes no recipe and no calibration",
            hint="give the float model to quantize it anew",
        )
    return qfx.dump(
        model,
        example,
        stages=given.stages,
        diff=given.diff,
        layer=given.layer,
        why=given.why,
        pass_by_pass=given.pass_by_pass,
        bisect=given.bisect,
        format=given.format,
        measure=given.measure,
        recipe=recipe_of(given.recipe),
        target=given.target,
        calibration=None if given.calibration is None else calibration_of(given.calibration, example),
    )


def recipe_of(text: str) -> str | qfx.Recipe | AutoRecipe:
    """A recipe's name, or the recipe of a file."""
    return qfx.Recipe.load(text) if text.endswith(".toml") else text


# --- the model --------------------------------------------------------------------------------------------------------


def subject(name: str, inputs: Sequence[str], *, small: bool = False) -> tuple[nn.Module | Path, Any]:
    """The model that ``name`` means, or the path of a saved one, and what it is called with (None: nobody says).

    Raises:
        ConfigError: there is no such thing, or nothing says what to call it with.
    """
    table = MODELS_SMALL if small else MODELS
    if name in table:
        model, example = table[name]()
        return model, example_of(inputs) or example
    if small:
        raise ConfigError(f"there is no reference model {name!r}", hint=nearest(name, MODELS_SMALL))
    if ":" in name:
        return _made(name, inputs)
    if name.endswith(".qfx") or os.path.exists(name):
        return Path(name), example_of(inputs)
    raise ConfigError(
        f"there is no reference model and no file {name!r}",
        hint=nearest(name, MODELS) + "; a model of your own is package.module:factory",
    )


def _made(name: str, inputs: Sequence[str]) -> tuple[nn.Module, Any]:
    """What the user's factory makes."""
    factory = _factory(name)
    try:
        made = factory if isinstance(factory, nn.Module) else factory()
    except QfxError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} failed: {type(error).__name__}: {error}") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name} returns a {type(made).__name__}", hint="return a model, or a model and its example inputs"
        )
    example = example_of(inputs) or example
    if example is None:
        raise ConfigError(
            f"{name} gives no example inputs", hint="return them behind the model, or give --input 'f32[2,3,224,224]'"
        )
    return model, example


def _factory(name: str) -> nn.Module | Callable[[], Any]:
    module_name, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's module lies where the command is given
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"{module_name} has no {path!r}", hint=nearest(part, (n for n in vars(found) if n[:1] != "_"))
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name} is a {type(found).__name__}", hint="name a function that returns a model")
    return found  # type: ignore[no-any-return]


# --- what it is called with -------------------------------------------------------------------------------------------


def example_of(inputs: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor] | None:
    """Seeded random tensors as ``--input`` describes them: normal, or integers below a bound (2); None for none.

    Raises:
        ConfigError: a text is no type and sizes, or some inputs are named and others are not.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    found = [_tensor(text, generator) for text in inputs]
    names = [name for name, _ in found if name]
    if names and (len(names) < len(found) or len(set(names)) < len(names)):
        raise ConfigError("inputs are given by position, or each by a name of its own", hint="name all, or none")
    if not found:
        return None
    return {name: t for name, t in found} if names else tuple(t for _, t in found)


def _tensor(text: str, generator: torch.Generator) -> tuple[str, Tensor]:
    match = _INPUT.fullmatch(text.strip())
    dtypes = {word: dtype for dtype, word in DTYPES.items()}
    dtype = dtypes.get(match["dtype"]) if match else None
    if match is None or dtype is None:
        raise ConfigError(
            f"{text!r} describes no input", hint=f"write f32[2,3,224,224] or i64[1,16]<1000; types: {', '.join(dtypes)}"
        )
    sizes = [int(size) for size in (match["sizes"] or "").split(",") if size.strip()]
    if dtype.is_floating_point:
        return match["name"] or "", torch.randn(sizes, generator=generator, device="cpu").to(dtype)
    below = int(match["below"] or 2)
    return match["name"] or "", torch.randint(below, sizes, generator=generator, device="cpu").to(dtype)


def calibration_of(text: str, example: Any) -> list[Any]:
    """Calls like ``example``: the arrays of a file, in batches of 16 rows, or a number of random ones.

    Random integers are drawn from the example's own, so that token ids and masks stay what they are.

    Raises:
        ConfigError: it is neither a file of arrays nor a number, or the arrays are not what the example has.
    """
    if text.isdigit() and int(text):
        generator = torch.Generator("cpu").manual_seed(0)
        return [tree_map_only(Tensor, lambda t: _like(t, generator), example) for _ in range(int(text))]
    if not text.endswith(".npz"):
        raise ConfigError(f"{text!r} is no calibration", hint="give a file.npz, or a number of random batches")
    try:
        with np.load(text, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{text} cannot be read: {error}") from error
    return _batches(text, arrays, example)


def _like(t: Tensor, generator: torch.Generator) -> Tensor:
    if t.is_floating_point():
        return torch.randn(t.shape, generator=generator, device="cpu").to(t)
    values = t.flatten()
    drawn = torch.randint(max(1, len(values)), t.shape, generator=generator, device="cpu")
    return values[drawn] if len(values) else t


def _batches(text: str, arrays: Mapping[str, Tensor], example: Any) -> list[Any]:
    call = as_example(example)
    wanted = tuple(call.kwargs) or len(call.args)
    if isinstance(wanted, tuple) and any(name not in arrays for name in wanted):
        raise ConfigError(f"{text} has the arrays {list(arrays)}, the example has {list(wanted)}")
    if isinstance(wanted, int) and len(arrays) < wanted:
        raise ConfigError(f"{text} has {len(arrays)} arrays, the example has {wanted} inputs")
    rows = {len(t) if t.dim() else 0 for t in arrays.values()}
    if len(rows) != 1 or not min(rows):
        raise ConfigError(f"the arrays of {text} have {sorted(rows)} rows", hint="give each input one row a sample")
    starts = range(0, rows.pop(), ROWS)
    if isinstance(wanted, tuple):
        return [{name: arrays[name][i : i + ROWS] for name in wanted} for i in starts]
    return [tuple(t[i : i + ROWS] for t in list(arrays.values())[:wanted]) for i in starts]


if __name__ == "__main__":
    sys.exit(main())
