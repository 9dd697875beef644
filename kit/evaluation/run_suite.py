"""Evaluation by a prompt suite: makes its videos for a tool such as VBench, and reads what that tool found."""

from __future__ import annotations

import shlex
from pathlib import Path

from omegaconf import DictConfig

from kit.checkpoint import load_generator
from kit.data.read import read_clip_file
from kit.evaluation.candidates import Samples
from kit.evaluation.protocol import digest
from kit.evaluation.report import words_of, write_page
from kit.evaluation.suites import read_prompts, video_name, write_suite
from kit.evaluation.vbench import read_vbench_results, vbench_scores, vbench_table
from kit.files import read_json, sole_user, write_json, written_aside
from kit.generator.sampler import Sampling
from kit.machine import check_precision, exact_float32
from kit.media import contact_sheet
from kit.sampling_checks import check_video_length, tell_notes
from kit.values import check_whole_number, plain

SHOWN = 8  # videos on the page and the contact sheet


def evaluate_suite(cfg: DictConfig) -> dict:
    """Makes the videos of a prompt suite, or with `results` reads what VBench found in them, see conf/protocol/prompts.yaml.

    Returns: what suite.json holds; with `results`, what evaluation.json holds.
    """
    real = any(cfg[key] is not None for key in ("videos", "real", "real_captions", "real_label_from"))
    if real or cfg.paired or cfg.metrics != "auto":
        raise ValueError(f"{cfg.protocol.name} makes videos for other tools; it takes no videos=, real=, paired= or metrics=")
    return read_suite(cfg) if cfg.results is not None else make_suite(cfg)


def make_suite(cfg: DictConfig) -> dict:
    """Makes the videos of a suite that do not exist yet, and shows the first one of some prompts on a sheet and a page.

    Raises:
        ValueError, FileNotFoundError: for a missing key or file, or a folder that holds another suite's videos.
    """
    if cfg.ckpt is None or cfg.prompts is None:
        raise ValueError(f"the protocol {cfg.protocol.name} needs ckpt=GENERATOR and prompts=FILE, one prompt a line")
    suite, folder = cfg.protocol, Path(cfg.folder)
    for key, least in {"samples": 1, "flickering_samples": 1, "seed": 0}.items():
        check_whole_number(f"protocol.{key}", suite[key], least)
    check_whole_number("protocol.frames", suite.frames, 1, optional=True)
    check_whole_number("batch_size", cfg.batch_size, 1)
    check_precision(cfg.precision)
    prompts = read_prompts(cfg.prompts, suite.samples, suite.flickering_samples)
    generator, tokenizer = load_generator(cfg.ckpt, cfg.tokenizer)
    clip = generator.clip
    shape, sampling = (suite.frames or clip["frames"], clip["height"], clip["width"]), Sampling.of(plain(cfg))
    check_video_length(tokenizer, shape, None, sampling, clip["frames"])
    tell_notes([prompt.text for prompt in prompts], sampling, generator.model.condition.notes)
    candidate = Samples(generator, tokenizer, sampling, cfg.precision, shape)
    settings = {"suite": suite.name, "size": list(shape), **candidate.about()}
    with sole_user(folder), exact_float32():
        videos = write_suite(
            candidate.sample, prompts, folder, settings, seed=suite.seed, batch_size=cfg.batch_size, fps=clip["fps"]
        )

    shown = {prompt.text: video_name(prompt.text, 0) for prompt in prompts[:SHOWN]}
    clips = [{"sample": read_clip_file(videos / name, *shape, 0)} for name in shown.values()]
    contact_sheet(clips, list(shown), folder / "contact_sheet.png")
    played = [{"heading": t, "videos": [{"row": "sample", "file": f"videos/{name}"}]} for t, name in shown.items()]
    write_page(folder, suite.name, [words_of(settings)], [], played, [])
    of_some = f"; the last two show the first {SHOWN} of {len(prompts)} prompts" if len(prompts) > SHOWN else ""
    print(f"in {folder}: videos, videos.json, contact_sheet.png, report.html{of_some}")
    if suite.name == "vbench":
        print(next_steps(videos, cfg.root, cfg.name))
    return read_json(folder / "suite.json")


def next_steps(videos: Path, root: str, name: str) -> str:
    """Says how VBench scores the videos of the run `name` in `root`, and how its results are read back."""
    again = shlex.join(["protocol=vbench", f"root={root}", f"name={name}", "results=FOLDER_OF_ITS_RESULTS"])
    return (
        f"score them with VBench (vbench evaluate --videos_path {shlex.quote(str(videos))} --dimension ...), then read its "
        f"results back:\npython -m kit evaluate {again}"
    )


def read_suite(cfg: DictConfig) -> dict:
    """Reads VBench's results for the videos in the run's folder, and sets them beside the paper's.

    Raises:
        ValueError, FileNotFoundError: if the folder has no such videos, or the results are missing, not VBench's, or of
            other videos.
    """
    folder = Path(cfg.folder)
    if cfg.protocol.name != "vbench":
        raise ValueError(f"results= reads what VBench found; the protocol {cfg.protocol.name} has no such tool")
    if not (folder / "suite.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no suite.json, which says how the videos were made: give the name= of the run that made them"
        )
    made, videos = (read_json(folder / f"{name}.json") for name in ("suite", "videos"))
    found = read_vbench_results(cfg.results)
    for dimension, measured in found.items():
        if others := sorted(set(measured.videos) - set(videos)):
            raise ValueError(
                f"{cfg.results}: {dimension} was measured on {others[0]}, which is no video of {folder}; give what VBench "
                f"found in its videos"
            )
    raw = {dimension: measured.score for dimension, measured in found.items()}
    scores = vbench_scores(raw)
    protocol = {key: made.pop(key) for key in ("suite", "size", "fps", "seed", "prompts")}
    protocol["videos"] = len(videos)  # of all prompts: more of a prompt make another protocol
    protocol["hash"] = digest(protocol)[:12]
    result = {"protocol": protocol, "of": made, "raw": raw, "scores": scores}
    table = vbench_table({"this model": raw})
    write_json(folder / "evaluation.json", result)
    with written_aside(folder / "vbench.md") as aside:
        aside.write_text(table, encoding="utf-8")
    print(table)
    if scores["missing"]:
        print(f"no results for {', '.join(scores['missing'])}: evaluate these dimensions too for the sums above them")
    print(f"protocol vbench@{protocol['hash']}: {words_of(protocol)}\nof {words_of(made)}")
    print(f"in {folder}: evaluation.json, vbench.md")
    return result
