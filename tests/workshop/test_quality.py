"""Intervals of quality: those of scipy; and what is read of a model."""

import numpy as np
import pytest
import torch
from scipy import stats

from formulary.contracts import Data
from formulary.workshop.quality import Quality, outputs


@pytest.mark.parametrize("count", [2, 5, 40])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(3.0, 0.5, count)
    wanted = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert Quality("loss", values, "lower").interval() == pytest.approx((values.mean(), *wanted))
    assert Quality("perplexity", values, "lower", show="exp").interval() == pytest.approx(np.exp((values.mean(), *wanted)))


def test_one_item_has_no_interval():
    mean, *ends = Quality("loss", np.array([2.0]), "lower").interval()
    assert mean == 2.0 and np.isnan(ends).all()


def test_a_map_of_states_is_read_position_by_position():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], patch_sizes=[7, 3],
        strides=[2, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, images = SegformerForSemanticSegmentation(config).eval(), torch.randn(3, 3, 16, 16)
    found = outputs(model, "vision", Data([{"pixel_values": image} for image in images], batch_size=2))
    with torch.no_grad():
        states = model.segformer(images).last_hidden_state
    assert found["vector"].shape == (3, 16) and found["tokens"].shape == (3, 16, 16)
    torch.testing.assert_close(found["vector"], states.mean((2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["tokens"][:, 5], states[:, :, 1, 1], atol=1e-5, rtol=1e-4)
