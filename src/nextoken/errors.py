"""Errors meant for the person at the keyboard: one line that says what was given, what was expected and what to do."""


class NextokenError(Exception):
    """Base of all of them; the command line prints the message and exits with code 2."""


class ModelError(NextokenError):
    """A model cannot be found, loaded or reached, or cannot do what was asked."""


class InputError(NextokenError):
    """A text cannot be read: missing, a directory, binary, not UTF-8, empty."""


class OutputError(NextokenError):
    """A result cannot be written."""
