"""Every setting, as frozen keyword-only dataclasses with units and sources. Imports no torch."""

from dsv3.config.balance import BalanceConfig
from dsv3.config.data import DataConfig, MixtureConfig, RulesConfig, ShareConfig, SourceConfig
from dsv3.config.engine import EngineConfig
from dsv3.config.expert_ranks import ExpertRanksConfig
from dsv3.config.model import ModelConfig, YarnConfig
from dsv3.config.parallel import ParallelConfig
from dsv3.config.precision import PrecisionConfig
from dsv3.config.run import EvaluationConfig, HealthConfig, PretrainConfig, RuntimeConfig, SnapshotConfig
from dsv3.config.server import JoinConfig, ServerConfig
from dsv3.config.training import (
    KEEP_ALL,
    BatchConfig,
    LearningRateConfig,
    MtpLossConfig,
    OptimConfig,
    RecomputeConfig,
)

__all__ = [
    "KEEP_ALL",
    "BalanceConfig",
    "BatchConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExpertRanksConfig",
    "HealthConfig",
    "JoinConfig",
    "LearningRateConfig",
    "MixtureConfig",
    "ModelConfig",
    "MtpLossConfig",
    "OptimConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "PretrainConfig",
    "RecomputeConfig",
    "RulesConfig",
    "RuntimeConfig",
    "ServerConfig",
    "ShareConfig",
    "SnapshotConfig",
    "SourceConfig",
    "YarnConfig",
]
