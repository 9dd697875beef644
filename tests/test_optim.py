"""Muon, AdamW and the learning rate schedule."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from kit.optim import Muon, WarmupCosine, build_optimizer, check_optimizer, orthogonalise, orthogonalise_all


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=rng(seed))


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, first: int = 0):
    """Makes steps with random gradients, which depend only on the step and on the parameter's index."""
    for step in range(first, first + steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=rng(100 * step + i))
        optimizer.step()


# --- orthogonalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n", [(16, 16), (8, 40), (40, 8), (1, 12), (12, 1), (24, 96)])
def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values(m, n):
    """Jordan's coefficients bring every singular value that is not tiny to within a third of 1."""
    u, _, vt = torch.linalg.svd(matrix(m, n), full_matrices=False)
    values = torch.linspace(1.0, 0.2, min(m, n))
    y = orthogonalise(u @ values.diag() @ vt)
    assert y.shape == (m, n)
    inner = u.T @ y @ vt.T
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-3, rtol=0)
    assert (inner.diagonal() - 1).abs().max() < 0.35


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_orthogonalise_does_not_ask_how_large_its_matrix_is(scale):
    x = matrix(8, 20)
    torch.testing.assert_close(orthogonalise(x * scale), orthogonalise(x), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "x",
    [torch.zeros(8, 12), torch.ones(40, 40), matrix(32, 2) @ matrix(2, 64), torch.eye(16)[:, :1] @ matrix(1, 8)],
    ids=["zero", "rank 1", "rank 2", "one row"],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_low_rank_matrices_stay_finite_and_bounded(x, scale):
    y = orthogonalise(x * scale)
    assert y.isfinite().all()
    assert torch.linalg.matrix_norm(y, 2) < 1.35


def test_matrices_together_are_those_one_by_one():
    """The matrices have several shapes, some the transpose of others."""
    matrices = [matrix(m, n, seed) for seed, (m, n) in enumerate([(8, 20), (20, 8), (6, 6), (8, 20), (30, 4), (6, 6)])]
    for together, alone in zip(orthogonalise_all(matrices), map(orthogonalise, matrices), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("m, n", [(16, 16), (12, 40), (40, 12)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_agrees_with_torch_on_matrices(m, n, weight_decay):
    """After ten steps they agree within 3 % of the distance moved; torch iterates in bfloat16."""
    start = matrix(m, n)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(Muon([ours], [], lr=0.02, weight_decay=weight_decay), [ours], 10)
    options = dict(momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    run(torch.optim.Muon([theirs], lr=0.02, weight_decay=weight_decay, **options), [theirs], 10)
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


@pytest.mark.parametrize("shape", [(8, 4, 3, 3, 3), (4, 8, 1, 2, 2)])
def test_a_kernel_moves_as_a_matrix_of_outputs_by_the_rest(shape):
    """This holds in any memory layout."""
    start = torch.randn(shape, generator=rng())
    flat = nn.Parameter(start.flatten(1).clone())
    run(Muon([flat], [], lr=0.02, weight_decay=0.1), [flat], 3)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        kernel = nn.Parameter(start.clone(memory_format=layout))
        optimizer = Muon([kernel], [], lr=0.02, weight_decay=0.1)
        for step in range(3):
            grad = torch.randn(flat.shape, generator=rng(100 * step)).view(shape)
            kernel.grad = grad.clone(memory_format=layout)
            optimizer.step()
        torch.testing.assert_close(kernel.detach().flatten(1), flat.detach())


def test_a_muon_step_is_as_large_as_one_of_adam():
    """Its root mean square is 0.2 lr, for any gradient size and matrix shape."""
    for m, n in ((64, 64), (32, 128), (128, 32)):
        p = nn.Parameter(torch.zeros(m, n))
        p.grad = matrix(m, n) * 1e-3
        Muon([p], [], lr=1.0).step()
        assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_other_parameters_move_as_by_adamw():
    start = [torch.randn(7, generator=rng(1)), torch.randn(5, 3, generator=rng(2))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    matrices = [nn.Parameter(matrix(4, 6))]
    run(Muon(matrices, ours, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1), ours + matrices, 5)
    run(torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.9), weight_decay=0.0), theirs, 5)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not torch.equal(matrices[0], matrix(4, 6))


def test_a_gradient_of_zero_moves_nothing():
    """As of a word that no batch has had yet; of vanishing gradients the step vanishes too."""
    bias = nn.Parameter(matrix(1, 8)[0])
    before = bias.detach().clone()
    optimizer = Muon([], [bias], lr=1.0)
    for gradient, most in ((0.0, 0.0), (1e-12, 0.01)):
        bias.grad = torch.full_like(bias, gradient)
        optimizer.step()
        assert (bias - before).abs().max() <= most


def test_parameters_without_gradient_stay():
    used, unused = nn.Parameter(matrix(4, 6)), nn.Parameter(matrix(4, 6))
    optimizer = Muon([used, unused], [nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1)
    used.grad = matrix(4, 6, seed=1)
    optimizer.step()
    assert torch.equal(unused, matrix(4, 6)) and not torch.equal(used, matrix(4, 6))


def test_step_calls_its_closure():
    p = nn.Parameter(matrix(4, 6))
    optimizer = Muon([p], [], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert p.square().sum() < before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_the_uninterrupted_one(name):
    """State saved to a file and loaded gives the same weights to the last bit, and the same learning rate."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(2, 4, 2), nn.LayerNorm(4), nn.Linear(4, 6), nn.Embedding(5, 3))
        optimizer = build_optimizer(model, name, lr=0.01)
        return model, optimizer, WarmupCosine(optimizer, 2, 10)

    def go(model, optimizer, scheduler, steps, first=0):
        for step in range(first, first + steps):
            run(optimizer, list(model.parameters()), 1, step)
            scheduler.step()

    whole, half, resumed = build(), build(), build()
    go(*whole, 6)
    go(*half, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in half], file)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file)):
        part.load_state_dict(state)
    go(*resumed, 3, first=3)
    for a, b in zip(whole[0].parameters(), resumed[0].parameters()):
        assert torch.equal(a, b)
    assert whole[2].get_last_lr() == resumed[2].get_last_lr()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone; gives its mesh."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_adamw_steps_sharded_weights_all_at_once(alone):
    """As it does others by default on a GPU; also after the state of a run is loaded whose weights were not sharded."""

    def build(sharded: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        for module in model:
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(distribute_tensor(p.data, alone, [Shard(0)]) if sharded else p))
        return list(model.parameters()), build_optimizer(model, "adamw", lr=0.01)

    def go(parameters: list, optimizer, steps: range):
        for step in steps:
            for number, p in enumerate(parameters):
                grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number))
                p.grad = distribute_tensor(grad, alone, [Shard(0)]) if isinstance(p, DTensor) else grad
            optimizer.step()

    (whole, plain), (shares, optimizer) = build(False), build(True)
    go(whole, plain, range(2))
    go(shares, optimizer, range(2))
    state = copy.deepcopy(plain.state_dict())
    for kept in state["state"].values():
        kept.update({name: distribute_tensor(kept[name], alone, [Shard(0)]) for name in ("exp_avg", "exp_avg_sq")})
    optimizer.load_state_dict(state)
    go(whole, plain, range(2, 4))
    go(shares, optimizer, range(2, 4))
    assert [group["foreach"] for built in (optimizer, plain) for group in built.param_groups] == [True, True, None, None]
    for p, share in zip(whole, shares, strict=True):
        assert torch.equal(p, share.full_tensor())


def test_a_resumed_run_follows_the_rate_it_is_given():
    def build(lr):
        optimizer = build_optimizer(nn.Linear(2, 2), "adamw", lr)
        return optimizer, WarmupCosine(optimizer, 2, 10)

    began, resumed = build(0.01), build(0.002)
    for _ in range(3):
        began[0].step()
        began[1].step()
    for part, other in zip(resumed, began):
        part.load_state_dict(other.state_dict())
    for _ in range(2):
        rates = [group["lr"] for optimizer in (began[0], resumed[0]) for group in optimizer.param_groups]
        assert rates[2:] == pytest.approx([rate / 5 for rate in rates[:2]])
        for optimizer, schedule in (began, resumed):
            optimizer.step()
            schedule.step()


# --- building --------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.table = nn.Linear(4, 6), nn.LayerNorm(6), nn.Embedding(5, 4)
        self.vector = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_adamw_decays_matrices_alone():
    model = Parts()
    optimizer = build_optimizer(model, "adamw", lr=0.1, betas=[0.8, 0.9], weight_decay=0.3)
    assert type(optimizer) is torch.optim.AdamW
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): 0.0 for p in model.parameters() if p.requires_grad} | {id(model.linear.weight): 0.3}
    assert decay == expected
    assert all(g["betas"] == (0.8, 0.9) and g["lr"] == 0.1 for g in optimizer.param_groups)


def test_muon_moves_matrices_and_leaves_tables_and_vectors_to_adamw():
    model = Parts()
    optimizer = build_optimizer(model, "muon", lr=0.1)
    assert isinstance(optimizer, Muon)
    by_muon = {id(p): g["muon"] for g in optimizer.param_groups for p in g["params"]}
    expected = {id(p): False for p in model.parameters() if p.requires_grad} | {id(model.linear.weight): True}
    assert by_muon == expected


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 2), nn.Linear(3, 2)])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_kernels_of_convolutions_count_as_matrices(name, layer):
    """They are what Muon moves, and what decays."""
    chosen, others = build_optimizer(layer, name, lr=0.1).param_groups
    assert chosen["params"] == [layer.weight] and others["params"] == [layer.bias]


def test_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer.name=sgd; expected one of: adamw, muon"):
        build_optimizer(Parts(), "sgd", lr=0.1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_paper_is_the_default(name):
    matrices = build_optimizer(Parts(), name, lr=0.1).param_groups[0]
    assert (matrices["betas"], matrices["weight_decay"]) == ((0.9, 0.95), 0.05)


@pytest.mark.parametrize(
    "key, value", [("clip", 0), ("betas", [0.9, 1]), ("betas", [0.9]), ("lr", -1), ("warmup", -1), ("name", "lion")]
)
def test_values_that_make_no_sense(key, value):
    good = {"name": "adamw", "lr": 1e-4, "weight_decay": 0.05, "warmup": 0, "clip": None, "betas": [0.9, 0.95]}
    check_optimizer(good, good)
    with pytest.raises(ValueError, match=f"optimizer.{key}="):
        check_optimizer({**good, key: value}, good)


# --- learning rate ---------------------------------------------------------------------------------------------------


def course(warmup: int, steps: int, until: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupCosine(optimizer, warmup, steps)
    rates = []
    for _ in range(until):
        rates.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = course(warmup=4, steps=24, until=31)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[14] == pytest.approx(0.505)  # half way
    assert rates[9] == pytest.approx(0.01 + 0.99 * (1 + 0.5**0.5) / 2)
    assert rates[24:] == pytest.approx([0.01] * 7)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


@pytest.mark.parametrize("warmup, steps", [(0, 10), (10, 10), (20, 10)])
def test_learning_rate_with_no_or_too_long_a_warm_up(warmup, steps):
    rates = course(warmup, steps, until=30)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)


def test_a_training_that_is_prolonged_has_the_longer_course():
    def build(warmup: int, steps: int):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, WarmupCosine(optimizer, warmup, steps)

    (optimizer, began), (other, resumed) = build(2, 10), build(6, 40)
    for _ in range(10):
        optimizer.step(), began.step()
    resumed.load_state_dict(began.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(2 * build(6, 40)[1].factor(10)) != optimizer.param_groups[0]["lr"]
