"""PDLSFTTrainer: training that is resumed is as in one go, and the mixin serves trainers of a user's own."""

import pytest
import torch
from helpers.trainer_models import Gradients, relative_error
from helpers.trl_token_weights import MANY, of_sequences, sequences, token_rows
from helpers.trl_trainers import W, make_trainer, train, training_marks
from helpers.trl_training import trl

from pdl_kernels.integrations.trl import PDLSFTMixin

pytestmark = training_marks


@pytest.mark.parametrize("token_weights", [None, "u"])
def test_resuming_is_as_one_go(token_weights, tmp_path):
    rows = token_rows("examples")
    pdl = {"token_weights": token_weights}
    options = {"learning_rate": 1e-2, "max_steps": 4, "gradient_accumulation_steps": 1, "save_steps": 2}
    options["save_strategy"] = "steps"
    through, steps = train(tmp_path, rows, pdl=pdl, **options)
    assert len(steps) == 4
    folder = tmp_path / "checkpoint-2"
    saved = {"weights": folder} | pdl
    gradients = Gradients()
    resumed = make_trainer(tmp_path, rows, pdl=saved, more={"callbacks": [gradients]}, **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert len(gradients.steps) == 2
    for found, expected in zip(gradients.steps, steps[2:], strict=True):
        assert relative_error(found, expected) < 1e-6
    for found, expected in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)
    other = make_trainer(tmp_path, rows, pdl={"weights": 2 * W}, **options)
    with pytest.raises(ValueError, match="training goes on at step 2 with other weights than"):
        other.train(resume_from_checkpoint=str(folder))


class Mine(trl.SFTTrainer):
    """A trainer of a user's own."""

    def __init__(self, *arguments, name, **named):
        super().__init__(*arguments, **named)
        self.name = name
        self.calls = 0

    def compute_loss(self, *arguments, **named):
        self.calls += 1
        return super().compute_loss(*arguments, **named)


class PDLMine(PDLSFTMixin, Mine):
    pass


def test_a_trainer_of_ones_own(tmp_path):
    rows = token_rows()
    trainer, (found,) = train(tmp_path, rows, PDLMine, pdl={"token_weights": "u"}, more={"name": "mine"}, **MANY)
    assert (trainer.name, trainer.calls) == ("mine", 4)
    assert relative_error(found, of_sequences(trainer.model, sequences(rows))) < 1e-5
    assert trainer.pdl_callback.loss is trainer.pdl_loss
