"""A feed-forward cut into blocks of neurons, of which a router picks a few for each token, with LoRA on its linears."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from formulary.errors import FormularyError

GATED, PLAIN = ("gate_proj", "up_proj", "down_proj", "act_fn"), (None, "c_fc", "c_proj", "act")


def layout(module: nn.Module) -> tuple | None:
    """The names of gate (or None), up and down projection and of the activation in a module that is known, else None."""
    return next((names for names in (GATED, PLAIN) if all(hasattr(module, n) for n in names if n)), None)


def weight_of(linear: nn.Module) -> Float[Tensor, "out in"]:
    return linear.weight.mT if isinstance(linear, Conv1D) else linear.weight


def project(linear: nn.Module, x: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """What `rows` of a linear's outputs get from `columns` of its inputs, bias left out, LoRA (while training) added."""
    out = F.linear(x, weight_of(linear)[rows, columns])
    lora = linear.__dict__.get("_lora")
    if lora is None:
        return out
    down, up = (factor.to(x.dtype) for factor in lora)
    return out + F.linear(F.linear(x, down[:, columns]), up[rows])


def bias_of(linear: nn.Module, rows: slice = slice(None)) -> Tensor | float:
    return 0.0 if getattr(linear, "bias", None) is None else linear.bias[rows]


class RoutedFeedForward:
    """Tells a feed-forward module to compute only `active` of its `blocks` blocks of neurons, chosen for each token.

    y = sum over the chosen g of 2 sigmoid(r_g(x)) W2_g act(W1_g x), with r a linear router that the module gets.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str, blocks: int, active: int) -> nn.Module:
        """Swap the module's class and give it a router; raises FormularyError where its parts are not known."""
        module = model.get_submodule(name)
        names = layout(module)
        if names is None or isinstance(module, Routed):
            raise FormularyError(f"spt cannot route {name} ({type(module).__name__}): its linears are not known")
        own = type(module)
        module.__class__ = type(f"Routed{own.__name__}", (Routed, own), {"__module__": __name__})
        weight = weight_of(getattr(module, names[1]))
        module.router = nn.Linear(weight.shape[1], blocks)
        module.blocks, module.active = blocks, active
        return module


class Routed:
    """The forward pass of a routed feed-forward; `watch`, where it is a list, gets the router's probabilities."""

    watch: list | None = None

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        tokens = x.reshape(-1, x.shape[-1])
        probability = torch.sigmoid(self.router(tokens))
        chosen = probability.topk(self.active, -1).indices
        if self.watch is not None:
            self.watch.append((probability, chosen))
        out = torch.zeros_like(tokens)
        for block in range(self.blocks):
            rows = (chosen == block).any(-1).nonzero().squeeze(1)
            gate = 2 * probability[rows, block, None]
            out = out.index_add(0, rows, (gate * self.block(tokens[rows], block)).to(out.dtype))
        down = getattr(self, layout(self)[2])
        return (out + bias_of(down)).view(x.shape)

    def block(self, tokens: Float[Tensor, "N D"], block: int) -> Float[Tensor, "N D"]:
        """What one block of neurons adds, ungated."""
        gate, up, down, act = (None if name is None else getattr(self, name) for name in layout(self))
        width = weight_of(down).shape[1] // self.blocks
        rows = slice(block * width, (block + 1) * width)
        hidden = project(up, tokens, rows) + bias_of(up, rows)
        hidden = act(hidden) if gate is None else act(project(gate, tokens, rows) + bias_of(gate, rows)) * hidden
        return project(down, hidden, columns=rows)

    @torch.no_grad()
    def calibrate(self, tokens: Float[Tensor, "N D"]) -> None:
        """Fit the router by ridge regression to the norm of what each block adds, with gates near 1."""
        norms = torch.stack([self.block(tokens, block).float().norm(dim=-1) for block in range(self.blocks)], 1)
        wanted = 0.1 * (norms - norms.mean()) / norms.std().clamp_min(1e-12)
        x = tokens.double()
        center, wanted_center = x.mean(0), wanted.double().mean(0)
        x, y = x - center, wanted.double() - wanted_center
        gram = x.mT @ x
        ridge = 1e-2 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
        weight = torch.linalg.solve(gram + ridge, x.mT @ y).mT
        self.router.weight.copy_(weight)
        self.router.bias.copy_(wanted_center - weight @ center)


def imbalance(probability: Float[Tensor, "N G"], chosen: Int[Tensor, "N g"]) -> Float[Tensor, ""]:
    """G sum_g (share of choices that fall on g) (mean share of probability of g): 1 where all blocks are used alike.

    >>> float(imbalance(torch.full((4, 2), 0.5), torch.tensor([[0], [1], [0], [1]])))
    1.0
    """
    blocks = probability.shape[1]
    share = F.one_hot(chosen, blocks).sum((0, 1)).to(probability.dtype) / chosen.numel()
    mean = (probability / probability.sum(-1, keepdim=True)).mean(0)
    return blocks * (share * mean).sum()


class LoRA:
    """The class that a linear outside a routed feed-forward takes while its LoRA is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return project(self, x) + bias_of(self)
