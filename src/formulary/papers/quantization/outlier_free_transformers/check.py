"""Nine tokens in ten must stay as they are, one in ten becomes the marked one: how do logits grow, what does int8 cost?

Version 2. Version 1 did not hold, and its code is lost. It had initial weights with which clipped attention, at the
paper's gamma, was dead from the start (0.27 nats more loss than plain attention, where 0.02 were allowed, and no int8
outcome, since an empty range was divided by); gated attention had 1.07 times plain attention's largest logit and 4.2
times its int8 error. The ratios asked for are the same. New are: tokens that are vectors, so that "as they are" is a
mean squared error, to which int8 always adds (a pilot's plain models of symbols lost nothing by it), with "equal" loss
as 0.0005 of a token's variance, about plain attention's own; initial weights of deviation 1/sqrt(width), whose logits
differ by about 1, so that 93 % of rows have a weight that is not clipped before training; and alpha = 3.2, that of the
paper's BERT, over the sequence length. Task, learning rate and steps were chosen on plain attention alone, on seeds from
1000 on.

W8A8 after training: weights of all linears in the blocks symmetric, inputs and outputs of all linears and LayerNorms
asymmetric, one range a tensor, from the smallest to the largest value over 16 calibration batches. Attention weights
and gates stay in float.
"""

import copy
from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertModel

from formulary import lab
from formulary.contracts import Report, parts
from formulary.contracts.edits import editing
from formulary.evidence import Check, Outcome, all_of, at_most, no_worse
from formulary.papers.quantization._parts import Grid, on_grid

from .method import ClippedSoftmax, GatedAttention

LENGTH, CHANNELS, WIDTH, HEADS, LAYERS = 64, 16, 64, 2, 2
STEPS, BATCH, RATE, TEST, COPIES = 1000, 8, 8e-3, 64, 6
LOGIT, LOSS, INT8 = "largest |logit|", "mean squared error, of a token's variance", "mean squared error added by int8"


class NoOp:
    """Unit-variance vectors, two more channels that say which one is marked and which are to become it."""

    def batch(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        tokens = torch.randn(n, LENGTH, CHANNELS, generator=generator)
        tokens = tokens / tokens.norm(dim=-1, keepdim=True) * CHANNELS**0.5
        order = torch.rand(n, LENGTH, generator=generator).argsort(1)
        chosen = order[:, :1], order[:, 1 : 1 + COPIES]
        marked, copies = (torch.zeros(n, LENGTH).scatter_(1, at, 1.0) for at in chosen)
        found = torch.einsum("blc,bl->bc", tokens, marked)[:, None]
        inputs = torch.cat([tokens * (1 - copies)[..., None], marked[..., None], copies[..., None]], -1)
        return {"inputs": inputs, "targets": torch.where(copies[..., None] > 0, found, tokens)}


class Regressor(nn.Module):
    """BERT's blocks between two linear maps."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, initializer_range=WIDTH**-0.5,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.embed, self.bert = nn.Linear(CHANNELS + 2, WIDTH), BertModel(config, add_pooling_layer=False)
        self.read = nn.Linear(WIDTH, CHANNELS)

    def forward(self, inputs):
        return self.read(self.bert(inputs_embeds=self.embed(inputs)).last_hidden_state)

    def errors(self, batch):
        """(N,) mean squared error of each sequence."""
        return (self(batch["inputs"]) - batch["targets"]).square().mean((1, 2))


def model_of(arm: str) -> Regressor:
    model = Regressor()
    with editing(model.bert, "outlier-free-transformers") as edit:
        if arm == "gated":
            GatedAttention.swap(model.bert, edit, Report("", {}, 1), fine_tuning=False)
        for part in parts.mixers(model.bert) if arm == "clipped" else ():
            edit.edit(part.name, ClippedSoftmax, length=LENGTH)
    return model


def largest_logits(model: Regressor, inputs) -> torch.Tensor:
    """(N,) the largest |q k' / sqrt(K)| of each sequence over layers, heads and pairs."""
    seen, handles = {"query": [], "key": []}, []
    for name, module in model.named_modules():
        role = {"query": "query", "q_proj": "query", "key": "key", "k_proj": "key"}.get(name.rpartition(".")[2])
        if role:
            handles.append(module.register_forward_hook(lambda m, args, out, role=role: seen[role].append(out)))
    model(inputs)
    for handle in handles:
        handle.remove()
    heads = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    pairs = zip(seen["query"], seen["key"], strict=True)
    largest = torch.stack([(heads(q) @ heads(k).mT).abs().amax((1, 2, 3)) for q, k in pairs]).amax(0)
    return largest * (WIDTH // HEADS) ** -0.5


def in_int8(model: Regressor, calibration) -> Regressor:
    """A copy whose weights and activations are on eight-bit grids."""
    model, ranges = copy.deepcopy(model), {}
    modules = [m for m in model.bert.encoder.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]

    def see(module, args, out):
        for place, x in enumerate((args[0], out)):
            low, high = ranges.get((module, place), (0.0, 0.0))
            ranges[module, place] = min(low, float(x.min())), max(high, float(x.max()))

    handles = [module.register_forward_hook(see) for module in modules]
    for batch in calibration:
        model(batch["inputs"])
    for handle in handles:
        handle.remove()
    grids = {at: Grid(8).fit(torch.tensor([seen]), torch.float32) for at, seen in ranges.items()}
    for module in modules:
        if isinstance(module, nn.Linear):
            scale, zero = Grid(8, symmetric=True).fit(module.weight.reshape(1, -1), torch.float32)
            module.weight.copy_(on_grid(module.weight, scale, zero, 8))
        module.register_forward_pre_hook(lambda m, args: (on_grid(args[0], *grids[m, 0], 8), *args[1:]))
        module.register_forward_hook(lambda m, args, out: on_grid(out, *grids[m, 1], 8))
    return model


def arm(name: str, seed: int) -> Outcome:
    task = NoOp()
    torch.manual_seed(seed)
    model = model_of(name)
    stream = lab.tasks.stream(task, BATCH, seed=seed)
    loss = lambda model, batch: model.errors(batch).mean()
    lab.train(model, stream, steps=STEPS, lr=RATE, weight_decay=0.01, seed=seed, loss=loss)
    model.eval()
    test = task.batch(TEST, torch.Generator().manual_seed(2**31 + seed))
    with torch.no_grad():
        exact, logits = model.errors(test), largest_logits(model, test["inputs"])
        small = in_int8(model, [stream(STEPS + i) for i in range(16)])
        values = {LOGIT: logits, LOSS: exact, INT8: small.errors(test) - exact}
    return Outcome({metric: v.tolist() for metric, v in values.items()}, budget={"parameters": parts.count_weights(model)})


def helps(name: str) -> list:
    return [
        no_worse(name, "plain", margin=5e-4, metric=LOSS),
        at_most(name, "plain", ratio=0.5, metric=LOGIT),
        at_most(name, "plain", ratio=0.5, metric=INT8),
    ]


check = Check(
    claim="On a task that needs a no-op, attention with clipped softmax and attention with gates each train to plain "
    "attention's loss (0.0005 of a token's variance more at most) with at most half its largest attention logit and half "
    "the error that int8 adds.",
    setup=lambda seed: seed,
    arms={name: partial(arm, name) for name in ("clipped", "gated", "plain")},
    holds=all_of(*helps("clipped"), *helps("gated")),
    items="fresh",
    redraws="initial weights, training and test sequences",
    seeds=5,
    version=2,
    scope="two post-norm blocks of width 64 trained for 1000 steps on planted sequences of 64",
)
