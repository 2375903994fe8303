"""The typed run configuration: one YAML file, dotted overrides, every mistake listed at once."""

from dsmoe.config.load import load_config, load_yaml, read_yaml, validated
from dsmoe.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    Section,
    TrainingConfig,
)
from dsmoe.config.validate import validate_config

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "RouterConfig",
    "RunConfig",
    "Section",
    "TrainingConfig",
    "load_config",
    "load_yaml",
    "read_yaml",
    "validate_config",
    "validated",
]
