"""Programs on top of qfx: each is run as ``python -m qfx.tools.<name>``."""

if __name__ != "qfx.tools":
    raise ImportError(f"this package is qfx.tools and is imported under that name only, not as {__name__}")
