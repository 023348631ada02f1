"""What is true of A-SDM alone: its layers against loops over samples, its order against exhaustive removal."""

import copy
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from formulary.contracts import Data, edits
from formulary.errors import FormularyError, UsageError
from formulary.lab import inputs_for, tiny

from .blocks import order, outputs, runs, segments
from .method import ASDM, Dropped, ExpertConv2d, ExpertLinear


class Residual(nn.Module):
    def __init__(self, width: int, size: int = 3, mode: str = "zeros"):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = nn.Conv2d(width, width, size, padding=size // 2, padding_mode=mode)
        self.time = nn.Linear(3, width)
        self.out = nn.Conv2d(width, width, 1, bias=False)
        self.calls = 0

    def forward(self, x, code):
        self.calls += 1
        return x + self.out(F.silu(self.conv(self.norm(x)) + self.time(code)[..., None, None]))


class UNet(nn.Module):
    """Noised (B,1,8,8) and times (B,3) -> the noise; four blocks at full size, a stride, two at half."""

    def __init__(self, mode: str = "zeros"):
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 2, stride=2)
        self.high = nn.ModuleList(Residual(8, mode=mode) for _ in range(4))
        self.low = nn.ModuleList(Residual(4, mode=mode) for _ in range(2))
        self.up, self.head = nn.ConvTranspose2d(4, 8, 2, stride=2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x, code):
        x = self.stem(x)
        for block in self.high:
            x = block(x, code)
        y = self.down(x)
        for block in self.low:
            y = block(y, code)
        return self.head(torch.cat([x, self.up(y)], 1))


def unet(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(**settings).eval()


def noise(n: int = 8, seed: int = 1) -> Data:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(n, *shape, generator=generator)
    return Data([{"x": x, "code": code} for x, code in zip(draw(1, 8, 8), draw(3))], batch_size=4)


def deep_vit(layers: int = 4) -> ViTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 4}
    model = ViTModel(ViTConfig(num_hidden_layers=layers, initializer_range=0.1, **sizes), add_pooling_layer=False)
    return model.eval()


def images(model, n: int = 8) -> Data:
    return Data([{"pixel_values": x} for x in inputs_for(model, batch=n)["pixel_values"]], batch_size=4)


def filled(layer):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double().requires_grad_(False)


def by_hand(layer, x):
    """(weight, bias) of each sample, by loops over experts."""
    found = []
    for sample in x:
        pooled = sample.flatten(1).mean(1) if isinstance(layer, ExpertConv2d) else sample.flatten(0, -2).mean(0)
        logits = [float(row @ pooled + b) for row, b in zip(layer.route, layer.route_bias)]
        ratios = [1 / (1 + math.exp(-logit)) for logit in logits]
        bias = None if layer.biases is None else sum(r * b for r, b in zip(ratios, layer.biases))
        found.append((sum(r * w for r, w in zip(ratios, layer.weights)), bias))
    return found


@pytest.mark.parametrize("stride,padding,groups,bias", [(1, 1, 1, True), (2, 0, 2, False), (1, 2, 4, True)])
def test_a_convolution_of_experts_is_one_convolution_for_each_sample(stride, padding, groups, bias):
    more = {"stride": [stride, 1], "padding": [padding, 1], "dilation": [1, 2], "groups": groups, "bias": bias}
    layer, x = filled(ExpertConv2d(8, 12, [3, 2], experts=3, **more)), torch.randn(5, 8, 9, 7).double()
    rest = ((stride, 1), (padding, 1), (1, 2), groups)
    each = [F.conv2d(one[None], weight, bias, *rest) for one, (weight, bias) in zip(x, by_hand(layer, x))]
    torch.testing.assert_close(layer(x), torch.cat(each))


