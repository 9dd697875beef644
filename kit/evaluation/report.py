"""Reports of an evaluation: printed lines, evaluation.json, a contact sheet, a page that plays clips, tables."""

from __future__ import annotations

import json
from glob import glob
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from kit.evaluation.protocol import Protocol
from kit.files import write_json, written_aside
from kit.media import contact_sheet, write_video
from kit.values import differences

# name in the result -> title, unit, digits after the point
TITLES = {
    "fvd": ("FVD", "", 2), "rfvd": ("rFVD", "", 2), "psnr": ("PSNR", " dB", 2), "ssim": ("SSIM", "", 4),
    "lpips": ("LPIPS", "", 4), "caption_accuracy": ("caption accuracy", "", 4),
    "caption_accuracy_of_real": ("caption accuracy of real clips", "", 4),
}  # fmt: skip
SHOWN, CLIPS = ("best", "median", "worst"), "clips"  # clips shown to people; their folder in the evaluation's
SETTLED = 1.05  # Fréchet distance of half the clips over that of all; up to this, their number hardly matters


def title_of(name: str, metric: dict) -> str:
    """Title of a metric; that of a perceptual distance names its network."""
    return metric.get("name", TITLES[name][0])


def number(name: str, metric: dict) -> str:
    """A value with its unit and, where there are folds, its spread."""
    _, unit, digits = TITLES[name]
    spread = "" if metric["spread"] is None else f" +- {metric['spread']:.{digits}f}"
    return f"{metric['value']:.{digits}f}{spread}{unit}"


def details(name: str, metric: dict) -> str:
    """The parts of a metric, in a few words."""
    digits = TITLES[name][2]
    if "at" in metric:
        sizes = [f"at {part} clips {value:.{digits}f}" for part, value in metric["at"].items() if part != "N"]
        unsettled = metric["at"].get("N/2", 0) > SETTLED * metric["at"]["N"]
        return ", ".join([*sizes, "of more clips lower still: compare like with like"] if unsettled else sizes)
    parts = [key for key in metric if key not in ("value", "by_frame", "folds", "spread", "name")]
    return ", ".join(f"{key.replace('_', ' ')} {metric[key]:.{digits}f}" for key in parts)


def result_lines(result: dict) -> list[str]:
    """Lines to print: one for each metric, with name and hash of the protocol, then the protocol in full."""
    protocol = Protocol.from_dict(result["protocol"])
    lines = []
    for name, metric in result["metrics"].items():
        more = details(name, metric)
        lines.append(
            f"{title_of(name, metric)} {number(name, metric)}{f' ({more})' if more else ''} [{protocol.name}@{protocol.hash}]"
        )
    return [*lines, f"protocol {protocol}"]


