"""``python -m qfx.tools.env``: the facts a bug report needs, one a line, ready to be pasted.

Versions are read from the installed packages' metadata, so that no optional package is imported for it. Nothing
personal is printed: no paths, no host name, no environment but the variables that change what qfx or torch does.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch
from tabulate import tabulate

import qfx
from qfx import cpu, jit, kernels

DEPENDENCIES = ("numpy", "scipy", "networkx", "tabulate", "tqdm", "jinja2", "tomlkit")
OPTIONAL = (
    "torchvision",
    "torchao",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "scikit-learn",
    "psutil",
)
# The features of x86 that decide which integer kernels run, in Linux's spelling.
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
VARIABLES = ("QFX_CHECK", "QFX_NO_JIT", "CXX", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_MAX_CPU_ISA")


def installed_version(package: str) -> str:
    """The version of an installed distribution, or ``"-"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def cpu_model() -> str:
    """The processor's own name, where the system tells it (Linux); else what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> list[tuple[str, str]]:
    """What figures of speed hold for: name and value of each fact, in the order in which benchmarks print them."""
    return [
        ("qfx, torch", f"{qfx.__version__}, {torch.__version__}"),
        ("cpu", cpu_model()),
        ("features", features()),
        ("vnni", "yes" if cpu.onednn_has_vnni() else "no"),
        ("threads", str(torch.get_num_threads())),
    ]


def features() -> str:
    """Those of :data:`FEATURES` that this CPU has."""
    return " ".join(name for name in FEATURES if name in cpu.cpu_features()) or "-"


def facts() -> list[tuple[str, str]]:
    """Name and value of every fact, in the order in which they are printed."""
    onednn = "available" if torch.backends.mkldnn.is_available() else "not built into this torch"
    gcc = jit.compiler()
    return [
        ("qfx", qfx.__version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("os", platform.platform()),
        ("cpu", cpu_model()),
        ("features", features()),
        ("vnni", "yes" if cpu.onednn_has_vnni() else "no: oneDNN's uint8 x int8 kernels may saturate"),
        ("capability", torch.backends.cpu.get_cpu_capability()),
        ("threads", f"{torch.get_num_threads()} of torch, {os.cpu_count()} logical cores"),
        ("onednn", onednn),
        ("cuda", torch.version.cuda or "-"),
        ("compiler", gcc.version if gcc else "-"),
        ("jit", jit.unavailable() or "available"),
        ("kernels", kernels.backend()),
        *((name, installed_version(name)) for name in (*DEPENDENCIES, *OPTIONAL)),
        *((name, os.environ[name]) for name in VARIABLES if name in os.environ),
    ]


def main() -> int:
    """Print the facts as a table of two columns."""
    print(tabulate(facts(), tablefmt="plain", disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