@pytest.mark.parametrize("shape,bias", [((3, 7, 6), True), ((3, 2, 5, 6), False), ((3, 6), True)])
def test_a_linear_of_experts_is_one_linear_for_each_sample(shape, bias):
    layer, x = filled(ExpertLinear(6, 4, experts=3, bias=bias)), torch.randn(shape).double()
    rows = x[:, None] if x.ndim == 2 else x
    each = [F.linear(one, weight, bias) for one, (weight, bias) in zip(rows, by_hand(layer, rows))]
    torch.testing.assert_close(layer(x), torch.stack(each).view(*shape[:-1], 4))


def test_with_one_expert_at_ratio_1_the_layers_are_plain_ones():
    conv, linear = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(5, 3)
    for plain, layer, x in (
        (conv, ExpertConv2d(4, 6, [3, 3], experts=1, padding=[1, 1], bias=True), torch.randn(2, 4, 5, 5)),
        (linear, ExpertLinear(5, 3, experts=1, bias=True), torch.randn(2, 7, 5)),
    ):
        with torch.no_grad():
            layer.weights[0], layer.biases[0] = plain.weight, plain.bias
            layer.route_bias.fill_(50.0)
        torch.testing.assert_close(layer(x), plain(x))
        assert torch.equal(layer.weight, plain.weight)


def without(model: ViTModel, gone: set[int]) -> ViTModel:
    """A model of fewer layers, built from its config."""
    kept = [i for i in range(len(model.layers)) if i not in gone]
    new, state = deep_vit(len(kept)), {k: v for k, v in model.state_dict().items() if not k.startswith("layers.")}
    for to, start in enumerate(kept):
        state |= {f"layers.{to}.{k}": v for k, v in model.layers[start].state_dict().items()}
    new.load_state_dict(state)
    return new


def errors(model, others, batches) -> list[float]:
    """The mean over batches of the relative squared error of each of `others`."""
    found = []
    with torch.no_grad():
        for other in others:
            each = []
            for batch in batches:
                wanted, got = (m(**batch).last_hidden_state.double() for m in (model, other))
                each.append(float((got - wanted).square().sum() / wanted.square().sum()))
            found.append(sum(each) / len(each))
    return found


def test_the_order_is_that_of_removing_each_block_from_models_built_without():
    model, data, gone, rows = deep_vit(5), images(deep_vit()), set(), []
    for _ in range(3):
        left = [i for i in range(5) if i not in gone]
        damage = errors(model, [without(model, gone | {i}) for i in left], list(data.batches()))
        rows.append((left[damage.index(min(damage))], min(damage)))
        gone.add(rows[-1][0])
    found = order(model, runs(model), {f"layers.{i}" for i in range(5)}, list(data.batches()), 3)
    assert [row["dropped"] for row in found] == [f"layers.{i}" for i, _ in rows]
    assert [row["output error"] for row in found] == pytest.approx([damage for _, damage in rows], rel=1e-3)
    _, report = ASDM(drop_rate=0.6, steps=0).apply(copy.deepcopy(model), data)
    assert report.tables["redundancy"] == found


def test_blocks_that_went_do_not_run_and_the_rest_is_the_model_built_without_them():
    model, data = deep_vit(), images(deep_vit())
    made, report = ASDM(drop_rate=0.5, steps=0, experts="none").apply(copy.deepcopy(model), data)
    gone = {int(row["dropped"].rpartition(".")[2]) for row in report.tables["redundancy"]}
    batch = next(data.batches())
    with torch.no_grad():
        expected = without(model, gone)(**batch).last_hidden_state
        torch.testing.assert_close(made(**batch).last_hidden_state, expected)
    assert {i for i, block in enumerate(made.layers) if isinstance(block, Dropped)} == gone
    small, report = ASDM(drop_rate=0.5, steps=0).apply(unet(), noise())
    for block in small.modules():
        block.calls = 0
    small(**next(noise().batches()))
    assert sum(isinstance(block, Residual) and block.calls for block in small.modules()) == 3


