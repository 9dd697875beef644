"""Prints at the start of a training what is about to be trained."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from kit.data.staged import StagedClips
from kit.loop import batches_of_a_step
from kit.optim import BYTES_AVERAGED, BYTES_TRAINED


def million(n: int) -> str:
    return f"{n / 1e6:.2f} M"


class RunSummary(L.Callback):
    """Prints parameters, tokens per clip, steps, clips and the memory that training state needs.

    At the end it prints which files could not be read, broken shards among them.
    """

    @rank_zero_only
    def on_fit_start(self, trainer, module):
        rank_zero_info("\n".join(f"  {name:<12}{value}" for name, value in self.lines(trainer, module).items()))

    @rank_zero_only
    def on_fit_end(self, trainer, module):
        if lost := trainer.datamodule.unreadable:
            names = ", ".join(str(path) for path in lost[:5]) + (", ..." if len(lost) > 5 else "")
            rank_zero_info(f"  {len(lost)} unreadable files were passed over: {names}")

    @staticmethod
    def lines(trainer, module) -> dict[str, str]:
        """The lines to print: name -> value."""
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.model.named_children()}
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        averaged = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
        if trained > averaged:
            parts["discriminators"] = trained - averaged
        largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
        return {
            "model": f"{module.kind}, {million(averaged)} parameters "
            f"({', '.join(f'{name} {million(n)}' for name, n in largest if n)})",
            "data": trainer.datamodule.about,
            **work_lines(trainer, module),
            "memory": f"up to {BYTES_TRAINED * trained / 1e9:.2f} GB for weights, gradients and optimizer, "
            f"{BYTES_AVERAGED * averaged / 1e9:.2f} GB for EMA, and the activations",
            "precision": f"{trainer.precision} on {trainer.strategy.root_device}",
            "run": str(trainer.default_root_dir),
        }


def work_lines(trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
    """The lines on what is trained on, and for how long: of each stage, of buckets, or of clips of one shape."""
    data, batches = trainer.datamodule, batches_of_a_step(trainer, module)
    if isinstance(data, StagedClips):  # StageSwitch prints each
        return {f"stage {s.name}": f"{s.steps} steps" for s in data.plan.stages}
    shape = f"{data.frames} x {data.height} x {data.width} at {data.fps:g} fps -> {module.schedule}"
    kind, devices = "images" if data.images is None else "pictures", f"{trainer.world_size} device(s)"
    if data.bucketed:
        instead = f", {data.image_share:.0%} of them of {kind} instead" if data.image_share else ""
        steps = f"{trainer.max_steps} of {batches} batch(es) on {devices}{instead}"
        lines = {"buckets": str(data.train), "validation": shape, "steps": steps}
    else:
        clips = data.batch_size * batches  # of an optimizer step, on one device
        of_them = "them" if batches == 1 else "their batches"
        in_all = f"{trainer.max_steps * clips * trainer.world_size} clips in all"
        instead = f"{data.image_share:.0%} of {of_them} of {data.image_batch} {kind} instead"
        lines = {"clip": shape, "steps": f"{trainer.max_steps} of {clips} clips on {devices}, "
                 f"{instead if data.image_share else in_all}"}  # fmt: skip
    interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none for one by the clock
    if isinstance(interval, int) and interval > trainer.max_steps * batches:
        lines["validation"] = f"none: trainer.val_check_interval={interval} is after the end; no best.ckpt, no pictures"
    return lines
