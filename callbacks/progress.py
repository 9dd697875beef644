"""The progress of a training, in a terminal."""

from __future__ import annotations

from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar without the number of the epoch, which is always 0, and that of the log: losses and the score
    of the last validation fit into 80 columns."""

    def on_train_epoch_start(self, *args):
        super().on_train_epoch_start(*args)
        self.train_progress_bar.set_description("")

    def get_metrics(self, *args) -> dict:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}
