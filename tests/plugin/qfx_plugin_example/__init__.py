"""A package of somebody else's: qfx finds what is in it by the entry points of pyproject.toml."""
