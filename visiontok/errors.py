"""What visiontok raises. Every message says what was wrong, with which value, and what to do about it."""

from __future__ import annotations


class VisiontokError(Exception):
    """Base of all errors that a user of visiontok can cause and can cure."""


class ConfigError(VisiontokError, ValueError):
    """An argument is wrong. The message names the argument, the value and the remedy."""


class ImageError(ConfigError):
    """An image cannot be read. The message names the file and the remedy."""


class UnsupportedError(VisiontokError, NotImplementedError):
    """The model cannot do what the recipe asks. The message names the model, the stage and the way out."""
