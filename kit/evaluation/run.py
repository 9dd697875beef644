"""Evaluation by a protocol, top to bottom: real clips, candidate, scores, result."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from kit import __version__
from kit.data.clips import FolderClips
from kit.data.shapes import Shapes
from kit.evaluation.build import Tools, build_candidate, build_protocol, build_tools
from kit.evaluation.candidates import Candidate, Clips, RealClips
from kit.evaluation.clips import DrawnClips, FileClips, collate, real_clips
from kit.evaluation.protocol import Protocol, digest
from kit.evaluation.report import CLIPS, Shown, best_median_worst, read_result, result_lines, write_report
from kit.evaluation.run_suite import evaluate_suite
from kit.evaluation.scores import LPIPS, PSNR, SSIM, CaptionScore, FrechetScore, Score
from kit.files import load_checked, locked, save_checked, sole_user
from kit.machine import device, exact_float32, in_cache, installed_version
from kit.pixels import to_8_bits
from kit.values import differences

SAVE_EVERY = 30  # seconds; a kill loses the clips scored since
Errors = dict[str, list[float]]  # score -> a value for each clip


class Loading(NamedTuple):
    """How clips are read; it does not change a result."""

    workers: int
    batch_size: int


class Pass:
    """Scores clips one after another; an interrupted pass continues where it was.

    Args:
        state: file that keeps the state meanwhile. key: hash of all that the scores depend on; a state with another is
            ignored.
        size: that all clips must have before they are resized; None: any.
    """

    def __init__(self, state: Path, key: str, size: str | None = None):
        self.state, self.key, self.size = state, key, size

    def run(self, candidate: Clips, clips: Dataset, scores: dict[str, Score], loading: Loading, title: str) -> Errors:
        """Adds all clips to `scores`; returns the error of each clip for each score.

        Raises:
            ValueError: if a clip cannot be read, or its pixels or features are not finite.
        """
        done, errors = self._load(scores)
        rest = Subset(clips, range(done, len(clips)))
        loader = DataLoader(rest, loading.batch_size, num_workers=loading.workers, collate_fn=collate)
        saved = time.monotonic()
        with tqdm(total=len(clips), initial=done, desc=title, unit="clip", disable=None) as bar:
            for batch in loader:
                try:
                    output = self._output(candidate, batch)
                except ValueError:
                    self._save(scores, errors, done)
                    raise
                for name, score in scores.items():
                    errors[name] += score.add(output, batch)
                done += len(output)
                bar.update(len(output))
                if done == len(clips) or time.monotonic() - saved > SAVE_EVERY:
                    self._save(scores, errors, done)
                    saved = time.monotonic()
        return errors

    def _output(self, candidate: Clips, batch: dict) -> torch.Tensor:
        """Makes the candidate's clips of a batch; rounds them, and the real clips of the batch, to 8 bits."""
        if "error" in batch:
            raise ValueError(batch["error"])
        for name, found in zip(batch["name"], batch.get("size", [])):
            if self.size not in (None, found):  # resizing only some would count against all
                raise ValueError(
                    f"videos of mixed sizes: {name} has {found} pixels, others {self.size}; make them alike first"
                )
        output = candidate.make(batch)
        for name, clip in zip(batch["name"], output):
            if not clip.isfinite().all():
                raise ValueError(f"the {candidate.row} for {name} holds NaN or infinite pixels; look at the model")
        if candidate.paired:
            batch["real"] = to_8_bits(batch.get("real", batch["video"]))
        return to_8_bits(output)

    def _load(self, scores: dict[str, Score]) -> tuple[int, Errors]:
        kept = _read_kept(self.state)
        if kept is None or kept["key"] != self.key:
            return 0, {name: [] for name in scores}
        for name, score in scores.items():
            score.load(kept["scores"][name])
        return kept["done"], kept["errors"]

    def _save(self, scores: dict[str, Score], errors: Errors, done: int):
        state = {name: score.state() for name, score in scores.items()}
        save_checked({"key": self.key, "done": done, "errors": errors, "scores": state}, self.state)

    def forget(self):
        self.state.unlink(missing_ok=True)


