"""Every python block of README.md runs as it stands, in an interpreter of its own."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PEERS = ("torchvision", "timm", "transformers")


def blocks() -> list[tuple[int, str]]:
    """Line and text of the README's python blocks; none where the README did not come along (an installed package)."""
    text = README.read_text() if README.exists() else ""
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 2, m[1]) for m in found]


def imports(code: str) -> set[str]:
    """Top-level packages that a block imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {name.partition(".")[0] for name in names}


BLOCKS = blocks()


@pytest.mark.skipif(not README.exists(), reason="README.md is not here")
def test_the_readme_has_blocks() -> None:
    assert len(BLOCKS) >= 5
    assert {peer for _, code in BLOCKS for peer in PEERS if peer in imports(code)} == set(PEERS)


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line{line}" for line, _ in BLOCKS])
def test_a_block_runs(line: int, code: str, tmp_path: Path) -> None:
    missing = sorted(name for name in imports(code) if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"README.md:{line} needs {', '.join(missing)}, which is not installed")
    script = tmp_path / f"readme_{line}.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"README.md:{line}\n{done.stderr}"
