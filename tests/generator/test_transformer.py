"""The transformer: causality over blocks, conditions, sizes, moving to another device, reloading."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kit.confs import CONF
from kit.data.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from kit.generator.condition import ClassCondition, ConditionConfig, TextCondition, WordEncoder, check_classes
from kit.generator.mask import View, attention_views
from kit.generator.rope import rotary_table
from kit.generator.transformer import Attention, Generator, GeneratorConfig, RMSNorm, SwiGLU
from kit.scales import ScaleSchedule
from kit.tokenizer.quantizer import to_code
from tests.fixtures import composed
from tests.plugin import randomise

SCHEDULE = ScaleSchedule(3, ((1, 1), (2, 2), (2, 3)))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = ConditionConfig(kind="class", classes=("run", "jump", "swim"))


def inputs_of(schedule: ScaleSchedule = SCHEDULE, batch: int = 1, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, schedule.length, d, generator=torch.Generator().manual_seed(seed)) * d**-0.5


pytestmark = pytest.mark.usefixtures("no_grad")


def touched(a: torch.Tensor, b: torch.Tensor, schedule: ScaleSchedule) -> list[bool]:
    """Returns for each block whether any of its logits differ by more than rounding."""
    difference = (a - b).abs().amax((0, 2))
    assert not ((difference > 1e-5) & (difference < 1e-4)).any()  # nothing between rounding and a real change
    return [bool((difference[b.slice] > 1e-5).any()) for b in schedule.blocks]


def test_a_block_moves_its_own_and_later_logits_and_no_earlier_ones(make_generator):
    """Checks all pairs of blocks."""
    model, inputs = make_generator(), inputs_of()
    condition = model.condition(["a red ball"])
    clean = model(inputs, SCHEDULE, condition)
    assert clean.shape == (1, SCHEDULE.length, 4) and clean.dtype == torch.float32
    for i, b in enumerate(SCHEDULE.blocks):
        other = inputs.clone()
        other[:, b.slice] += inputs_of(seed=1)[:, b.slice] + 0.5
        moved = touched(clean, model(other, SCHEDULE, condition), SCHEDULE)
        assert moved == [j >= i for j in range(len(SCHEDULE.blocks))], (b.f, b.k)


@pytest.mark.parametrize("align", ["grid", "center"])
def test_tokens_of_a_block_see_each_other(make_generator, align):
    model, inputs = make_generator(align=align), inputs_of()
    condition = model.condition(["a red ball"])
    b = SCHEDULE.block(1, 2)
    other = inputs.clone()
    other[:, b.stop - 1] += 1.0
    difference = (model(inputs, SCHEDULE, condition) - model(other, SCHEDULE, condition)).abs().amax((0, 2))
    assert (difference[b.slice] > 1e-4).all()


@pytest.mark.parametrize("window", [0, 1, 2])
def test_one_layer_reaches_window_frames_back(make_generator, window):
    schedule = ScaleSchedule(4, SCHEDULE.grids)
    model, inputs = make_generator(layers=1, window=window), inputs_of(schedule)
    condition = model.condition(["a red ball"])
    clean = model(inputs, schedule, condition)
    other = inputs.clone()
    other[:, schedule.frame(0)] += 1.0
    moved = touched(clean, model(other, schedule, condition), schedule)
    assert moved == [b.f <= window for b in schedule.blocks]


def test_a_masked_frame_is_unseen_by_later_frames(make_generator):
    model, inputs = make_generator(layers=1), inputs_of(batch=2)
    condition = model.condition(["a red ball"] * 2)
    kept = torch.tensor([[True, True, True], [True, False, True]])
    clean = model(inputs, SCHEDULE, condition, kept)
    other = inputs.clone()
    other[:, SCHEDULE.frame(1)] += 1.0
    after = model(other, SCHEDULE, condition, kept)
    frames = [b.f for b in SCHEDULE.blocks]
    assert touched(clean[:1], after[:1], SCHEDULE) == [f >= 1 for f in frames]
    assert touched(clean[1:], after[1:], SCHEDULE) == [f == 1 for f in frames]
    torch.testing.assert_close(clean[:1], model(inputs[:1], SCHEDULE, condition[:1]), **CLOSE)


@pytest.mark.parametrize("part, reached", [(0, [0]), (1, [0]), (2, [0]), (3, [1, 2])])
def test_with_full_history_later_frames_see_the_finished_frame_alone(make_generator, part, reached):
    """With one layer and no inherited feature: which frames' logits change with a scale or the history block of frame 0."""
    model = make_generator(layers=1, history="full", inherit="none")
    layout, condition = model.layout(SCHEDULE), model.condition(["a red ball"])
    inputs = torch.randn(1, layout.length - 6, 4, generator=torch.Generator().manual_seed(0)) / 2
    clean = model(inputs, SCHEDULE, condition)
    assert clean.shape == (1, SCHEDULE.length, 4)
    other = inputs.clone()
    other[:, layout.block(0, part).slice] += 1.0
    moved = touched(clean, model(other, SCHEDULE, condition), SCHEDULE)
    assert sorted({b.f for b, m in zip(SCHEDULE.blocks, moved) if m}) == reached