def real_scores(
    protocol: Protocol, clips: FileClips | DrawnClips, fold: int, tools: Tools, loading: Loading
) -> dict[str, Score]:
    """Scores of a fold's real clips, to compare the candidate's with; computed once for all evaluations, and kept."""
    scores: dict[str, Score] = {}
    if "frechet" in tools.metrics:
        scores["frechet"] = FrechetScore(tools.detector, len(clips))
    if "captions" in tools.metrics:
        scores["captions"] = CaptionScore(protocol.fps)
    for name, score in scores.items():
        measured_by = tools.detector.sha256 if name == "frechet" else name
        key = digest([protocol.real_hash(fold, measured_by), computed_by()])[:24]
        path = in_cache("real", f"{key}.pt")
        with locked(path.with_suffix(".lock")):  # a second evaluation waits for the first to compute them
            if (kept := _read_kept(path)) is None:
                part = Pass(path.with_suffix(".part.pt"), key)
                part.run(RealClips(), clips, {name: score}, loading, f"real clips: {name}")
                kept = {"protocol": protocol.as_dict(), "state": score.state()}
                save_checked(kept, path)
                part.forget()
        score.load(kept["state"])
    return scores


def _read_kept(path: Path) -> dict | None:
    """Reads what a file keeps; None if it is missing or damaged."""
    try:
        return load_checked(path)
    except (ValueError, OSError):
        return None


def candidate_scores(real: dict[str, Score], tools: Tools, protocol: Protocol) -> dict[str, Score]:
    """Fresh scores for a fold of the candidate."""
    builders = {
        "frechet": lambda: FrechetScore(tools.detector, protocol.samples, real["frechet"].nested),
        "psnr": PSNR, "ssim": SSIM, "lpips": lambda: LPIPS(tools.perceptual),
        "captions": lambda: CaptionScore(protocol.fps),
    }  # fmt: skip
    return {name: builders[name]() for name in tools.metrics}


def over_folds(results: list[dict]) -> dict:
    """Averages one metric's results over folds.

    Adds the `value` of each fold as `folds`, and their standard deviation as `spread`, None for a single fold.
    """
    values = [result["value"] for result in results]
    return {**_mean(results), "folds": values, "spread": statistics.stdev(values) if len(values) > 1 else None}


def _mean(values: list):
    match values[0]:
        case dict():
            return {key: _mean([v[key] for v in values]) for key in values[0]}
        case list():
            return [_mean(list(v)) for v in zip(*values)]
        case str():
            return values[0]
    return statistics.fmean(values)


def evaluate(cfg: DictConfig) -> dict:
    """Scores a checkpoint or a folder of videos by a protocol, or makes the videos of a prompt suite; see
    conf/evaluate.yaml.

    Writes evaluation.json, a contact sheet of the best, the median and the worst clip, and report.html, which plays them.

    Returns: what evaluation.json holds.
    """
    return evaluate_suite(cfg) if "suite" in cfg.protocol else compare(cfg)


def compare(cfg: DictConfig) -> dict:
    """Scores clips against real ones."""
    if cfg.prompts is not None or cfg.results is not None:
        raise ValueError("prompts= and results= are for prompt suites, protocol=vbench or protocol=prompts")
    check_folders(cfg)
    # Without `keep_freed_memory`: small values kept of each clip, between large blocks that come and go, would grow the heap.
    protocol, source = build_protocol(cfg)
    candidate, protocol = build_candidate(cfg, protocol, source)
    tools, protocol = build_tools(cfg, protocol, candidate, source)
    with sole_user(Path(cfg.folder)):
        return score(cfg, protocol, source, candidate, tools)


def check_folders(cfg: DictConfig):
    """Checks that the folders of clips have names, and that they and the evaluation's folder are not within each other.

    Raises:
        ValueError: if a path is empty, or what the evaluation writes would count as clips, or would take their place.
    """
    folder = Path(cfg.folder).resolve()
    for key in ("videos", "real"):
        if cfg[key] == "":
            raise ValueError(f"{key}= names no folder of videos. Is a variable of the shell unset?")
        given = None if cfg[key] is None else Path(cfg[key]).resolve()
        if given and (folder.is_relative_to(given) or given.is_relative_to(folder / CLIPS)):
            raise ValueError(
                f"{key}={cfg[key]} and the evaluation's folder {folder} are within each other; give another name="
            )


