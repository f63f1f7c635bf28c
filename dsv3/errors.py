"""Every error a user can cause, as one tree.

    Dsv3Error
    ├── ConfigError         a setting, recipe or option that cannot be obeyed
    ├── DataError           text or token shards that cannot be read
    ├── TokenizerError      a tokenizer file that is missing or does not fit the model
    ├── CheckpointError     weights with missing, unexpected or misshapen tensors
    ├── SnapshotError       a training snapshot that cannot be written or read
    ├── TrainingError       a run that must stop
    │   └── NonFiniteError  a loss or gradient that is NaN or infinite
    ├── EngineError         a request that broke while it was computed
    │   └── RankLostError   a rank that shares experts with others has lost step with them
    ├── CompilerError       C++ kernels that cannot be compiled here
    └── MissingExtraError   an optional dependency that is not installed

A message says what was asked, what was found and what would work. The command line prints it without a traceback;
`assert` is left for what only a bug of ours could break.
"""


class Dsv3Error(Exception):
    """Base of every error that is the caller's to mend."""


class ConfigError(Dsv3Error):
    """A setting, recipe or option that cannot be obeyed."""


class DataError(Dsv3Error):
    """Text or token shards that cannot be read."""


class TokenizerError(Dsv3Error):
    """A tokenizer file that is missing or does not fit the model."""


class CheckpointError(Dsv3Error):
    """Weights with missing, unexpected or misshapen tensors."""


class SnapshotError(Dsv3Error):
    """A training snapshot that cannot be written or read."""


class TrainingError(Dsv3Error):
    """A run that must stop."""


class NonFiniteError(TrainingError):
    """A loss or gradient that is NaN or infinite."""


class EngineError(Dsv3Error):
    """A request that broke while it was computed."""


class RankLostError(EngineError):
    """A rank that shares experts with others has lost step with them, and must end."""


class CompilerError(Dsv3Error):
    """C++ kernels that cannot be compiled here."""


class MissingExtraError(Dsv3Error):
    """An optional dependency that is not installed."""

    def __init__(self, *, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'; install it with: pip install 'dsv3[{extra}]'")
