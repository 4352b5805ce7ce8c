"""The errors that qfx raises: each says what went wrong, where, why, and the way out.

``QfxError`` is the base of all. ``where`` is the layer path in the user's model, ``source`` the user's own line of
Python (``file:line``), ``hint`` the way out; they are attributes, so that tools can show them, and part of the text.
"""

from __future__ import annotations


class QfxError(Exception):
    """Base of every error that qfx raises on purpose."""

    def __init__(self, what: str, *, where: str = "", source: str = "", hint: str = "") -> None:
        self.what, self.where, self.source, self.hint = what, where, source, hint
        place = f" [layer {where}]" if where else ""
        line = f"\n  at {source}" if source else ""
        way_out = f"\n  way out: {hint}" if hint else ""
        super().__init__(f"{what}{place}{line}{way_out}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.source, self.hint)


def _rebuild(kind: type[QfxError], what: str, where: str, source: str, hint: str) -> QfxError:
    return kind(what, where=where, source=source, hint=hint)


class ConfigError(QfxError, ValueError):
    """A recipe, spec or argument that cannot be meant: a rule that matches nothing, bits out of range."""


class CaptureError(QfxError):
    """The model, its example inputs or a call of the captured model do not fit."""


class CalibrationError(QfxError, ValueError):
    """Calibration data are missing, of another structure, dtype or device, or hold NaN or infinity."""


class TrainingError(QfxError, ValueError):
    """A step of quantization-aware training cannot be taken: the loss is not finite."""


class PassError(QfxError):
    """A pass failed or broke its contract; the text names the pass."""


class VerifyError(PassError):
    """A graph is not what its stage promises."""


class UnsupportedError(QfxError):
    """No target can run what was asked for."""


class ArtifactError(QfxError):
    """A saved model is damaged, hostile, or of another version."""


class NativeError(QfxError):
    """The C++ compiler or a compiled library failed; the text gives the command and the log."""


class QfxWarning(UserWarning):
    """Base of the warnings that qfx gives; filter by this class."""
