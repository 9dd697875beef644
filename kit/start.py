"""Starts a training from random weights, or from those of a trained model (conf/init)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from kit.checkpoint import load_generator_alone, load_tokenizer
from kit.generator.module import GeneratorModule
from kit.tokenizer import Tokenizer
from kit.tokenizer.inflate import inflate, take_over
from kit.tokenizer.module import TokenizerModule
from kit.values import differences


def start_tokenizer(fill: Callable[[Tokenizer, Tokenizer], None], path: str, module: TokenizerModule) -> list[str]:
    """Sets a tokenizer's weights from the checkpoint at `path`. Args: fill: sets the second's weights from the first's.

    Raises:
        ValueError: if the given tokenizer has another architecture.
    """
    fill(load_tokenizer(path).model, module.model)
    return []


def start_generator(path: str, module: GeneratorModule) -> list[str]:
    """Sets a generator's weights from the checkpoint at `path`; returns notes for the user.

    The condition keeps its new weights if it differs from the given generator's, as with other classes.

    Raises:
        ValueError: if the two differ in anything else that weights depend on, naming each difference.
    """
    given, tokenizer_hash = load_generator_alone(path)
    ours, notes = module.model, []
    theirs, own = ({k: v for k, v in m.config.as_dict().items() if k not in ("window", "align")} for m in (given.model, ours))
    weights = given.model.state_dict()
    if differing := differences(theirs.pop("condition"), own.pop("condition")):
        weights = {name: w for name, w in weights.items() if not name.startswith("condition.")}
        weights |= {name: w for name, w in ours.state_dict().items() if name.startswith("condition.")}
        notes.append(f"the condition is another one ({'; '.join(differing)}) and starts anew")
    if differing := differences(theirs, own):
        raise ValueError(
            f"init.ckpt has another architecture than the generator to train: {'; '.join(differing)}; make them alike"
        )
    ours.load_state_dict(weights)
    if tokenizer_hash != module.hparams.tokenizer_hash:
        notes.append("init.ckpt spoke the bits of another tokenizer, and has to learn those of tokenizer_ckpt")
    return notes


STARTS = {  # kind of module -> values of init.how other than `scratch` -> what each does
    "tokenizer": {"inflate": partial(start_tokenizer, inflate), "weights": partial(start_tokenizer, take_over)},
    "generator": {"weights": start_generator},
}


def given_start(init: Mapping, kind: str) -> tuple[str, str] | None:
    """Reads from `init`, plain values of conf/init, how a module of this kind starts, and from which checkpoint.

    Returns:
        `how` and the checkpoint's path; None: from scratch.
    Raises:
        ValueError: for an unknown `how`, one that lacks its `ckpt`, or a `ckpt` with `scratch`.
    """
    how, path, starts = init["how"], init.get("ckpt"), STARTS[kind]
    if how == "scratch":
        if path is not None:
            raise ValueError(
                f"init.ckpt={path}, but init=scratch takes none; give one of {', '.join(f'init={s}' for s in starts)} too"
            )
        return None
    if how not in starts:
        raise ValueError(f"init.how={how}; expected for a {kind} one of scratch, {', '.join(starts)}")
    if path in (None, "???"):
        raise ValueError(f"init.how={how} needs init.ckpt=PATH, the checkpoint of a {kind} to start from")
    return how, path


def start(init: Mapping, module: TokenizerModule | GeneratorModule, resumed: bool) -> list[str]:
    """Sets a module's weights as `init` says; returns notes for the user.

    Args:
        resumed: whether the training resumes, so that its weights come from its own checkpoint.
    Raises:
        as `given_start`, `start_tokenizer`, `start_generator` or `read_checkpoint`.
    """
    given = given_start(init, module.kind)
    if given is None or resumed:
        return []
    how, path = given
    return STARTS[module.kind][how](path, module)