def test_untrained_heirs_are_a_plain_model_of_mixed_weights():
    model, data, start = deep_vit(3), images(deep_vit()), 0.7
    made, report = ASDM(drop_rate=0.6, steps=0, start=start).apply(copy.deepcopy(model), data)
    plain = without(model, {int(row["dropped"].rpartition(".")[2]) for row in report.tables["redundancy"]})
    heir = int(report.tables["stages"][0]["heir"].rpartition(".")[2])
    named = dict(plain.layers[0].named_modules())
    with torch.no_grad():
        for name, module in named.items():
            if isinstance(module, nn.Linear):
                each = [layer.get_submodule(name) for layer in model.layers]
                shares = [start if i == heir else 1 - start for i in range(3)]
                module.weight.copy_(sum(r * layer.weight for r, layer in zip(shares, each)))
                module.bias.copy_(sum(r * layer.bias for r, layer in zip(shares, each)))
        got, wanted = (m(**next(data.batches())).last_hidden_state for m in (made, plain))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert report.tables["stages"][0]["layers"] == 6


def test_random_experts_have_the_same_size_and_spread_and_other_values():
    found = {}
    for kind in ("inherited", "random"):
        found[kind], report = ASDM(steps=0, experts=kind).apply(deep_vit(), images(deep_vit()))
    own = [[m for m in model.modules() if isinstance(m, ExpertLinear)] for model in found.values()]
    assert len(own[0]) == len(own[1]) == 6
    for taken, drawn in zip(*own):
        assert torch.equal(taken.weights[0], drawn.weights[0]) and taken.weights.shape == drawn.weights.shape
        assert not torch.isclose(taken.weights[1], drawn.weights[1]).any(1).all()
        assert float((taken.weights[1].std() / drawn.weights[1].std()).detach()) == pytest.approx(1, abs=0.1)


def test_the_loss_is_the_papers_sum():
    teacher, model, data = deep_vit(), deep_vit(), images(deep_vit())
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch, method = next(data.batches()), ASDM(feature_weight=0.3)
    ends = ["layers.1", "layers.2", "layers.3"]
    for each in (model, teacher):
        each.requires_grad_(False)
    assert float(method.loss(teacher, teacher, ends, batch)) == 0
    with torch.no_grad():
        ours, theirs = (m(**batch, output_hidden_states=True) for m in (model, teacher))
    relative = lambda a, b: float(((a - b) ** 2).sum() / (b**2).sum())
    last = lambda m, seen: m.layers[3](seen.hidden_states[3])
    pairs = [(ours.hidden_states[i], theirs.hidden_states[i]) for i in (2, 3)]
    with torch.no_grad():
        pairs.append((last(model, ours), last(teacher, theirs)))
    expected = relative(ours.last_hidden_state, theirs.last_hidden_state)
    expected += 0.3 * sum(relative(*pair) for pair in pairs) / 3
    assert float(method.loss(model, teacher, ends, batch)) == pytest.approx(expected, rel=1e-4)


def test_distillation_comes_closer_on_new_inputs_and_trains_blocks_alone():
    teacher, far = unet(), {}
    for steps in (0, 40):
        model, report = ASDM(drop_rate=0.3, steps=steps, learning_rate=3e-3, calibration=4).apply(unet(), noise())
        with torch.no_grad():
            pairs = [(outputs(m, next(noise(seed=9).batches()))[0]) for m in (model, teacher)]
        far[steps] = float((pairs[0] - pairs[1]).square().mean())
    assert far[40] < 0.8 * far[0]
    outside = [name for name in teacher.state_dict() if not name.startswith(("high", "low"))]
    assert outside and all(torch.equal(model.state_dict()[name], teacher.state_dict()[name]) for name in outside)
    routes = [m.route for m in model.modules() if isinstance(m, ExpertConv2d | ExpertLinear)]
    assert routes and all(bool(route.abs().max() > 0) for route in routes)
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())


