"""A short training loop that runs any recipe, stops and resumes to the bit, and a search for the learning rate.

Nothing is pickled: a checkpoint is a safetensors file and a JSON file that names it, so it is old or new, never half.

>>> import torch
>>> from formulary import lab
>>> model = lab.tiny("gpt2")
>>> log = lab.train(model, lab.tasks.stream(lab.tasks.Copying(length=8), 4), steps=3, lr=1e-3)
>>> len(log.losses)
3
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from formulary.errors import FormularyError, UsageError, nearest
from formulary.files import write_atomic, write_json

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


@runtime_checkable
class Sampled(Protocol):
    """What `contracts.Data` is to the loop: the batch of a step, the same whenever it is asked for."""

    def sample(self, step: int) -> dict[str, Tensor]: ...


Batches = Callable[[int], dict[str, Tensor]] | Sampled | Iterable[dict[str, Tensor]]


@dataclass
class TrainLog:
    """What a run saw: every step's loss (mean of the batch) and learning rate, and the CPU seconds spent."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    resumed_from: int = 0
    stopped_at: int | None = None

    @property
    def final(self) -> float:
        """The mean loss of the last tenth of the steps (at least one)."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


@dataclass
class Loop:
    """What a recipe's `control` sees after each step and may change: `step` counts finished steps from 1.

    Set `stop = True` to end. Replace `optimizer` (and `scheduler`) after changing which parameters are trained.
    `state` is kept in checkpoints: numbers, strings, tensors, and lists and dicts of them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    steps: int
    step: int = 0
    loss: float = math.nan
    batch: dict[str, Any] | None = None
    stop: bool = False
    state: dict[str, Any] = field(default_factory=dict)


