"""A folder of real clips trains, generates by label, and scores (on the shared Weizmann clips, where they are)."""

from __future__ import annotations

import json
import shutil

import torch

from kit.checkpoint import load_generator
from kit.cli import main
from kit.data.clips import FolderClips
from kit.generator.guidance import Guidance
from kit.generator.sampler import Sampling
from kit.sampling import sample_clips
from tests.fixtures import GENERATOR, QUICK, TOKENIZER, fit_generator, fit_tokenizer


def test_people_of_weizmann_in_a_reduced_form(shared, tmp_path):
    folder = shared / "data" / "weizmann"
    clips = ["data=clips", f"data.root={folder}", "data.frames=5", "data.height=32", "data.width=32", f"root={tmp_path}"]
    small = [*TOKENIZER, *(word for word in QUICK if "val_check" not in word), "trainer.val_check_interval=3"]
    assert main(["fit", "conf=stage1_tokenizer", *clips, *small, "name=tok", "trainer.max_steps=3"]) == 0
    tokenizer = tmp_path / "tok" / "checkpoints" / "last.ckpt"
    words = [*clips, *small, *GENERATOR, f"tokenizer_ckpt={tokenizer}", "name=gen", "trainer.max_steps=3"]
    assert main(["fit", "conf=stage2_generator", *words]) == 0
    generator = tmp_path / "gen" / "checkpoints" / "last.ckpt"
    assert main(["generate", f"ckpt={generator}", f"root={tmp_path}", "label=jumping_jack", "n=2"]) == 0
    assert len(list((tmp_path / "generated").glob("jumping_jack_seed*.mp4"))) == 2
    assert main(["generate", f"ckpt={generator}", f"root={tmp_path}", "label=swimming", "n=1"]) == 1
    assert main(["validate", f"ckpt={generator}", *clips, "clips=4", "name=scores"]) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert len(metrics["bit_accuracy"]) == 3 and "caption_accuracy" not in metrics


def test_fine_tuned_on_captioned_emoji_draws_what_it_is_told(shared, pair, tmp_path):
    """Fine-tunes a generator of shapes and its tokenizer as in docs/finetuning.md; the sample for a name then shows the clip
    of that name. (The last file is held out.)"""
    folder, names = shared / "data" / "fluent_emoji", ["cyclone", "christmas tree", "jack-o-lantern", "pig face", "frog face"]
    captions = {file: name for file, name in json.loads((folder / "captions.json").read_text()).items() if name in names}
    own = tmp_path / "clips"
    own.mkdir()
    for file in captions:
        shutil.copy(folder / f"{file}.mp4", own)
    (own / "captions.json").write_text(json.dumps(captions))
    clips = ["data=clips", f"data.root={own}", "data.source.val_every=1000", "init=weights"]
    start = [*clips, f"init.ckpt={pair.tokenizer}", "recipe.tokenizer.steps=150"]
    assert fit_tokenizer(tmp_path, *start, name="codec") == 0
    codec = tmp_path / "codec" / "checkpoints" / "last.ckpt"
    start = [*clips, f"init.ckpt={pair.generator}", "recipe.generator.steps=200", "recipe.generator.encoded_clips=64"]
    assert fit_generator(tmp_path, *start, tokenizer=codec, name="tuned") == 0

    generator, tokenizer = load_generator(tmp_path / "tuned" / "checkpoints" / "last.ckpt")
    schedule = tokenizer.model.schedule(5, 32, 32)
    how = Sampling(Guidance("constant", 2.0), temperature=0.5)
    samples = sample_clips(generator.model, tokenizer.model, schedule, names[:4], range(4), how)
    whole = FolderClips(own, "all", 5, 32, 32, label_from="none")
    real = {item["caption"]: item["video"].mean(1).flatten() for item in map(whole.__getitem__, range(5))}
    apart = torch.cdist(samples.mean(2).flatten(1), torch.stack([real[name] for name in names]))
    assert apart.argmin(1).tolist() == [0, 1, 2, 3], f"distance of each sample from each clip: {apart}"
