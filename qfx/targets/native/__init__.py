"""The native engine: C++ that is generated for a model, its sizes and the machine."""

from qfx.targets.native.target import Native

__all__ = ["Native"]
