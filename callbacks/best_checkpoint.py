"""The checkpoint of the best validation."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from kit.training_checkpoint import save_failed


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose best score is always that of the checkpoint there is: also after a save that failed,
    and after the run's folder was copied or moved."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace("BestCheckpoint", "ModelCheckpoint")  # in checkpoints, as of Lightning's

    def on_validation_end(self, trainer, module):
        before = deepcopy(self.state_dict())
        super().on_validation_end(trainer, module)
        if save_failed(trainer):
            super().load_state_dict(before)

    def load_state_dict(self, state: dict):
        """Restores the best score if the best checkpoint is in this folder: a run that starts from another's has none yet."""

        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        paths = {key: here(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        if Path(paths["best_model_path"]).is_file():
            best = {here(path): score for path, score in state["best_k_models"].items()}
            super().load_state_dict({**state, **paths, "best_k_models": best, "dirpath": self.dirpath})
