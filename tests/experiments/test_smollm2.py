"""What the experiments on SmolLM2 compute themselves: which directions a repair takes, what is
compared at one loss."""

from __future__ import annotations

import pytest
import torch
from demo import pronounce

import veneer
from experiments import forgetting, phonemes, repair, smollm2
from veneer.adapter_files.folder import read
from veneer.tools.compose.frozen_weights import FrozenWeights
from veneer.tools.intruders import find_intruders


@pytest.fixture
def adapter(tmp_path):
    """A model with a change that is large enough for intruders, and the folder of it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 24))
    handle = veneer.attach(model, veneer.LoraConfig(rank=3, targets="all"))
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter.data)
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    return model, folder


def test_directions_below_a_threshold_are_those_of_a_search_with_it(adapter):
    model, folder = adapter
    wanted = [*find_intruders(read(folder), FrozenWeights(model), threshold=0.7)]
    chosen = [repair._below(one, 0.7) for one in repair._intruders(folder, model)]
    assert sum(one.count for one in wanted) > 0
    for one, own in zip(wanted, chosen, strict=True):
        assert own.count == one.count
        torch.testing.assert_close(own.intruders[0].U, one.intruders[0].U)


def test_the_control_takes_as_much_in_other_directions(adapter):
    model, folder = adapter
    for one in repair._intruders(folder, model):
        other = repair._random(one, 0)
        torch.testing.assert_close(other.intruders[0].S, one.intruders[0].S)
        eye = torch.eye(other.count, dtype=torch.float64)
        torch.testing.assert_close(other.intruders[0].U.mT @ other.intruders[0].U, eye)
        assert (other.intruders[0].U * one.intruders[0].U).sum(0).abs().max() < 0.9


def test_forgetting_is_compared_at_the_same_loss_of_the_task():
    def run(method, *points):
        return {"method": method, "rate": 1e-3, "points": [(0, 8.0, 3.0), *points]}

    runs = [
        run("lora", (1, 2.0, 3.2), (2, 1.0, 3.4)),
        run("full", (1, 2.0, 3.1), (2, 1.5, 3.7), (3, 0.5, 4.0)),
    ]
    met = forgetting._compared(runs)
    assert [task for task, *_ in met] == [2.0, 1.5, 1.0]
    assert [lora for _, lora, _ in met] == pytest.approx([0.2, 0.3, 0.4])
    assert [full for *_, full in met] == pytest.approx([0.1, 0.7, 0.85])
    assert forgetting.claims(runs)[0].held is False  # at 2.0 the full one forgot less


def test_words_that_choose_a_recipe_do_not_judge_it_nor_train():
    learnt, choosing, judging = smollm2.words({"smoke": True})
    spelt = [{word.spelling for word in own} for own in (learnt, choosing, judging)]
    assert not spelt[0] & spelt[1]
    assert not spelt[0] & spelt[2]
    assert not spelt[1] & spelt[2]


def test_words_that_are_aside_are_no_others():
    learnt, held = pronounce.words()
    aside = pronounce.listed(*phonemes.ASIDE)
    assert len({word.spelling for word in [*learnt, *held, *aside]}) == 20_000 + 1_000 + 1_000


def test_an_adapter_is_kept_under_its_whole_recipe():
    one = {"seed": 0, "recipe": {"rank": 8, "learning_rate": 4e-3}}
    same = {"recipe": {"learning_rate": 4e-3, "rank": 8}, "seed": 0, "smoke": False}
    others = ({**one, "seed": 1}, {"seed": 0, "recipe": {**one["recipe"], "learning_rate": 3e-3}})
    assert phonemes.kept_at(same) == phonemes.kept_at(one)
    assert len({phonemes.kept_at(cell) for cell in (one, *others)}) == 3


def test_a_reward_of_full_size_reads_the_last_number():
    from experiments.full.rewards import last_number

    written = [
        "So 3 + 4 = 7.",
        [{"role": "assistant", "content": "It is 1,234"}],
        "nothing",
        "7 or 8",
    ]
    right = ["… #### 7", "#### 1234", "#### 7", "#### 7"]
    assert last_number(written, answer=right) == [1.0, 1.0, 0.0, 0.0]
