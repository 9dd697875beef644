"""Compares training in stages with training in one stage of equal compute, for long clips of `shapes`.

    python benchmarks/stages.py FOLDER TOKENIZER [ways=staged,long,short] [seeds=0,1,2] [key=value ...]

`staged` is conf=progressive; `long` trains only on the clips of its last stage, `short` on those of the stage before, each
for as many steps as cost the same floating point operations (`kit.costs`). Each is scored on held-out captions by `evaluate
protocol=shapes` at 17, 33 and 65 frames; clips longer than those trained on are made by frame re-encoding. FOLDER keeps runs
and scores; a stopped benchmark continues there. Further words go to `fit`. Prints one JSON line for each run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from kit.costs import generator_cost, stage_cost
from kit.plan import generator_config, stages_of
from kit.scales import latent_frames
from kit.tokenizer import TokenizerConfig
from runs import composed, kit, parted

LENGTHS, CLIPS = (17, 33, 65), 128  # frames and clips that are scored


def flops_of_stages(words: list[str]) -> tuple[list[float], list[float], list[dict]]:
    """Returns for each stage the floating point operations of all its steps, those of one of its clips, and its data."""
    cfg = composed("progressive", words)
    tokenizer = TokenizerConfig(**OmegaConf.to_container(cfg.tokenizer))
    generator = generator_config(cfg, tokenizer)
    whole, each, data = [], [], []
    for _, steps, given in stages_of(cfg):
        size = (given["height"], given["width"])
        clip, image = (generator_cost(generator, tokenizer, frames, *size, encoded=True) for frames in (given["frames"], 1))
        latents = latent_frames(given["frames"])
        whole.append(stage_cost(clip, image, steps * given["batch_size"], given["image_share"], latents).flops)
        each.append(clip.flops)
        data.append(given)
    return whole, each, data


def words_of(way: str, words: list[str]) -> list[str]:
    """Returns the words for `fit` that choose a way."""
    if way == "staged":
        return ["conf=progressive"]
    whole, each, data = flops_of_stages(words)
    stage = {"long": -1, "short": -2}[way]
    given = data[stage]
    steps = round(sum(whole) / each[stage] / given["batch_size"])
    clips = [f"data.{key}={given[key]}" for key in ("frames", "height", "width", "batch_size", "image_share")]
    return ["conf=stage2_generator", f"recipe.generator.steps={steps}", *clips]


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
            told = words_of(way, [word for word in rest if not word.startswith("callbacks")])
            begin = time.monotonic()
            run = [f"name={name}", f"root={folder}", f"seed={seed}", f"tokenizer_ckpt={tokenizer}", "ckpt=last"]
            kit(
                "fit",
                *told,
                *run,
                "callbacks.video_logger.clips=0",
                *([word for word in rest if way == "staged" or "stages" not in word]),
            )
            seconds = round(time.monotonic() - begin)
            ckpt = folder / name / "checkpoints" / "last.ckpt"
            found = {str(n): scores(folder, ckpt, f"{name}_{n}_frames", n) for n in LENGTHS}
            print(
                json.dumps({"way": way, "seed": int(seed), "frames": found, "seconds": seconds, "fit": told, "words": rest}),
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
