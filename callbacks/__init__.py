"""Callbacks: they watch and switch, and compute no losses."""

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.code_use import CodeUse
from callbacks.compile import CompileLayers
from callbacks.ema import EMA
from callbacks.guard import LossGuard
from callbacks.health import Health
from callbacks.kept_checkpoints import KeptCheckpoints
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.progress import ProgressBar
from callbacks.stage_switch import StageSwitch
from callbacks.summary import RunSummary
from callbacks.timer import StepTimer
from callbacks.video_logger import VideoLogger

__all__ = [
    "BestCheckpoint", "CodeUse", "CompileLayers", "EMA", "Health", "KeptCheckpoints", "LastCheckpoint", "LossGuard",
    "ProgressBar", "RunSummary", "StageSwitch", "StepTimer", "VideoLogger",
]  # fmt: skip
