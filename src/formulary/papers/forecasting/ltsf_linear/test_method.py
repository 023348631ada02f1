import json

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.utils.estimator_checks import check_estimator

from formulary.errors import FormularyError, UsageError
from formulary.papers.forecasting._parts import seasonal_naive
from formulary.papers.forecasting.ltsf_linear import LTSFLinear, decompose, windows

VARIANTS = ("linear", "nlinear", "dlinear")


def series(steps: int = 400, channels: int = 1, trend: float = 0.02) -> np.ndarray:
    rng, t = np.random.default_rng(0), np.arange(steps)[:, None]
    waves = np.sin(2 * np.pi * t / 24 + rng.uniform(0, 6, channels)) + trend * t
    return (3 + np.arange(channels)) * waves + 0.3 * rng.normal(size=(steps, channels)) + 5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_scikit_learns_own_suite(variant, solver):
    results = check_estimator(LTSFLinear(variant=variant, solver=solver, epochs=2), on_fail=None, on_skip=None)
    assert len(results) > 40
    assert [r["check_name"] for r in results if r["status"] not in ("passed", "skipped")] == []
    assert sum(r["status"] == "skipped" for r in results) <= 6


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_the_exact_solution_is_scikit_learns(alpha):
    X, y = windows(series(), 30, 8)
    model = LTSFLinear(variant="linear", solver="exact", alpha=alpha).fit(X, y)
    z = lambda values: (values - X.mean()) / X.std()
    reference = (Ridge(alpha) if alpha else LinearRegression()).fit(z(X), z(y))
    np.testing.assert_allclose(model.predict(X), reference.predict(z(X)) * X.std() + X.mean(), atol=1e-8)
    np.testing.assert_allclose(model.coef_[0], reference.coef_, atol=1e-7)


@pytest.mark.parametrize("individual", [False, True])
def test_channels_share_one_map_or_have_their_own(individual):
    X, y = windows(series(channels=3), 20, 5)
    model = LTSFLinear(variant="linear", solver="exact", channels=3, individual=individual).fit(X, y)
    histories, futures = X.reshape(len(X), 20, 3), y.reshape(len(y), 5, 3)
    mean, scale = histories.mean((0, 1)), histories.std((0, 1))
    x, z = (histories - mean) / scale, (futures - mean) / scale
    shared = Ridge(1.0).fit(x.swapaxes(1, 2).reshape(-1, 20), z.swapaxes(1, 2).reshape(-1, 5))
    predicted = model.predict(X).reshape(len(X), 5, 3)
    for c in range(3):
        reference = Ridge(1.0).fit(x[:, :, c], z[:, :, c]) if individual else shared
        np.testing.assert_allclose(predicted[:, :, c], reference.predict(x[:, :, c]) * scale[c] + mean[c], atol=1e-8)
    assert model.coef_.shape == (3 if individual else 1, 5, 20)


def test_dlinear_is_ridge_on_season_and_trend():
    X, y = windows(series(), 40, 6)
    model = LTSFLinear(variant="dlinear", solver="exact", alpha=2.0).fit(X, y)
    z = (X - X.mean()) / X.std()
    features = np.concatenate(decompose(z, 25), axis=1)
    reference = Ridge(2.0).fit(features, (y - X.mean()) / X.std())
    np.testing.assert_allclose(model.predict(X), reference.predict(features) * X.std() + X.mean(), atol=1e-8)


def test_nlinear_is_ridge_on_what_differs_from_the_last_value():
    X, y = windows(series(), 40, 6)
    model = LTSFLinear(variant="nlinear", solver="exact", alpha=2.0).fit(X, y)
    last = X[:, -1:]
    reference = Ridge(2.0).fit((X - last) / X.std(), (y - last) / X.std())
    np.testing.assert_allclose(model.predict(X), reference.predict((X - last) / X.std()) * X.std() + last, atol=1e-8)


