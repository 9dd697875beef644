"""The log of a training as a CSV file, which a full disk does not end."""

from __future__ import annotations

import csv
import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers.csv_logs import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from kit.files import written_aside


class Writer(ExperimentWriter):
    """Writes the rows logged so far to metrics.csv; where there is no room it keeps them for the next time."""

    def save(self):
        path, columns, end = Path(self.metrics_file_path), list(self.metrics_keys), 0
        try:
            if self.metrics and self._record_new_keys():  # the header changes
                self._rewrite(path)
            elif self.metrics:
                end = path.stat().st_size
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
            self.metrics = []
        except OSError as error:
            self.metrics_keys = columns
            if end:
                with suppress(OSError):
                    os.truncate(path, end)
            rank_zero_warn(
                f"the log {path} could not be written: {error.strerror}; {len(self.metrics)} rows are kept for later"
            )

    def _rewrite(self, path: Path):
        """Writes all rows anew under a header with all columns; until they are written, the file stays as it was."""
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        with written_aside(path) as aside, aside.open("w", newline="") as file:
            table = csv.DictWriter(file, self.metrics_keys)
            table.writeheader()
            table.writerows(rows + self.metrics)


class CSVLogger(LightningCSVLogger):
    """Lightning's log as a CSV file, with a `Writer`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Writer:
        if self._experiment is None:
            self._experiment = Writer(self.log_dir)
        return self._experiment
