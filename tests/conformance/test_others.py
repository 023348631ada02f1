"""What holds for every recipe, probe, model, estimator and study."""


import pytest
import torch

from formulary.lab import small, train
from tests.conformance import rooms


def params(contract):
    found = rooms.implementing(contract)
    return pytest.mark.parametrize("slug,cls", found, ids=[f"{slug}-{cls.__name__}" for slug, cls in found])


# ---------------------------------------------------------------- recipes


def lm_batch(step):
    return small.inputs_for(small.tiny("gpt2"), labels=True, seed=step)


@params("recipe")
def test_a_recipe_names_what_it_changes_and_lowers_the_loss_on_a_fixed_batch(slug, cls):
    assert cls.hooks()
    model, recipe = small.tiny("gpt2"), cls(**rooms.quick(cls))
    log = train(model, lambda step: lm_batch(0), steps=12, lr=3e-3, recipe=recipe, schedule="constant")
    assert log.losses[-1] < log.losses[0]


@params("recipe")
def test_a_recipe_resumes_bit_identically(slug, cls, tmp_path):
    recipe, run = cls(**rooms.quick(cls)), dict(steps=6, lr=1e-3)
    straight, broken = small.tiny("gpt2"), small.tiny("gpt2")
    train(straight, lm_batch, recipe=recipe, **run)

    def stop(step, steps, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, lm_batch, recipe=recipe, checkpoint=tmp_path, every=1, progress=stop, **run)
    fresh = small.tiny("gpt2", seed=9)
    train(fresh, lm_batch, recipe=recipe, checkpoint=tmp_path, every=1, **run)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), fresh.parameters()))


# ---------------------------------------------------------------- probes


@params("probe")
def test_a_probe_leaves_the_model_as_it_was_and_is_deterministic(slug, cls):
    family = next(f for f, kind in rooms.KIND.items() if kind in cls.supports)
    model = rooms.tiny(family)
    batch, data = small.inputs_for(model), rooms.data_for(model, n=64, labels=False, length=48)
    before, state = rooms.main(model, batch), rooms.state(model)
    probe = cls(**rooms.quick(cls))
    one, two = probe.run(model, data), probe.run(model, data)
    assert torch.equal(rooms.main(model, batch), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert one.as_dict() == two.as_dict() and one.tables


# ---------------------------------------------------------------- models


def example_batch(cls, model, n=6):
    torch.manual_seed(0)
    if cls.accepts == "images":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "channels", getattr(model.config, "in_channels", 3))
        classes = getattr(model.config, "classes", getattr(model.config, "num_classes", 2))
        return {"pixel_values": torch.randn(n, channels, height, width), "labels": torch.arange(n) % classes}
    if cls.accepts == "pairs":
        return {"x0": torch.randn(n, model.config.dim), "x1": torch.randn(n, model.config.dim) + 1}
    raise AssertionError(f"no example batch for {cls.accepts}")


@params("model")
def test_a_model_overfits_one_batch_is_seeded_and_comes_back(slug, cls, tmp_path):
    torch.manual_seed(0)
    model = cls.build(**rooms.quick(cls))
    torch.manual_seed(0)
    again = cls.build(**rooms.quick(cls))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    batch = example_batch(cls, model)
    log = train(model, lambda step: batch, steps=60, lr=3e-3, loss=lambda m, b: m.loss(b), schedule="constant")
    assert log.final < log.losses[0]
    model.eval()
    model.save(tmp_path)
    loaded = cls.load(tmp_path)
    inputs = batch["x0" if "x0" in batch else "pixel_values"]
    torch.manual_seed(1)
    expected = model.predict(inputs)
    torch.manual_seed(1)
    assert torch.equal(loaded.predict(inputs), expected)


# ---------------------------------------------------------------- estimators


@params("estimator")
def test_an_estimator_passes_scikit_learns_own_suite(slug, cls):
    from sklearn.utils.estimator_checks import check_estimator

    results = check_estimator(cls(**rooms.quick(cls)), on_fail=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 30


# ---------------------------------------------------------------- studies


@params("study")
def test_a_study_lists_its_functions_and_draws_its_figure(slug, cls, tmp_path):
    from formulary.workshop import html

    study = cls(**rooms.quick(cls))
    rows = study.listing()
    assert rows and all(row["does"] for row in rows)
    report = study.run()
    assert report.figures
    for name, spec in report.figures.items():
        html.draw(spec, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 1000