def best_median_worst(errors: dict[str, list[float]]) -> dict[str, int]:
    """Chooses the best, the median and the worst clip: title -> number of the clip.

    They are ordered by the error that says most: of pixels in pairs, else of features, else of captions.
    """
    by = next(name for name in ("psnr", "ssim", "lpips", "frechet", "captions") if name in errors)
    order = sorted(range(len(errors[by])), key=errors[by].__getitem__)
    return dict(zip(SHOWN, (order[0], order[(len(order) - 1) // 2], order[-1]), strict=True))


def curves(result: dict) -> list[dict]:
    """Curves for the page: each metric over the frames, as points of a 300 x 80 picture."""
    drawn = []
    for name, metric in result["metrics"].items():
        series = metric.get("by_frame", {})
        for label, values in (series if isinstance(series, dict) else {"": series}).items():
            if len(values) < 2:  # of images
                continue
            low, high = min(values), max(values)
            across = 280 / (len(values) - 1)
            heights = [75 - 70 * (v - low) / ((high - low) or 1) for v in values]
            points = " ".join(f"{10 + across * t:.1f},{y:.1f}" for t, y in enumerate(heights))
            digits = TITLES[name][2]
            title = f"{title_of(name, metric)}{f': {label}' if label else ''}"
            drawn.append({"title": title, "low": f"{low:.{digits}f}", "high": f"{high:.{digits}f}", "points": points})
    return drawn


class Shown(NamedTuple):
    """A clip shown to people: `best`, `median` or `worst`; row name -> (3, T, H, W); the clip's caption or name."""

    title: str
    rows: dict[str, Tensor]
    text: str


def write_report(result: dict, shown: list[Shown], folder: Path, fps: float):
    """Writes contact_sheet.png, the shown clips as mp4, report.html and, last, evaluation.json, all of one result."""
    (folder / "evaluation.json").unlink(missing_ok=True)
    for title in SHOWN:
        for path in (folder / CLIPS).glob(f"{title}_*.mp4"):
            path.unlink()
    headings = [f"{clip.title}: {clip.text}" for clip in shown]
    contact_sheet([clip.rows for clip in shown], headings, folder / "contact_sheet.png")
    clips = []
    for heading, clip in zip(headings, shown):
        videos = []
        for row, video in clip.rows.items():
            path = write_video(video, folder / CLIPS / f"{clip.title}_{row}.mp4", fps)
            videos.append({"row": row, "file": path.relative_to(folder).as_posix()})
        clips.append({"heading": heading, "videos": videos})
    table = [(title_of(n, m), number(n, m), details(n, m)) for n, m in result["metrics"].items()]
    notes = [f"{name} is left out: {why}" for name, why in result["left_out"].items()]
    lines = [str(Protocol.from_dict(result["protocol"])), f"{result['source']}: {words_of(result['of'])}", *notes]
    write_page(folder, result["protocol"]["name"], lines, table, clips, curves(result))
    write_json(folder / "evaluation.json", result)


def words_of(values: dict) -> str:
    return "; ".join(f"{key}: {value}" for key, value in values.items())


def write_page(folder: Path, title: str, lines: list[str], table: list, clips: list[dict], curves: list[dict]):
    """Writes report.html, which plays `clips`: {"heading", "videos": [{"row", "file"}]} each."""
    page = Environment(loader=PackageLoader("kit.evaluation", "."), autoescape=True).get_template("report.html.jinja")
    with written_aside(folder / "report.html") as aside:
        aside.write_text(page.render(title=title, lines=lines, table=table, clips=clips, curves=curves), encoding="utf-8")


def read_result(path: Path) -> dict:
    """Reads an evaluation.json.

    Raises:
        FileNotFoundError: if there is none. ValueError: if it is not the result of an evaluation against real clips.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}; `python -m kit evaluate` leaves evaluation.json in its folder")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "raw" in result:
            raise ValueError("it is a prompt suite's, whose table is vbench.md beside it")
        if Protocol.from_dict(result["protocol"]).hash != result["protocol"]["hash"]:
            raise ValueError("its protocol does not match its hash")
        return {"path": str(path), **result}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of `python -m kit evaluate`: {error!r}") from error


def side_by_side(results: list[dict]) -> str:
    """Formats results as a Markdown table, with the protocol that they share above.

    Raises:
        ValueError: if there are none, or they follow different protocols: their numbers cannot be compared.
    """
    if not results:
        raise ValueError("no results to show; give results=PATH, or several as results=[PATH,PATH]")
    first = results[0]
    for other in results[1:]:
        if other["protocol"]["hash"] != first["protocol"]["hash"]:
            told = "; ".join(differences(first["protocol"], other["protocol"]))
            raise ValueError(
                f"{first['path']} and {other['path']} follow different protocols and do not belong in one table: {told}"
            )
    names = [name for name in TITLES if any(name in r["metrics"] for r in results)]
    heads = ["", *(title_of(n, next(r["metrics"][n] for r in results if n in r["metrics"])) for n in names)]
    lines = [heads, ["---"] * len(heads)]
    for name, r in zip(told_apart([Path(r["path"]).parent for r in results]), results, strict=True):
        lines.append([name, *(number(n, r["metrics"][n]) if n in r["metrics"] else "" for n in names)])
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{Protocol.from_dict(first['protocol'])}\n\n{rows}"


def told_apart(folders: list[Path]) -> list[str]:
    """Returns the names of folders, after as many of the folders they are in as tell them apart."""
    most = max(len(folder.parts) for folder in folders)
    names = ([Path(*folder.parts[-n:]).as_posix() for folder in folders] for n in range(1, most + 1))
    return next((found for found in names if len(set(found)) == len(set(folders))), list(map(str, folders)))


def table(cfg: DictConfig) -> str:
    """Prints the results that `cfg.results` names, side by side.

    Raises:
        ValueError: if it holds what is no path; else as `read_result` and `side_by_side`.
    """
    wanted = cfg.results if isinstance(cfg.results, ListConfig) else [cfg.results]
    if not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"results={cfg.results}; expected a path of evaluation.json, or several as [PATH,PATH]")
    paths = [Path(path) for name in wanted for path in ([name] if Path(name).is_file() else sorted(glob(name)) or [name])]
    shown = side_by_side([read_result(path) for path in paths])
    print(shown)
    return shown
