"""Shows what a model makes of real clips, as video and as picture."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from torch.utils.data import default_collate

from callbacks.pictures import log_picture, may_fail, thin_out
from kit.fsdp import whole_model
from kit.generator.sampler import Sampling
from kit.inspection import forced_and_free
from kit.media import clip_by_clip, contact_sheet, write_video
from kit.values import check_whole_number


class VideoLogger(L.Callback):
    """After each validation writes a picture and a video of the first validation clips to `folder`/media, see `thin_out`.

    A tokenizer shows real and reconstruction; a generator real, reconstruction, teacher-forced (each block predicted from
    the true earlier ones) and free sample. "The loss falls but samples are noise" shows here at a glance.

    Args:
        clips: number of clips to show; 0: no pictures. sampling: values of `Sampling` for the free samples.
    Raises:
        ValueError: if `clips` is below 0; as `Sampling`.
    """

    def __init__(self, folder: str, clips: int = 4, sampling: dict | None = None):
        check_whole_number("callbacks.video_logger.clips", clips, 0)
        self.folder, self.clips, self.sampling = Path(folder) / "media", clips, Sampling.of(sampling or {})

    def on_validation_epoch_end(self, trainer, module):
        if trainer.sanity_checking or not self.clips:
            return
        model = whole_model(module.model, lambda: type(module.model)(module.model.config))
        if trainer.is_global_zero:
            with may_fail("pictures", trainer.global_step):
                self._show(trainer, module, model.to(module.device))

    @torch.no_grad()
    def _show(self, trainer, module, model):
        data = trainer.datamodule
        batch = default_collate([data.held_out[n, data.frames] for n in range(self.clips)])
        batch = {name: x.to(module.device) if torch.is_tensor(x) else x for name, x in batch.items()}
        with trainer.precision_plugin.val_step_context():
            rows = self.rows(module, model, batch)
        step = trainer.global_step
        groups = clip_by_clip(rows, self.clips)
        titles = [str(c) for c in batch["caption"]]
        picture = contact_sheet(groups, titles, self.folder / f"step{step:06d}.png")
        side_by_side = torch.cat([torch.cat(list(group.values()), dim=-1) for group in groups], dim=-2)
        video = write_video(side_by_side, self.folder / f"step{step:06d}.mp4", data.fps)
        log_picture(trainer, "samples", picture, video)
        thin_out(self.folder, "step", step)

    def rows(self, module, model, batch: dict) -> dict[str, torch.Tensor]:
        """Videos to show: name -> (clips, 3, T, H, W)."""
        real = {"real": batch["video"]} if "video" in batch else {}  # a cache holds no pixels
        if module.kind == "tokenizer":
            return {**real, "reconstruction": model.reconstruct(batch["video"])}
        feature, prompts = module.feature(batch), model.condition.prompts(batch)
        return {**real, **forced_and_free(model, module.tokenizer, feature, module.schedule, prompts, self.sampling)}