@pytest.mark.parametrize("condition", [ConditionConfig(length=3, buckets=64), CLASSES], ids=["text", "class"])
def test_batch_is_samples_side_by_side(make_generator, condition):
    model, inputs = make_generator(condition=condition), inputs_of(batch=3)
    states = model.condition(["run", "swim", "jump"], torch.tensor([False, False, True]))
    logits = model(inputs, SCHEDULE, states)
    alone = [model(inputs[i : i + 1], SCHEDULE, states[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(logits, torch.cat(alone), **CLOSE)


def test_scales_of_one_place_are_told_apart(make_generator):
    """Block (f, 0) and the first token of (f, 1) have the same position: the scale embedding must separate them."""
    model = make_generator()
    x = model.embed(torch.zeros(1, 2, 4), torch.tensor([0, 1]))
    assert not torch.allclose(x[:, 0], x[:, 1])


def test_first_block_reads_the_learned_start(make_generator):
    model, inputs = make_generator(), inputs_of()
    condition = model.condition(["a red ball"])
    clean = model(inputs, SCHEDULE, condition)
    model.start.add_(1.0)
    assert all(touched(clean, model(inputs, SCHEDULE, condition), SCHEDULE))
    scale = torch.zeros(2, dtype=torch.long)
    x, plain = model.embed(inputs[:, :2], scale, first=1), model.embed(inputs[:, :2], scale)
    torch.testing.assert_close(x - plain, torch.stack([model.start, torch.zeros_like(model.start)])[None], **CLOSE)


def test_a_new_model_has_no_opinion():
    """All its logits are 0, so its first loss is one bit per bit."""
    model = Generator(GeneratorConfig(2, 32, 2, 4, 3))
    assert not model(inputs_of(), SCHEDULE, model.condition(["a red ball"])).any()


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("kept", [None, torch.tensor([[True] * 3, [False, True, False]])], ids=["all", "masked"])
def test_training_and_inference_compute_the_same(make_generator, window, kept):
    """With gradients the attention may use another code path; logits stay the same."""
    model, inputs = make_generator(window=window), inputs_of(batch=2)
    condition = model.condition(["a red ball", "a star"])
    expected = model(inputs, SCHEDULE, condition, kept)
    with torch.enable_grad():
        logits = model(inputs, SCHEDULE, condition, kept)
    assert logits.requires_grad and not expected.requires_grad
    torch.testing.assert_close(logits.detach(), expected, **CLOSE)


def test_every_weight_learns(make_generator):
    """All parameters get a gradient from the loss of one batch."""
    model, inputs = make_generator(), inputs_of(batch=2)
    with torch.enable_grad():
        condition = model.condition(["a red", "a star"], torch.tensor([False, True]))
        model(inputs, SCHEDULE, condition).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name


# --- conditions ------------------------------------------------------------------------------------------------------


def test_every_word_and_its_place_count(make_generator):
    model = make_generator()
    texts = ("a red ball", "a blue ball", "a ball red", "a red")
    logits = [model(inputs_of(), SCHEDULE, model.condition([text])) for text in texts]
    for i in range(4):
        for j in range(i):
            assert all(touched(logits[i], logits[j], SCHEDULE)), (i, j)


def test_text_is_read_without_case_and_punctuation_up_to_its_length():
    encoder = WordEncoder(8, length=3, buckets=64)
    ids = encoder.ids(["A red, ball.", "a red ball", "a red ball again", "a", ""])
    assert ids.shape == (5, 3)
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[1], ids[2])
    assert torch.equal(encoder.ids(["a red,ball"])[0], ids[0])
    assert ids[3, 0] == ids[0, 0] and (ids[3, 1:] == -1).all() and (ids[4] == -1).all()
    states, mask = encoder(["a red", ""])
    assert states.shape == (2, 3, 8) and mask.tolist() == [[True, True, False], [False] * 3]


def test_words_of_shapes_have_buckets_of_their_own():
    config = ConditionConfig()
    words = sorted({w for phrase in (*COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, "a", "an") for w in phrase.split()})
    encoder = WordEncoder(1, length=1, buckets=config.buckets)
    assert len(set(encoder.ids(words).flatten().tolist())) == len(words)
    captions = (f"a {c} {s} {m} {b}" for c in COLOURS for s in SHAPES for m in MOTIONS for b in BACKGROUNDS)
    longest = max(len(caption.split()) for caption in captions)
    assert longest <= config.length


@pytest.mark.parametrize("config", [ConditionConfig(length=3, buckets=64), CLASSES], ids=["text", "class"])
def test_a_dropped_condition_is_the_same_for_all_and_unlike_any_other(make_generator, config):
    condition = make_generator(condition=config).condition
    texts = ["run", "jump", "swim"]
    kept = condition(texts)
    assert kept.shape == (3, condition.length, 32)
    dropped = condition(texts, torch.tensor([True, False, True]))
    assert torch.equal(dropped[1], kept[1])
    assert torch.equal(dropped[0], dropped[2])
    assert all(not torch.allclose(dropped[0], row) for row in kept)
    assert torch.equal(condition(texts, torch.zeros(3, dtype=torch.bool)), kept)


def test_empty_text_is_no_condition(make_generator):
    condition = make_generator().condition
    assert torch.equal(condition([""]), condition(["a red ball"], torch.tensor([True])))
    assert not torch.allclose(condition([""]), condition(["a red ball"]))
    assert torch.equal(condition(["", "a"], torch.tensor([False, False]))[0], condition.null), "in training too"
    assert not torch.allclose(condition.null, condition.empty)


def read_on_a_rank(rank: int, folder: str):
    """Encodes captions on one rank of a distributed training, where DDP later copies the buffers of rank 0 to all."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    encoder = WordEncoder(8, 3, 64).train()
    encoder([["a red ball", "blue"], ["a star", "on sand"]][rank])
    torch.save(encoder.seen, f"{folder}/seen{rank}")
    torch.distributed.destroy_process_group()


def test_all_ranks_know_the_words_of_each(tmp_path):
    torch.multiprocessing.start_processes(read_on_a_rank, (str(tmp_path),), 2, start_method="fork")
    seen = [torch.load(tmp_path / f"seen{rank}") for rank in range(2)]
    alone = WordEncoder(8, 3, 64).train()
    alone(["a red ball", "blue", "a star", "on sand"])
    assert torch.equal(seen[0], alone.seen) and torch.equal(seen[1], alone.seen)


def test_words_not_read_or_never_trained_are_told(make_generator):
    condition = make_generator().condition
    condition.train()(["a red ball", "ball"]), condition.eval()(["a blue star"])
    assert condition.encoder.seen.sum() == 3, "places without a word are no words"
    assert condition.notes("A red ball.") == []
    assert condition.notes("a blue ball") == ["never seen in training, so without a meaning: blue"]
    assert condition.notes("a red ball in blue") == ["of 'a red ball in blue' the first 3 words are read, not: in blue"]
    assert condition.notes("  ") == ["the prompt is empty: clips of any kind"]
    assert condition.notes("...") == ["'...' has no words: clips of any kind"]


def test_captions_that_are_cut_are_told(make_generator):
    told = "2 of 3 captions are longer than 3 words, such as 'a red ball in blue'; condition.length=7 reads them"
    captions = {"a red ball", "a red ball in blue", "a red ball, in green and blue."}
    assert make_generator().condition.cut(captions) == told


def test_conditions_read_their_part_of_a_batch(make_generator):
    batch = {"caption": ["a red ball", "a star"], "label": torch.tensor([2, 0])}
    assert make_generator().condition.prompts(batch) == batch["caption"]
    assert make_generator(condition=CLASSES).condition.prompts(batch) == ["swim", "run"]


def test_what_has_no_class_is_unconditional(make_generator):
    """Items without a label (-1) must not get the embedding of the last class."""
    condition = make_generator(condition=CLASSES).condition
    names = condition.prompts({"label": torch.tensor([1, -1])})
    assert names == ["jump", ""] and condition.notes("") == ["no class: clips of any kind"]
    without = condition(["jump", "jump"], torch.tensor([False, True]))
    assert torch.equal(condition(names), without) and not torch.equal(without[0], without[1])


def test_classes_in_another_order_are_other_classes():
    """A label is a place among them."""
    condition = ConditionConfig("class", ("jump", "run"))
    check_classes(condition, ["jump", "run"], "the data", "take others")
    with pytest.raises(ValueError, match="knows the classes jump, run, the data run, jump; take others"):
        check_classes(condition, ["run", "jump"], "the data", "take others")


def test_condition_kinds_build_what_they_say(make_generator):
    assert isinstance(make_generator().condition, TextCondition)
    assert isinstance(make_generator(condition=CLASSES).condition, ClassCondition)


def test_errors_name_what_is_known(make_generator):
    with pytest.raises(ValueError, match="unknown class 'fly'; this model knows: run, jump, swim"):
        make_generator(condition=CLASSES).condition(["run", "fly"])
    with pytest.raises(ValueError, match="needs classes"):
        make_generator(condition=ConditionConfig(kind="class"))
    with pytest.raises(ValueError, match="condition.kind=sound; expected one of: text, class"):
        ConditionConfig(kind="sound")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"inherit": "some"}, "inherit=some; expected one of: first, all, none"),
        ({"history": "short"}, "history=short; expected one of: scales, full"),
        ({"layers": -1}, "generator.layers=-1; expected a whole number of 1 or more"),
        ({"heads": 0}, "generator.heads=0; expected a whole number of 1 or more"),
        ({"window": -1}, "window=-1; expected a whole number of 0 or more"),
        ({"window": 1.5}, "window=1.5; expected a whole number of 0 or more"),
        ({"window": "two"}, "window=two; expected a whole number of 0 or more"),
    ],
)
def test_unknown_choices_and_wrong_numbers_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        GeneratorConfig(**{"layers": 1, "width": 32, "heads": 2, "bits": 4, "scales": 3, **value})


@pytest.mark.parametrize("value", [{"length": 0}, {"length": 1.5}, {"buckets": 0}, {"channels": None}])
def test_numbers_of_a_condition_that_mean_nothing_are_told(value):
    key, wrong = value.popitem()
    told = f"condition.{key}={'null' if wrong is None else wrong}; expected a whole number of 1 or more"
    with pytest.raises(ValueError, match=told):
        ConditionConfig(**{key: wrong})


@pytest.mark.parametrize("width, heads", [(30, 4), (36, 3), (8, 2)])
def test_head_width_must_split_over_the_axes(width, heads):
    with pytest.raises(ValueError, match="multiple of 8"):
        GeneratorConfig(layers=1, width=width, heads=heads, bits=4, scales=3)


# --- sizes, moving, reloading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, parameters", [("tiny", 2.7e6), ("small", 50e6), ("base", 300e6), ("L", 926e6), ("XL", 2.0e9), ("4B", 4e9)]
)
def test_presets_have_the_sizes_that_they_tell(size, parameters):
    values = composed(f"size/{size}")
    tokenizer = values["tokenizer"]
    with torch.device("meta"):
        config = GeneratorConfig(**values["generator"], bits=tokenizer["bits"], scales=len(tokenizer["scales"]))
        model = Generator(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.1)


@pytest.mark.parametrize("size", sorted(path.stem for path in (CONF / "size").glob("*.yaml")))
def test_every_preset_runs_on_another_device(size):
    """It runs on the meta device, so no table or mask stays on the device where the model was built."""
    values = composed(f"size/{size}")
    sides, bits = values["tokenizer"]["scales"], values["tokenizer"]["bits"]
    schedule = ScaleSchedule.from_sides(2, sides)
    with torch.device("meta"):
        model = Generator(GeneratorConfig(**values["generator"], bits=bits, scales=len(sides)))
        inputs = torch.zeros(1, schedule.length, model.config.inputs)
    logits = model(inputs, schedule, model.condition(["a red ball"]))
    assert logits.device.type == "meta" and logits.shape == (1, schedule.length, bits)


def test_training_goes_on_with_what_a_validation_asked_for_first(make_generator):
    """Cached positions and masks of a schedule must not be inference tensors, which training cannot use."""
    schedule = ScaleSchedule(2, ((1, 1), (3, 5)))  # that no other test has
    model, inputs = make_generator().requires_grad_(), inputs_of(schedule)
    with torch.inference_mode():
        expected = model(inputs, schedule, model.condition(["a red ball"])).clone()
    assert not schedule.coordinates.is_inference()
    assert not attention_views(schedule, 3, schedule.length)[0].mask.is_inference()
    with torch.enable_grad():
        logits = model(inputs, schedule, model.condition(["a red ball"]), torch.tensor([[True, True]]))
        logits.sum().backward()
    torch.testing.assert_close(logits.detach(), expected, **CLOSE)


def test_double_precision_gives_the_same_logits(make_generator):
    model, inputs = make_generator(), inputs_of()
    before = model(inputs, SCHEDULE, model.condition(["a red ball"]))
    model.to(dtype=torch.float64)
    after = model(inputs.double(), SCHEDULE, model.condition(["a red ball"]))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_weights_and_plain_config_are_the_whole_model(make_generator):
    model, inputs = make_generator(window=1, align="center", condition=CLASSES), inputs_of()
    config = GeneratorConfig.from_dict(json.loads(json.dumps(model.config.as_dict())))
    assert config == model.config
    again = Generator(config)
    again.load_state_dict(model.state_dict())
    expected = model(inputs, SCHEDULE, model.condition(["jump"]))
    assert torch.equal(again(inputs, SCHEDULE, again.condition(["jump"])), expected)


@pytest.mark.parametrize("condition, prompts", [(ConditionConfig(), ["a red ball", ""]), (CLASSES, ["run", "jump"])])
def test_new_condition_tokens_are_of_one_size(condition, prompts):
    """Tokens of words, padding, dropped conditions and classes have the size of a pretrained encoder's states."""
    torch.manual_seed(0)
    config = GeneratorConfig(layers=1, width=192, heads=3, bits=4, scales=2, condition=condition)
    condition = Generator(config).condition
    for dropped in (False, True):
        tokens = condition(prompts, torch.tensor([dropped, dropped]))
        assert torch.allclose(tokens.square().mean(-1).sqrt(), torch.tensor(0.5), atol=0.2)


VARIANTS = [{}, {"window": 1}, {"history": "full"}, {"history": "full", "window": 1}, {"inherit": "all", "align": "center"}]


def gradients(model: Generator, kept: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Returns the gradients of a loss that depends on every logit, and the logits."""
    schedule = SCHEDULE
    layout = model.layout(schedule)
    tokens = layout.sequence_length
    inputs = torch.randn(2, tokens, model.config.inputs, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with torch.enable_grad():
        logits = model(inputs, schedule, model.condition(["a red ball", "a blue star"]), kept)
        (logits * torch.linspace(-1, 1, logits[0].numel()).view_as(logits[0])).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kept", [None, torch.tensor([[True, False, True], [False, False, True]])])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_by_frames_is_attention_over_all(make_generator, variant, kept, monkeypatch):
    model = make_generator(**variant)
    whole = gradients(model, kept)
    monkeypatch.setattr("kit.generator.mask.SHORT", 0)
    by_frames = gradients(model, kept)
    assert whole.keys() == by_frames.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(by_frames[name], gradient, atol=1e-4, rtol=1e-4)


def test_what_is_recomputed_is_what_was(make_generator):
    """With `recompute` logits and gradients are the same to the last bit, and less is kept for the backward pass."""
    model, kept = make_generator(), torch.tensor([[True, False, True], [True, True, True]])
    sizes, found = [], []
    for model.recompute in (False, True):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            found.append(gradients(model, kept))
        sizes.append(sum(held))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sizes[1] < sizes[0] / 2


def test_norms_are_the_same_in_every_precision():
    """This holds for small numbers too, which an epsilon of bfloat16's precision would reduce."""
    x = torch.randn(4, 64) * 0.02
    exact = RMSNorm(64)(x)
    torch.testing.assert_close(exact.pow(2).mean(-1), torch.ones(4), atol=5e-3, rtol=0)
    torch.testing.assert_close(RMSNorm(64)(x.bfloat16()).float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.filterwarnings("ignore:User provided device_type")
def test_norms_keep_the_type_of_their_input_on_a_gpu():
    """There autocast would compute them in float32. Shown with tensors that only stand for a GPU's."""
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        torch.set_autocast_enabled("cuda", True)  # where there is none, torch.autocast has left it off
        norm, x = RMSNorm(64), torch.empty(2, 64, dtype=torch.bfloat16, device="cuda")
        norm.weight = nn.Parameter(torch.empty(64, device="cuda"))
        assert F.rms_norm(x, (64,), norm.weight.to(x.dtype)).dtype == torch.float32
        assert norm(x).dtype == torch.bfloat16


def test_logits_are_of_float32_in_every_precision(make_generator):
    """Guidance multiplies what rounding does to them."""
    model, hidden = make_generator(), torch.randn(1, 5, 32)
    exact = model.logits(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.logits(hidden), exact)
    near = model.bfloat16().logits(hidden.bfloat16())
    assert near.dtype == torch.float32 and not torch.equal(near, near.bfloat16().float())


def test_queries_and_keys_have_one_size_and_values_their_own():
    attention, x, where = randomise(Attention(32, 2)), torch.randn(1, 6, 32), torch.randint(0, 9, (6, 3)).float()
    found = []
    for rows in (slice(0), slice(0, 32), slice(32, 64), slice(64, 96)):  # none, queries, keys, values
        again = copy.deepcopy(attention)
        again.qkv.weight[rows] *= 3
        found.append(again(x, rotary_table(where, 16), [View(slice(None), slice(None), None)]))
    before, queries, keys, values = found
    torch.testing.assert_close(queries, before)
    torch.testing.assert_close(keys, before)
    torch.testing.assert_close(values, 3 * before)


def test_attention_depends_on_relative_positions_only():
    """It would not if queries and keys were rotated before they are normalised."""
    attention, x, where = randomise(Attention(32, 2)), torch.randn(1, 6, 32), torch.randint(0, 9, (6, 3)).float()
    here, there, other = (
        attention(x, rotary_table(to, 16), [View(slice(None), slice(None), None)]) for to in (where, where + 7, 2 * where)
    )
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(here, other, atol=1e-3)


def test_the_feed_forward_layer_by_hand():
    layer, x = randomise(SwiGLU(8, 12)), torch.randn(3, 8)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate / (1 + (-gate).exp()) * up) @ layer.down.weight.T)


def test_new_weights_have_their_sizes():
    """What is added to the residual stream is smaller in deep models; bits enter it with size 1."""
    model = Generator(GeneratorConfig(8, 64, 2, 16, 3))
    for weight, size in (
        (model.project.weight, 16**-0.5),
        (model.scale_embedding.weight, 0.02),
        (model.start, 0.02),
        (model.layers[3].attention.qkv.weight, 0.02),
        (model.layers[3].attention.out.weight, 0.02 / 4),
        (model.layers[3].mlp.down.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(size, rel=0.3)
    code = to_code(torch.rand(1, 50, 16) < 0.5)
    assert model.embed(code, torch.zeros(50, dtype=torch.long)).std().item() == pytest.approx(1, rel=0.3)