def train(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float,
    recipe=None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    optimizer: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: int | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 100,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainLog:
    """Train `model` in place for `steps` steps; its mode and the caller's random state are kept.

    `batches` is `step -> dict of tensors` (or has a `sample` that is, as `contracts.Data` does), or an iterable;
    to resume from an iterable, its first batches are drawn again and passed over. `seed` sets torch's random state
    (dropout, what a recipe draws), not the batches: `contracts.Data` draws by its own seed. Only parameters with
    `requires_grad` are trained; those with one dimension (norms, biases) are not decayed. The learning rate rises
    over `warmup` steps (a twentieth of all by default) and follows `schedule` to a hundredth of `lr` ("cosine",
    "linear") or stays ("constant").

    The loss is the recipe's, else `loss(model, batch)`, else `model(**batch).loss`. A `recipe` (see
    `contracts.Recipe`) replaces any of init, batch, loss, optimizer, scheduler, step and control. Gradients are
    clipped to norm `clip` whenever they are computed, so a step that computes them twice has both clipped.

    With `checkpoint`, a directory, the state is stored after each `every` steps and at the end, and a run that
    finds one goes on from it, bit-identically on the same machine and thread count.

    Raises FormularyError when the loss is not finite (naming the step), when nothing is trainable, when the batches
    run out, and when the checkpoint belongs to another run or cannot be read.
    """
    if steps < 1 or not lr > 0 or every < 1:
        raise UsageError(f"train needs steps >= 1, lr > 0 and every >= 1, not steps={steps}, lr={lr}, every={every}")
    warmup = max(1, steps // 20) if warmup is None else warmup
    settings = {
        "steps": steps, "lr": lr, "weight_decay": weight_decay, "schedule": schedule, "warmup": warmup, "clip": clip,
        "seed": seed, "optimizer": _optimizer_name(optimizer),
        "recipe": _recipe_name(recipe),
    }  # fmt: skip
    was_training = model.training
    with _seeded(seed):
        model.train()
        try:
            _call(recipe, "init", model)
            optimizer = _make_optimizer(model, recipe, optimizer, lr, weight_decay)
            scheduler = _call(recipe, "scheduler", optimizer) or _make_scheduler(optimizer, schedule, steps, warmup)
            loop, log = Loop(model, optimizer, scheduler, steps), TrainLog()
            if checkpoint is not None and Path(checkpoint, "state.json").exists():
                _restore(Path(checkpoint), settings, loop, log)
            _run(loop, log, _source(batches, loop.step), recipe, loss, clip, checkpoint, every, settings, progress)
        finally:
            model.train(was_training)
    return log


def _run(loop, log, source, recipe, loss, clip, checkpoint, every, settings, progress) -> None:
    started = time.process_time()
    device = next(loop.model.parameters()).device
    while loop.step < loop.steps and not loop.stop:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in source(loop.step).items()}
        changed = _call(recipe, "batch", batch)
        loop.batch = batch if changed is None else changed
        closure = _closure(loop, recipe, loss, clip)
        log.learning_rates.append(float(loop.optimizer.param_groups[0]["lr"]))
        if _has(recipe, "step"):
            value = recipe.step(loop.model, closure, loop.optimizer)
        else:
            value = closure()
            loop.optimizer.step()
        loop.scheduler.step()
        loop.loss = float(value)
        loop.step += 1
        log.losses.append(loop.loss)
        _call(recipe, "control", loop)
        if checkpoint is not None and (loop.step % every == 0 or loop.step == loop.steps or loop.stop):
            _store(Path(checkpoint), settings, loop, log)
        if progress is not None:
            progress(loop.step, loop.steps, loop.loss)
    loop.optimizer.zero_grad(set_to_none=True)
    log.stopped_at = loop.step if loop.stop else None
    log.cpu_seconds = time.process_time() - started


def _closure(loop: Loop, recipe, loss, clip: float | None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loop.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            if _has(recipe, "loss"):
                value = recipe.loss(loop.model, loop.batch)
            else:
                value = loss(loop.model, loop.batch) if loss else _own_loss(loop.model, loop.batch)
            if not torch.isfinite(value):
                rate = loop.optimizer.param_groups[0]["lr"]
                raise FormularyError(
                    f"the loss is {float(value.detach())} at step {loop.step + 1}, learning rate {float(rate):g}: "
                    "try a smaller learning rate, and look for NaN in the data"
                )
            value.backward()
        if clip is not None:
            trained = [p for group in loop.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, clip)
        return value.detach()

    return closure


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise UsageError(f"{type(model).__name__} returned no loss: put labels in the batches, or give loss=")
    return value


def _has(recipe, name: str) -> bool:
    """Whether the recipe defines the hook: a `contracts.Recipe` says so, any other object by having the method."""
    if recipe is None:
        return False
    return name in recipe.hooks() if hasattr(recipe, "hooks") else callable(getattr(recipe, name, None))


def _call(recipe, name: str, *arguments):
    return getattr(recipe, name)(*arguments) if _has(recipe, name) else None


def _optimizer_name(optimizer) -> str:
    return optimizer if isinstance(optimizer, str) else getattr(optimizer, "__qualname__", type(optimizer).__name__)


def _recipe_name(recipe) -> Any:
    if recipe is None:
        return None
    parameters = recipe.parameters() if hasattr(recipe, "parameters") else {}
    return {"class": type(recipe).__qualname__, "parameters": json.loads(json.dumps(parameters))}


def _make_optimizer(model: nn.Module, recipe, optimizer, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise FormularyError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to train")
    if _has(recipe, "optimizer"):
        return recipe.optimizer(trained)
    if callable(optimizer):
        return optimizer(trained)
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {optimizer!r}{nearest(optimizer, OPTIMIZERS)}; there are {OPTIMIZERS}")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return (torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam)(groups, lr=lr)


def _make_scheduler(optimizer: torch.optim.Optimizer, schedule: str, steps: int, warmup: int):
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}; there are {SCHEDULES}")

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[schedule]
        return rise * (0.01 + 0.99 * falls)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _source(batches, done: int) -> Callable[[int], dict[str, Tensor]]:
    """`step -> batch`. An iterable is read in order; the `done` batches of a resumed run are passed over."""
    if hasattr(batches, "sample"):
        return batches.sample
    if callable(batches):
        return batches
    iterator = iter(batches)
    for _ in range(done):
        next(iterator, None)

    def following(step: int) -> dict[str, Tensor]:
        try:
            return next(iterator)
        except StopIteration:
            raise FormularyError(f"the batches ran out at step {step + 1}: give more, or train fewer steps") from None

    return following


@contextmanager
def _seeded(seed: int):
    """Seed torch, Python and numpy; put the caller's random states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": list(np.random.get_state(legacy=True)),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))


def _store(folder: Path, settings: dict, loop: Loop, log: TrainLog) -> None:
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    state = {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict(),
        "random": _random_states(),
        "loop": {"step": loop.step, "stop": loop.stop, "state": loop.state},
        "log": {"losses": log.losses, "learning_rates": log.learning_rates},
    }
    packed = _pack(state, "", tensors)
    file = f"step-{loop.step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / file, save(tensors))
        write_json(folder / "state.json", {"version": 1, "settings": settings, "tensors": file, "state": packed})
        for old in folder.glob("step-*.safetensors"):
            if old.name != file:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise FormularyError(f"cannot write the checkpoint in {folder}: {error.strerror or error}") from error


def _restore(folder: Path, settings: dict, loop: Loop, log: TrainLog) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / "state.json").read_text("utf8"))
        stored = record["settings"]
        tensors = load_file(folder / Path(record["tensors"]).name)
        state = _unpack(record["state"], tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise FormularyError(
            f"the checkpoint in {folder} cannot be read ({error}): delete it to start afresh"
        ) from error
    for key, value in json.loads(json.dumps(settings)).items():
        if stored.get(key) != value:
            raise FormularyError(
                f"the checkpoint in {folder} is of another run ({key} {stored.get(key)!r}, now {value!r}): "
                "delete it or name another directory"
            )
    try:
        loop.model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise FormularyError(f"the checkpoint in {folder} does not fit this model: {first}") from error
    loop.scheduler.load_state_dict(state["scheduler"])
    _set_random_states(state["random"])
    loop.step, loop.stop, loop.state = (state["loop"][key] for key in ("step", "stop", "state"))
    log.losses, log.learning_rates = state["log"]["losses"], state["log"]["learning_rates"]
    log.resumed_from = loop.step


def _pack(value, name: str, tensors: dict[str, Tensor]):
    """JSON for nested dicts, lists, tuples and scalars; tensors and arrays go to `tensors` under their path."""
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.astype(np.int64))
        return {"array": name, "dtype": str(value.dtype)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    what = f"{name.strip('/')}, a {type(value).__name__}"
    raise FormularyError(f"a checkpoint cannot hold {what}: only numbers, text and tensors")


def _unpack(value, tensors: dict[str, Tensor]):
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return tensors[value["array"]].numpy().astype(value["dtype"])
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return {key: _unpack(item, tensors) for key, item in value["dict"]}


def tuned_lr(
    make_model: Callable[[], nn.Module],
    batches: Batches,
    *,
    validation: Callable[[nn.Module], float] | Iterable[dict[str, Tensor]],
    lrs: Iterable[float] = (1e-4, 3e-4, 1e-3, 3e-3),
    steps: int,
    seed: int = 0,
    recipe=None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    optimizer: str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "adamw",
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    warmup: int | None = None,
    clip: float | None = 1.0,
) -> tuple[float, dict[float, float]]:
    """The learning rate of `lrs` with the least validation loss after `steps` steps, and the table of all.

    `make_model()` gives a fresh model each time. `validation` is `model -> loss` or the held-out batches (their
    mean loss); a run that diverges counts as infinite. A best rate at an end of the grid may mean that the grid is
    too short: look at the table. An optimizer, or a recipe, that sets its own learning rate cannot be tuned here.

    Raises FormularyError when every rate diverges.
    """
    if callable(optimizer) or _has(recipe, "optimizer"):
        raise UsageError("tuned_lr sets the learning rate itself: it cannot tune an optimizer that was built elsewhere")
    if not callable(validation):
        held_out = list(validation)
        validation = lambda model: _mean_loss(model, held_out, recipe, loss)
    table = {}
    for lr in lrs:
        model = make_model()
        try:
            train(
                model, batches, steps=steps, lr=lr, recipe=recipe, loss=loss, optimizer=optimizer,
                weight_decay=weight_decay, schedule=schedule, warmup=warmup, clip=clip, seed=seed,
            )  # fmt: skip
            value = float(validation(model))
        except FormularyError as error:
            if "the loss is" not in str(error):
                raise
            value = math.inf
        table[lr] = value if math.isfinite(value) else math.inf
    best = min(table, key=table.get)
    if math.isinf(table[best]):
        raise FormularyError(f"every learning rate diverged: {', '.join(f'{lr:g}' for lr in table)}; try smaller ones")
    return best, table


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: list[dict[str, Tensor]], recipe, loss) -> float:
    evaluate = recipe.loss if _has(recipe, "loss") else loss or _own_loss
    was_training = model.training
    model.eval()
    values = [float(evaluate(model, batch)) for batch in batches]
    model.train(was_training)
    return sum(values) / len(values)
