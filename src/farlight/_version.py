"""The version, apart so that `farlight --version` loads nothing else."""

__version__ = "0.1.0"
