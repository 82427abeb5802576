"""Muon: orthogonal updates, against torch's own and against a singular value decomposition."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gptcore.errors import InvalidInput
from gptcore.train.muon import Muon, orthogonal
from gptcore.train.trainer import first_model, optimizers
from tests.train.small import QUICK, changed, losses, run, small_job

pytestmark = pytest.mark.usefixtures("data_folder")
SHAPES = [(16, 16), (16, 16), (48, 16), (16, 48)]


def matrices(seed: int = 1) -> list[nn.Parameter]:
    """Return parameters of all shapes, with gradients."""
    drawn = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in SHAPES]
    for one in made:
        one.grad = torch.randn(one.shape, generator=drawn)
    return made


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (64, 300)])
def test_an_orthogonal_matrix_has_the_same_singular_vectors_and_values_near_1(shape) -> None:
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    u, _, vt = torch.linalg.svd(given, full_matrices=False)
    found = u.mT @ orthogonal(given) @ vt.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-4
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_a_matrix_of_zeros_stays_one() -> None:
    assert orthogonal(torch.zeros(1, 4, 8)).abs().max() == 0.0


def test_three_steps_go_where_torchs_own_go() -> None:
    ours, theirs = matrices(), matrices()
    first = [one.detach().clone() for one in ours]
    mine = Muon(ours, lr=1e-2, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in (3, 4, 5):
        for one, twin, fresh in zip(ours, theirs, matrices(seed), strict=True):
            one.grad, twin.grad = fresh.grad.clone(), fresh.grad.clone()
        mine.step()
        other.step()
    for one, twin, was in zip(ours, theirs, first, strict=True):
        way = (twin - was).abs().max()
        assert way > 3e-3
        assert (one - twin).abs().max() < 0.03 * way  # torch's has the 8 bits of bf16


def test_matrices_of_one_shape_do_not_mix() -> None:
    together, alone = matrices(), matrices()
    Muon(together, lr=1e-2).step()
    for one in alone:
        Muon([one], lr=1e-2).step()
    for one, twin in zip(together, alone, strict=True):
        assert torch.allclose(one, twin, atol=1e-6)


def test_it_takes_the_matrices_of_the_blocks_and_adamw_all_else(tmp_path: Path) -> None:
    what = small_job(tmp_path / "training", changed(QUICK, optimizer="muon"))
    model = first_model(what, "cpu")
    adamw, muon = optimizers(model, what.settings, "cpu")
    taken = [id(p) for one in (adamw, muon) for g in one.param_groups for p in g["params"]]
    assert sorted(taken) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in muon.param_groups:
        assert all(
            ".mlp." in names[id(p)] or ".attention." in names[id(p)] for p in group["params"]
        )


def test_it_learns(tmp_path: Path) -> None:
    settings = changed(QUICK, steps=60, warmup=5, learning_rate=1e-2, optimizer="muon")
    events, outcome = run(tmp_path / "training", settings)
    assert outcome.best_loss < 0.6 * losses(events)[1]


def test_a_resume_with_another_optimizer_is_refused_by_name(tmp_path: Path) -> None:
    events, _ = run(tmp_path / "one", changed(QUICK, optimizer="muon"))
    assert losses(events)
    with pytest.raises(InvalidInput, match="optimizer \\(muon, not adamw\\)"):
        run(tmp_path / "one", QUICK, resume=True)