@pytest.mark.parametrize(("length", "kernel"), [(60, 25), (10, 25), (7, 1), (1, 5)])
def test_decomposition_against_numpys_convolution(length, kernel):
    x = np.random.default_rng(0).normal(size=(3, length))
    season, trend = decompose(x, kernel)
    for row, expected in zip(trend, x):
        padded = np.pad(expected, kernel // 2, mode="edge")
        np.testing.assert_allclose(row, np.convolve(padded, np.ones(kernel) / kernel, mode="valid"), atol=1e-12)
    np.testing.assert_allclose(season + trend, x)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_nlinear_moves_with_the_level_and_the_others_do_not(solver):
    X, y = windows(series(trend=0.0), 30, 8)
    predict = {v: LTSFLinear(variant=v, solver=solver, epochs=2).fit(X, y).predict for v in VARIANTS}
    np.testing.assert_allclose(predict["nlinear"](X + 100), predict["nlinear"](X) + 100, atol=1e-9)
    for variant in ("linear", "dlinear"):
        assert np.abs(predict[variant](X + 100) - predict[variant](X) - 100).max() > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_penalty_the_variants_fit_the_same_maps(variant):
    t = np.arange(500.0)
    model = LTSFLinear(variant=variant, lookback=40, horizon=12, solver="exact", alpha=0.0).fit_series(
        np.sin(t / 3) + 0.1 * t
    )
    future = np.arange(500.0, 512.0)
    np.testing.assert_allclose(model.forecast(np.sin(t / 3) + 0.1 * t), np.sin(future / 3) + 0.1 * future, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("individual", [False, True])
def test_adam_comes_near_the_exact_solution_and_repeats_itself(variant, individual):
    X, y = windows(series(600, channels=2), 36, 6)
    settings = {"variant": variant, "channels": 2, "individual": individual}
    adam = LTSFLinear(**settings, epochs=20, learning_rate=0.01).fit(X, y)
    exact = LTSFLinear(**settings, solver="exact").fit(X, y)
    error, best = (float(np.mean((model.predict(X) - y) ** 2)) for model in (adam, exact))
    assert best < error < 1.5 * best
    assert error < 0.3 * np.mean((seasonal_naive(X, 6, 1, 2) - y) ** 2)
    again = LTSFLinear(**settings, epochs=20, learning_rate=0.01).fit(X, y)
    assert np.array_equal(again.coef_, adam.coef_) and again.n_iter_ == adam.n_iter_


def test_early_stopping_keeps_the_best_epoch():
    X, y = windows(series(), 30, 8)
    y[-45:] += 50 * np.random.default_rng(0).normal(size=y[-45:].shape)
    model = LTSFLinear(epochs=30, patience=2, learning_rate=0.05).fit(X, y)
    assert model.n_iter_ < 30
    one = LTSFLinear(epochs=model.n_iter_ - 2, patience=2, learning_rate=0.05).fit(X, y)
    assert np.array_equal(one.coef_, model.coef_)


def test_windows_are_time_major():
    values = np.arange(24.0).reshape(8, 3)
    X, y = windows(values, 4, 2, stride=2)
    assert X.shape == (2, 12) and y.shape == (2, 6)
    np.testing.assert_array_equal(X[1].reshape(4, 3), values[2:6])
    np.testing.assert_array_equal(y[1].reshape(2, 3), values[6:8])


def test_forecasts_beyond_the_horizon_feed_on_themselves():
    values = series(300, channels=2)
    model = LTSFLinear(lookback=48, horizon=10, solver="exact").fit_series(values)
    long = model.forecast(values, steps=25)
    assert long.shape == (25, 2)
    np.testing.assert_allclose(long[:10], model.forecast(values))
    np.testing.assert_allclose(long[10:20], model.forecast(np.concatenate([values, long[:10]])))
    assert LTSFLinear(lookback=48, horizon=10, solver="exact").fit_series(values[:, 0]).forecast(
        values[:, 0], 3
    ).shape == (3,)


def test_a_constant_channel_stays_constant():
    values = np.column_stack([series(200)[:, 0], np.full(200, 7.0)])
    for variant in VARIANTS:
        found = (
            LTSFLinear(variant=variant, lookback=24, horizon=6, solver="exact", individual=True)
            .fit_series(values)
            .forecast(values)
        )
        np.testing.assert_allclose(found[:, 1], 7.0, atol=1e-6)


@pytest.mark.parametrize("solver", ["adam", "exact"])
def test_save_and_load_predict_the_same_bits(tmp_path, solver):
    X, y = windows(series(120), 12, 4)
    model = LTSFLinear(solver=solver, epochs=2).fit(X, y)
    expected = model.predict(X)
    model.feature_names_in_ = np.array([f"t-{i}" for i in range(12, 0, -1)], dtype=object)
    model.save(tmp_path / "out")
    again = LTSFLinear.load(tmp_path / "out")
    assert again.get_params() == model.get_params()
    assert again.feature_names_in_.dtype == object and list(again.feature_names_in_) == list(model.feature_names_in_)
    del again.feature_names_in_
    assert np.array_equal(again.predict(X), expected)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["arrays.safetensors", "estimator.json"]


def test_malformed_files_get_one_line(tmp_path):
    model = LTSFLinear(solver="exact").fit(*windows(series(120), 12, 4))
    with pytest.raises(FormularyError, match="not fitted"):
        LTSFLinear().save(tmp_path / "unfitted")
    model.save(tmp_path)
    good, arrays = json.loads((tmp_path / "estimator.json").read_text()), (tmp_path / "arrays.safetensors").read_bytes()
    broken = [
        ({**good, "method": "gptq"}, arrays, "saved by gptq"),
        ({**good, "parameters": {"variantt": "linear"}}, arrays, "no parameter 'variantt'; did you mean 'variant'"),
        ({**good, "fitted": {**good["fitted"], "horizon_": 5}}, arrays, "do not fit each other"),
        ({**good, "fitted": {**good["fitted"], "predict": 5}}, arrays, "no fitted attribute"),
        ({"method": "ltsf-linear"}, arrays, "it has no 'class'"),
        ([], arrays, "no object"),
        (good, arrays[:-8], "arrays.safetensors is damaged"),
    ]
    for record, content, message in broken:
        (tmp_path / "estimator.json").write_text(json.dumps(record))
        (tmp_path / "arrays.safetensors").write_bytes(content)
        with pytest.raises(FormularyError, match=message) as caught:
            LTSFLinear.load(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(FormularyError, match="is not a saved ltsf-linear estimator"):
        LTSFLinear.load(tmp_path / "nowhere")


def test_one_line_errors():
    X, y = windows(series(100), 12, 4)
    with pytest.raises(UsageError, match="did you mean 'dlinear'"):
        LTSFLinear(variant="dliner").fit(X, y)
    with pytest.raises(UsageError, match="epochs must be a whole number of 1 or more, got 2.5"):
        LTSFLinear(epochs=2.5).fit(X, y)
    with pytest.raises(UsageError, match="kernel must be odd"):
        LTSFLinear(kernel=24).fit(X, y)
    with pytest.raises(UsageError, match="no parameter 'look_back'; did you mean 'lookback'"):
        LTSFLinear.build(look_back=3)
    with pytest.raises(ValueError, match="must divide by the number of channels"):
        LTSFLinear(channels=5).fit(X, y)
    with pytest.raises(FormularyError, match="fewer than one window of 336"):
        LTSFLinear().fit_series(series(100))
    with pytest.raises(FormularyError, match="lacks values in 1 of 100 steps, first in step 3"):
        windows(np.where(np.arange(100) == 3, np.nan, 1.0), 4, 2)
    with pytest.raises(FormularyError, match="not numeric"):
        windows(["a", "b"], 1, 1)
    fitted = LTSFLinear(lookback=12, horizon=4, solver="exact").fit_series(series(100))
    with pytest.raises(FormularyError, match="needs the last 12"):
        fitted.forecast(series(5))
    with pytest.raises(FormularyError, match="fitted on 1 channel"):
        fitted.forecast(series(50, channels=2))
