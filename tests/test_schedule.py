import pytest
import torch
from finetuning.schedule import PruneSchedule, make_lr_scheduler
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler


def test_fixed_and_warmed_up_ratios():
    assert [PruneSchedule(0.8).ratio(step) for step in (0, 1, 100)] == [0.8, 0.8, 0.8]
    warmed_up = PruneSchedule(0.8, warmup_steps=4)
    assert [warmed_up.ratio(step) for step in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])


@given(seed=st.integers(0, 2**31), step=st.integers(0, 10**6))
def test_random_ratios_depend_on_the_seed_and_the_step_alone(seed, step):
    choices = (0.0, 0.3, 0.9)
    assert PruneSchedule(0.5, choices, seed=seed).ratio(step) in choices
    assert PruneSchedule(0.5, choices, seed=seed).ratio(step) == PruneSchedule(0.1, choices, seed=seed).ratio(step)


def test_every_random_ratio_is_drawn_and_warmed_up():
    ratios = [PruneSchedule(0.5, (0.0, 0.3, 0.9)).ratio(step) for step in range(300)]
    assert all(70 < ratios.count(choice) < 130 for choice in (0.0, 0.3, 0.9))
    warmed_up = [PruneSchedule(0.5, (0.0, 0.3, 0.9), warmup_steps=100).ratio(step) for step in range(300)]
    assert warmed_up == pytest.approx([ratio * min(1, step / 100) for step, ratio in enumerate(ratios)])


@pytest.mark.parametrize("fields", [{"target": 1.0}, {"target": 0.5, "choices": (0.5, -0.1)}])
def test_ratios_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="0 <= prune_ratio < 1"):
        PruneSchedule(**fields).check()
    with pytest.raises(ValueError, match="`prune_warmup_steps` must be at least 0, got -1"):
        PruneSchedule(0.5, warmup_steps=-1).check()


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_each_group_has_the_schedule_of_transformers_with_its_own_warm_up(name):
    def optimizer(*groups):
        return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups])

    both = optimizer({"lr": 2.0, "group": "scorer"}, {"lr": 1.0, "group": "language_model"})
    scheduler = make_lr_scheduler(both, name, 20, {"scorer": 8, "language_model": 2})
    alone = [optimizer({"lr": 2.0}), optimizer({"lr": 1.0})]
    expected = [get_scheduler(name, one, warmup, 20) for one, warmup in zip(alone, (8, 2))]
    for _ in range(20):
        assert scheduler.get_last_lr() == [one.get_last_lr()[0] for one in expected]
        for one, its_scheduler in zip((both, *alone), (scheduler, *expected)):
            one.step()
            its_scheduler.step()


def test_a_schedule_that_is_no_function_of_the_step_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="reduce_lr_on_plateau"):
        make_lr_scheduler(optimizer, "reduce_lr_on_plateau", 20, {"scorer": 1})
