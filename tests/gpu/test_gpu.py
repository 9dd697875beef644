"""Tests on a CUDA GPU (make test-gpu): equivalences that hold on a CPU hold there, and results are those of the CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from kit.checkpoint import load_generator, read_checkpoint, save_tokenizer
from kit.cli import main
from kit.data.shapes import Shapes
from kit.generator.sampler import Sampling, sample_frames
from kit.machine import exact_float32
from kit.planning.plan import memory_of, stages_of
from kit.scales import ScaleSchedule
from kit.self_check import self_check
from kit.tokenizer import Tokenizer, TokenizerConfig
from kit.tokenizer.streaming import reconstruct_stream
from kit.values import plain
from kit.verbs.fit import fit
from tests.fixtures import CLIP, GENERATOR, PROMPTS, QUICK, RISING, TOKENIZER, composed
from tests.test_self_check import HARDLY_LEARNED
from tests.test_training import losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="make test-gpu runs these, on a CUDA GPU")

ON_GPU = ["trainer.accelerator=gpu", "trainer.devices=1"]
SCORED = [
    "protocol=shapes", "protocol.frames=5", "protocol.height=32", "protocol.width=32", "protocol.real.clips=4",
    "protocol.samples=4", "protocol.folds=1", "metrics=[captions]", "workers=0",
]  # fmt: skip
SCHEDULE = ScaleSchedule(5, ((1, 1), (2, 2), (4, 4)))


def trained(root: Path, name: str, conf: str, *words: str) -> Path:
    """Trains on the GPU, in this process; returns the run's folder."""
    model = TOKENIZER if conf == "stage1_tokenizer" else GENERATOR
    fit(composed(conf, "size=tiny", f"root={root}", f"name={name}", *CLIP, *model, *QUICK, *ON_GPU, *words))
    return root / name


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Checkpoints of a tokenizer and a compiled generator, trained in bfloat16."""
    root = tmp_path_factory.mktemp("gpu")
    tokenizer = trained(root, "tokenizer", "stage1_tokenizer", "recipe.tokenizer.steps=150") / "checkpoints" / "last.ckpt"
    words = [f"tokenizer_ckpt={tokenizer}", "recipe.generator.steps=60", "callbacks.compile.least_steps=0"]
    return tokenizer, trained(root, "generator", "stage2_generator", *words) / "checkpoints" / "last.ckpt"


def first_losses(pair, root: Path, name: str, *words: str) -> torch.Tensor:
    """Returns the losses of a training of 6 steps with flips, masks and dropped conditions, without a warm-up."""
    words = ["recipe.generator.steps=6", "optimizer.warmup=0", "callbacks.video_logger.clips=0", *words]
    return torch.tensor(losses(trained(root, name, "stage2_generator", f"tokenizer_ckpt={pair[0]}", *words)))


def test_a_pair_trained_there_has_no_fault(pair):
    """The self-check passes: cached = whole, alone = in a batch, frame by frame = whole."""
    generator, tokenizer = load_generator(pair[1])
    clips = [Shapes("train", 5, 32, 32)[n] for n in range(6)]
    video = torch.stack([clip["video"] for clip in clips]).cuda()
    checks = self_check(generator.model.cuda(), tokenizer.model.cuda(), video, [clip["caption"] for clip in clips])
    assert not {check.name for check in checks if not check.ok} - HARDLY_LEARNED, [check.line() for check in checks]


@pytest.mark.parametrize("words", [{}, {"history": "full"}, {"window": 1}], ids=str)
def test_a_clip_is_the_same_in_any_batch(words, make_generator):
    """Bits are the same in float32."""
    model = make_generator(**words).cuda()

    def sample(which: list[int]) -> torch.Tensor:
        prompts, seeds = [PROMPTS[i % 2] for i in which], [10 + i for i in which]
        frames = sample_frames(model, SCHEDULE, prompts, seeds, Sampling(RISING))
        return torch.cat([frame.bits for frame in frames], dim=1)

    with exact_float32():
        together = sample([0, 1, 2, 3])
        alone = torch.cat([sample([i]) for i in range(4)])
    assert together.float().mean().sub(0.5).abs() < 0.2
    assert torch.equal(together, alone)


def test_a_clip_in_chunks_is_the_whole(make_tokenizer):
    tokenizer = make_tokenizer().cuda()
    clip = torch.rand(3, 17, 8, 8, device="cuda") * 2 - 1
    with exact_float32(), torch.no_grad():
        chunks = torch.cat(list(reconstruct_stream(tokenizer, clip.split([2, 3, 7, 1, 4], dim=1))), dim=1)
        torch.testing.assert_close(chunks, tokenizer.reconstruct(clip[None])[0], atol=2e-5, rtol=2e-5)


def test_losses_are_those_of_the_cpu(pair, tmp_path):
    """Losses are equal in float32 and near in bfloat16, compiled or not."""
    cpu = first_losses(pair, tmp_path, "cpu", "trainer.accelerator=cpu", "trainer.precision=32-true")
    assert len(cpu) == 6
    gpu = first_losses(pair, tmp_path, "gpu", "trainer.precision=32-true")
    torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=0)  # products from TF32 parts
    for name, words in {"eager": "callbacks.compile=null", "compiled": "callbacks.compile.least_steps=0"}.items():
        found = first_losses(pair, tmp_path, name, "trainer.precision=bf16-mixed", words)
        torch.testing.assert_close(found, cpu, atol=1e-2, rtol=0)


def test_sharded_training_is_that_of_one_process(pair, tmp_path):
    """FSDP2 over NCCL with one device gives the same losses, and a checkpoint that loads as any other."""
    words = ["callbacks.compile=null", "optimizer.name=adamw"]
    alone = first_losses(pair, tmp_path, "alone", "trainer.precision=32-true", *words)
    try:
        sharded = first_losses(pair, tmp_path, "sharded", "trainer=fsdp", "trainer.strategy.param_dtype=null", *words)
        halved = first_losses(pair, tmp_path, "halved", "trainer=fsdp", *words)
    finally:
        torch.distributed.destroy_process_group()  # other tests are of no group
    torch.testing.assert_close(sharded, alone, atol=2e-3, rtol=0)
    torch.testing.assert_close(halved, alone, atol=1e-2, rtol=0)
    whole = read_checkpoint(tmp_path / "sharded" / "checkpoints" / "last.ckpt", "generator")["state_dict"]
    assert all(type(w) is torch.Tensor for w in whole.values())


def test_adversarial_training_runs(tmp_path):
    words = ["recipe.tokenizer.steps=4", "loss.adversarial.weight=0.1", "loss.adversarial.adaptive=true"]
    run = trained(tmp_path, "adversarial", "stage1_tokenizer", *words)
    assert len(losses(run, metric="train/discriminator")) == 4


LEAN = ["callbacks.compile=null", "callbacks.checkpoint=null", "callbacks.last=null", "callbacks.video_logger=null"]


@pytest.mark.parametrize(
    "conf, words", [("stage1_tokenizer", []), ("stage2_generator", []), ("stage2_generator", ["recompute=true"])], ids=str
)
def test_memory_is_as_on_paper(conf, words, tmp_path):
    """The estimate is within a tenth of the measured memory, in bfloat16, not compiled."""
    codec = tmp_path / "codec.ckpt"
    values = composed("stage1_tokenizer", "size=tiny").tokenizer
    save_tokenizer(Tokenizer(TokenizerConfig(**plain(values))), {"frames": 17, "height": 64, "width": 64, "fps": 12}, codec)
    words = [*words, "encoded_clips=0", f"tokenizer_ckpt={codec}"] if conf == "stage2_generator" else words
    steps = ["trainer.max_steps=3", "+trainer.limit_val_batches=0", "data.workers=2", "data.batch_size=48"]
    cfg = composed(conf, "size=tiny", f"root={tmp_path}", *ON_GPU, *steps, *LEAN, *words)
    OmegaConf.resolve(cfg)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fit(cfg)
    measured = torch.cuda.max_memory_allocated() - before
    _, most = memory_of(cfg, stages_of(cfg)[0][2], "cuda", bfloat16=True)
    assert measured == pytest.approx(most, rel=0.1)


def test_the_notebook(pair, monkeypatch):
    """What it takes from models lies where they do, what it draws on the CPU. It draws six pictures."""
    pytest.importorskip("matplotlib").use("agg")
    from matplotlib import pyplot

    monkeypatch.setenv("KIT_RUNS", str(pair[0].parents[2]))
    notebook = Path(__file__).resolve().parents[2] / "notebooks" / "scale_tokens.ipynb"
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    pyplot.close("all")
    exec("\n".join("".join(cell["source"]) for cell in cells), {})
    assert len(pyplot.get_fignums()) == 6
    pyplot.close("all")


def test_the_verbs(pair, tmp_path, capsys):
    tokenizer, generator = pair
    sample = ["generate", f"ckpt={generator}", "prompt=a red ball"]
    for name, words in {
        "short": [*sample, "n=2"],
        "long": [*sample, "frames=17", "precision=bfloat16"],
        "validated": ["validate", f"ckpt={generator}", "clips=4"],
        "reconstructed": ["reconstruct", f"ckpt={tokenizer}"],
        "inspected": ["inspect", f"ckpt={generator}", "clips=6"],
        "evaluated": ["evaluate", f"ckpt={generator}", *SCORED],
    }.items():
        assert main([*words, f"root={tmp_path}", f"name={name}"]) == 0, name
    assert len(list(tmp_path.rglob("*.mp4"))) >= 3
