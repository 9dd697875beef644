"""Runs the whole pipeline on the embedded data: trains the tokenizer and the generator, scores, and samples.

Each part is a command that can be run by itself; the demo prints it first. If interrupted and started again, it continues.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig

from kit.files import last_checkpoint, write_json
from kit.machine import fast_bfloat16
from kit.sharded_checkpoint import described
from kit.signals import interrupted_by_sigterm

PATIENCE = 10.0  # seconds that a part has to end after Ctrl-C, which a terminal sends to it too, before it gets SIGTERM
PROMPT = "a red ball moving right over a green field"


def command(verb: str, *overrides: str) -> list[str]:
    return ["kit", verb, *overrides]


def run(words: list[str]):
    """Prints a command and runs it. After Ctrl-C or SIGTERM it waits for the command, which saves before it ends.

    Raises:
        ValueError: if it fails. KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *words])
    try:
        with interrupted_by_sigterm():
            status = process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        raise
    if status:
        raise ValueError("this part of the demo failed; the message is above. Start the demo again and it resumes from there")


def train_seconds(checkpoint: Path) -> float:
    """Reads from a checkpoint the seconds spent in training, summed over all restarts, as `StepTimer` records them."""
    return described(checkpoint)["callbacks"]["Timer"]["time_elapsed"]["train"]


def demo(cfg: DictConfig) -> dict:
    """Runs all parts, writes everything to the run's folder, and returns the metrics."""
    folder = Path(cfg.folder)
    if not fast_bfloat16():
        print("note: without bfloat16 instructions the demo takes more than an hour on two cores, not a quarter of one;")
        print("      conf=demo_short takes less than half as long, and its videos are rougher")
    where = f"root={folder.as_posix()}"
    tokenizer, generator = (last_checkpoint(folder / part) for part in ("tokenizer", "generator"))
    extra = ["size=tiny", "trainer.devices=1", *cfg.overrides]  # the same small job on every machine
    own = [f"seed={cfg.seed}", *([f"threads={cfg.threads}"] if cfg.threads else [])]  # for the same keys of each part
    run(command("fit", "conf=stage1_tokenizer", where, "name=tokenizer", "ckpt=last", *own, *extra, *cfg.tokenizer_overrides))
    run(command("fit", "conf=stage2_generator", where, "name=generator", f"tokenizer_ckpt={tokenizer}", "ckpt=last", *own,
                "trainer.val_check_interval=600", *extra, *cfg.generator_overrides))  # fmt: skip
    run(command("validate", f"ckpt={generator}", where, "name=scores", f"clips={cfg.clips}", *own))
    run(command("generate", f"ckpt={generator}", where, "name=videos", f"prompt={PROMPT}", "n=4", *own))

    scores = json.loads((folder / "scores" / "metrics.json").read_text())
    seconds = {"tokenizer": train_seconds(tokenizer), "generator": train_seconds(generator)}
    metrics = {**scores, "train_seconds": sum(seconds.values()), "train_seconds_by_part": seconds}
    write_json(folder / "metrics.json", metrics)
    for sheet in (folder / "scores").glob("contact_sheet.*"):
        shutil.copy(sheet, folder / sheet.name)
    for video in (folder / "scores" / "samples").glob("*.mp4"):
        shutil.copy(video, folder / "videos" / video.name)
    print(summary(folder, tokenizer, generator, metrics))
    return metrics


def summary(folder: Path, tokenizer: Path, generator: Path, metrics: dict) -> str:
    accuracy = ", ".join(f"{name} {value:.0%}" for name, value in metrics["caption_accuracy"].items())
    ckpt = shlex.quote(f"ckpt={generator}")
    return f"""
Done. Trained for {metrics["train_seconds"] / 60:.1f} minutes; one clip is sampled in {metrics["sample_seconds"]:.2f} s.
  held-out reconstruction   {metrics["reconstruction_psnr_db"]:.2f} dB
  caption accuracy          {accuracy}

Look at
  {folder / "contact_sheet.webp"}   prompt, real, reconstruction, sample; without motion: contact_sheet.png
  {folder / "videos"}/*.mp4
  {folder / "metrics.json"}
  {tokenizer}
  {generator}

Next
  python -m kit generate {ckpt} prompt="a blue star growing on a dark background" n=4
  python -m kit inspect {ckpt}
  python -m kit prepare i3d && python -m kit evaluate protocol=shapes {ckpt}
  python -m kit generate {ckpt} image=PICTURE.png prompt="a green ring circling in a blue sky"
  python -m kit fit conf=stage1_tokenizer data=clips data.root=YOUR_VIDEOS name=mine
  python -m kit --help"""
