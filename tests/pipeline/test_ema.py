"""The averaged generator."""

import torch
from torch import nn

from pipeline.ema import ExponentialMovingAverage

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def test_the_average_follows_with_the_given_decay_once_it_is_long():
    live = nn.Linear(1, 1, bias=False)
    nn.init.constant_(live.weight, 0.0)
    average = ExponentialMovingAverage(live, decay=0.9, updates=1000)
    nn.init.constant_(live.weight, 1.0)
    for expected in (0.1, 0.19, 0.271):
        average.update(GOOD)
        torch.testing.assert_close(average.weights()["weight"], torch.tensor([[expected]]))


def test_the_average_of_a_young_run_forgets_the_initial_weights():
    live = nn.Linear(1, 1, bias=False)
    nn.init.constant_(live.weight, 0.0)
    average = ExponentialMovingAverage(live, decay=0.999)
    nn.init.constant_(live.weight, 1.0)
    for _ in range(50):
        average.update(GOOD)
    assert average.weights()["weight"].item() > 0.99


def test_a_bad_step_leaves_the_average_and_counts_as_an_update():
    live = nn.Linear(3, 3)
    skipping = ExponentialMovingAverage(live, decay=0.999)
    before = skipping.weights()["weight"].clone()
    resumed = ExponentialMovingAverage(live, decay=0.999, updates=1)
    nn.init.constant_(live.weight, 1.0)
    skipping.update(BAD)
    assert torch.equal(skipping.weights()["weight"], before)
    for average in (skipping, resumed):
        average.update(GOOD)
    assert torch.equal(skipping.weights()["weight"], resumed.weights()["weight"])


def test_the_average_takes_no_gradient_and_leaves_the_live_weights_alone():
    live = nn.Linear(2, 2)
    before = live.weight.detach().clone()
    average = ExponentialMovingAverage(live, decay=0.5)
    average.update(GOOD)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    torch.testing.assert_close(live.weight, before)


def test_the_average_takes_the_layout_that_an_engine_gives_the_weights():
    live = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = ExponentialMovingAverage(live, decay=0.9, updates=1000)
    before = average.weights()["weight"].clone()
    live.to(memory_format=torch.contiguous_format)
    average.match_layout()
    assert average.weights()["weight"].stride() == live.weight.stride()
    assert torch.equal(average.weights()["weight"], before)
    nn.init.constant_(live.weight, 1.0)
    average.update(GOOD)
    torch.testing.assert_close(average.weights()["weight"], before.lerp(torch.ones(()), 0.1))
