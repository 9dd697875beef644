"""Compares training in stages with training in one stage of equal compute, for long clips of `shapes`.

    python benchmarks/stages.py FOLDER TOKENIZER [ways=staged,long,short] [seeds=0,1,2] [key=value ...]

`staged` is conf=progressive; `long` trains only on clips of the shape of its last stage, `short` of the stage before, each
with as many images as conf=stage2_generator has, for as many steps as cost the same floating point operations
(`kit.planning.costs`). Each is scored on held-out captions by `evaluate protocol=shapes` at 17, 33 and 65 frames; clips
longer than those trained on are made by frame re-encoding. FOLDER keeps runs and scores; a stopped benchmark continues
there. Further words go to `fit`, those about stages to `staged` alone. Prints one JSON line for each run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kit.planning.costs import generator_cost, stage_cost
from kit.planning.plan import generator_config, stages_of
from kit.scales import latent_frames
from kit.tokenizer import TokenizerConfig
from runs import composed, kit, parted

LENGTHS, CLIPS = (17, 33, 65), 128  # frames and clips that are scored
SHAPE = ("frames", "height", "width", "batch_size")  # what `long` and `short` take from a stage's data


def flops_of(cfg: DictConfig, data: dict, steps: int) -> float:
    """Returns the floating point operations of `steps` steps on clips of the config's `data`."""
    tokenizer = TokenizerConfig(**OmegaConf.to_container(cfg.tokenizer))
    generator, size = generator_config(cfg, tokenizer), (data["height"], data["width"])
    clip, image = (generator_cost(generator, tokenizer, frames, *size, encoded=True) for frames in (data["frames"], 1))
    return stage_cost(clip, image, steps * data["batch_size"], data["image_share"], latent_frames(data["frames"])).flops


def words_of(way: str, words: list[str]) -> list[str]:
    """Returns the words for `fit` that train a way; `words` are those that all ways were told."""
    if way == "staged":
        return ["conf=progressive", *words]
    plan, words = composed("progressive", words), [word for word in words if "stages" not in word]
    stages = stages_of(plan)
    last = stages[{"long": -1, "short": -2}[way]][2]
    clips = [f"data.{key}={last[key]}" for key in SHAPE]
    one = composed("stage2_generator", [*clips, *words])
    whole = sum(flops_of(plan, data, steps) for _, steps, data in stages)
    each = flops_of(one, OmegaConf.to_container(one.data), 1)
    return ["conf=stage2_generator", f"recipe.generator.steps={round(whole / each)}", *clips, *words]


def scores(folder: Path, ckpt: Path, name: str, frames: int) -> dict:
    """Evaluates samples of `frames` frames, unless done before; returns the caption accuracy, whole and of each attribute."""
    result = folder / name / "evaluation.json"
    if not result.exists():
        real = [f"protocol.frames={frames}", f"protocol.real.clips={CLIPS}", "protocol.samples=null", "protocol.folds=1"]
        kit(
            "evaluate",
            f"ckpt={ckpt}",
            f"root={folder}",
            f"name={name}",
            "protocol=shapes",
            *real,
            "metrics=[captions]",
            "workers=0",
        )
    found = json.loads(result.read_text())["metrics"]["caption_accuracy"]
    return {key: value for key, value in found.items() if key != "name"}


def main(folder: Path, tokenizer: str, *words: str):
    chosen, rest = parted(words, "ways", "seeds")
    for seed in chosen.get("seeds", "0,1,2").split(","):
        for way in chosen.get("ways", "staged,long,short").split(","):
            name = f"{way}_{seed}"
            told = words_of(way, rest)
            begin = time.monotonic()
            run = [f"name={name}", f"root={folder}", f"seed={seed}", f"tokenizer_ckpt={tokenizer}", "ckpt=last"]
            kit("fit", *told, *run, "callbacks.video_logger.clips=0")
            seconds = round(time.monotonic() - begin)
            ckpt = folder / name / "checkpoints" / "last.ckpt"
            found = {str(n): scores(folder, ckpt, f"{name}_{n}_frames", n) for n in LENGTHS}
            print(json.dumps({"way": way, "seed": int(seed), "frames": found, "seconds": seconds, "fit": told}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