def score(cfg: DictConfig, protocol: Protocol, source: FolderClips | Shapes, candidate: Candidate, tools: Tools) -> dict:
    """Scores a candidate's clips, fold by fold, and reports."""
    folder, loading = Path(cfg.folder), Loading(cfg.workers, cfg.batch_size)
    if not cfg.overwrite:
        keep_other_result(folder, protocol, candidate, tools)
    for name, why in tools.left_out.items():
        print(f"{name} is left out: {why}")

    real = [real_clips(protocol, source, fold) for fold in range(protocol.folds)]
    clips = [candidate.dataset(protocol, of_fold, fold) for fold, of_fold in enumerate(real)]
    size = clips[0][0].get("size") if candidate.one_size else None  # of all folds
    passes, results, real_results, errors = [], [], [], []
    with exact_float32():
        for fold in range(protocol.folds):
            reference = real_scores(protocol, real[fold], fold, tools, loading)
            scores = candidate_scores(reference, tools, protocol)
            key = digest([protocol.hash, candidate.about(), tools.metrics, fold, computed_by()])
            passes.append(Pass(folder / f"fold_{fold}.part.pt", key, size))
            title = f"{candidate.row}s" + (f" {fold + 1}/{protocol.folds}" if protocol.folds > 1 else "")
            errors.append(passes[-1].run(candidate, clips[fold], scores, loading, title))
            results.append({name: score.result() for name, score in scores.items()})
            if "captions" in reference:
                real_results.append(reference["captions"].result())
        shown = shown_clips(candidate, clips[0], real[0], errors[0])

    names = {"frechet": candidate.distance, "captions": "caption_accuracy"}
    metrics = {names.get(name, name): over_folds([result[name] for result in results]) for name in tools.metrics}
    if real_results:
        metrics["caption_accuracy_of_real"] = over_folds(real_results)
    result = {
        "protocol": protocol.as_dict(), "of": candidate.about(), "source": str(candidate.path), "metrics": metrics,
        "measured": list(tools.metrics),
        "left_out": tools.left_out, "computed": computed_by(),
    }  # fmt: skip
    write_report(result, shown, folder, protocol.fps or source.native_fps)
    for done in passes:
        done.forget()
    print("\n".join(result_lines(result)))
    print(f"in {folder}: evaluation.json, contact_sheet.png, report.html")
    return result


def computed_by() -> dict[str, str]:
    """The kind of device and the versions of kit and of packages on which a result depends: in its last digits, or, where one
    of them decodes otherwise, in more. What was kept of other ones is not used."""
    packages = ("torch", "torchmetrics", "numpy", "av", "decord2", "transformers")
    versions = {name: found for name in packages if (found := installed_version(name))}
    return {"device": device().type, "kit": __version__, **versions}


def keep_other_result(folder: Path, protocol: Protocol, candidate: Candidate, tools: Tools):
    """Refuses to overwrite the result of another evaluation.

    Raises:
        FileExistsError: if the folder holds one.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        return
    found = read_result(path)
    differing = differences(found["protocol"], protocol.as_dict())
    then, now = found["of"], json.loads(json.dumps(candidate.about()))
    differing += differences(then, now)
    if then.get("hash") != now.get("hash"):  # other weights, which may be of as many steps
        differing.append(f"hash: {then.get('hash')}, {now.get('hash')}")
    differing += [f"metrics: {name}, not measured" for name in found["measured"] if name not in tools.metrics]
    if differing:
        raise FileExistsError(
            f"{path} is the result of another evaluation ({'; '.join(differing[:3])}); keep it with another name=..., or "
            f"replace it with overwrite=true"
        )


def shown_clips(candidate: Candidate, clips: Dataset, real: FileClips | DrawnClips, errors: Errors) -> list[Shown]:
    """The best, the median and the worst clip of a fold, made again, each beside its real clip."""
    shown = []
    for title, n in best_median_worst(errors).items():
        batch = collate([clips[n]])
        beside = batch["real"][0] if "real" in batch else real[n % len(real)]["video"]
        rows = {"real": beside, candidate.row: candidate.make(batch)[0]}
        shown.append(Shown(title, rows, batch["caption"][0] or batch["name"][0]))
    return shown
