"""Errors a user can act on: one line that says what, where, got, expected and what to do."""


class VoxelbridgeError(Exception):
    """Base of all errors shown to users as one line; `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(VoxelbridgeError):
    """A setting or a command line that cannot be used as written (exit status 2)."""

    exit_code = 2


class DataError(VoxelbridgeError):
    """An image, label, table or case store that cannot be used."""


class CheckpointError(VoxelbridgeError):
    """A checkpoint or a training state that is damaged, foreign or does not fit the network."""