def test_while_heirs_incubate_the_other_blocks_are_the_teachers():
    teacher, data = deep_vit(5), images(deep_vit())
    for share, stay in ((1.0, True), (0.0, False)):
        model, report = ASDM(drop_rate=0.2, steps=4, incubation=share).apply(copy.deepcopy(teacher), data)
        row = report.tables["stages"][0]
        others = [i for i in range(5) if f"layers.{i}" not in (row["heir"], *row["dropped"])]
        same = [
            torch.equal(a, b)
            for i in others
            for a, b in zip(model.layers[i].parameters(), teacher.layers[i].parameters())
        ]
        assert len(others) == 3 and all(same) == stay
        assert (row["output error after"] != row["output error before"]) == stay


def test_a_plain_module_comes_back_from_its_edits_bit_for_bit():
    model, _ = ASDM(drop_rate=0.5, steps=3).apply(unet(), noise())
    again, batch = unet(), next(noise(seed=3).batches())
    edits.replay(again, edits.edits_of(model))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch), model(**batch))


def test_one_of_each_run_stays_and_only_chosen_blocks_go():
    model, report = ASDM(drop_rate=0.9, steps=0).apply(unet(), noise())
    assert [sum(not isinstance(b, Dropped) for b in stack) for stack in (model.high, model.low)] == [1, 1]
    assert "only 4 of 6 blocks left out" in report.headline and len(report.tables["stages"]) == 2
    _, report = ASDM(drop_rate=0.5, steps=0, targets=("high.*",), ignore=("high.0",)).apply(unet(), noise())
    assert {row["dropped"] for row in report.tables["redundancy"]} <= {"high.1", "high.2", "high.3"}
    assert len(report.tables["redundancy"]) == 2


def test_every_segment_ends_where_the_next_heir_begins():
    run = runs(deep_vit(5))[0]
    for kept in product((True, False), repeat=5):
        gone = {block.name for block, stays in zip(run, kept) if not stays}
        if not any(kept):
            continue
        found = segments(run, gone)
        assert [s.heir.name for s in found] == [block.name for block in run if block.name not in gone]
        assert {block.name for s in found for block in s.gone} == gone and found[-1].end == run[-1].name
        for one, following in zip(found, found[1:]):
            first = min(block.index for block in (following.heir, *following.gone))
            assert int(one.end.rpartition(".")[2]) == first - 1 == following.heir.index - 1


def test_what_cannot_go_is_skipped_or_refused_in_one_line():
    class Twice(UNet):
        def forward(self, x, code):
            return super().forward(x, code) + self.low[0](torch.ones_like(self.down(self.stem(x))), code).mean()

    torch.manual_seed(0)
    _, report = ASDM(drop_rate=0.2, steps=0).apply(Twice().eval(), noise())
    assert {skip.name for skip in report.skips} == {"low.0"} and "exactly once" in report.headline
    _, report = ASDM(drop_rate=0.2, steps=0).apply(unet(mode="circular"), noise())
    assert "inherited nothing: its padding is not one of zeros" in report.headline
    with pytest.raises(FormularyError, match="no neighboring blocks of equal shape"):
        ASDM().apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), noise())
    with pytest.raises(FormularyError, match="no neighboring blocks"):
        ASDM().apply(deep_vit(1), images(deep_vit()))
    with pytest.raises(FormularyError, match="needs data"):
        ASDM().apply(unet(), None)
    with pytest.raises(FormularyError, match="does not support an encoder"):
        ASDM().apply(tiny("bert"), noise())


def test_a_diverging_run_leaves_the_module_as_it_was():
    model = unet().half()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FormularyError, match="smaller learning_rate"):
        ASDM(steps=20, learning_rate=1e30).apply(model, noise())
    assert model.state_dict().keys() == state.keys() and edits.edits_of(model) == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrong", [{"drop_rate": 1.0}, {"start": 0.0}, {"steps": -1}, {"incubation": 1.5}, {"router_rate": 0.0}]
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"a-sdm: {next(iter(wrong))}"):
        ASDM(**wrong)
