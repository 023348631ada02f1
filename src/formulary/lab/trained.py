"""Small models trained here once and kept by content, as safetensors and JSON."""

import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from formulary.errors import FormularyError, UsageError
from formulary.files import write_json

from .storage import made_once


def cached(
    name: str,
    build: Callable[[], nn.Module | tuple[nn.Module, dict]],
    *,
    key: dict,
    make: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """The model that `build()` trains, from the cache when this very model was trained before. In eval mode.

    `build` returns the model, or the model and a dict of facts measured on it (JSON), which is found on the result
    as `model.lab_meta`. The cache is keyed by `name`, `key` (JSON: every value that `build` closes over), the
    source of `build` and `make`, and the version of torch. A model of transformers is built again from its config;
    any other needs `make()`, which gives the untrained model.

    The first call returns what it stored, loaded like all later ones, so no check can depend on which call it was.
    Raises FormularyError when the model cannot be rebuilt, UsageError when `key` is not JSON or there is no source
    to hash.
    """
    folder = f"{name}-{_digest(name, build, make, key)}"
    directory = made_once(folder, lambda beside: _fill(beside, name, build, make, key), under="trained")
    return _load(directory, make)


def _digest(name: str, build, make, key: dict) -> str:
    try:
        sources = [textwrap.dedent(inspect.getsource(function)) for function in (build, make) if function]
    except (OSError, TypeError) as error:
        raise UsageError(f"cached({name!r}) needs functions whose source can be read: {error}") from error
    try:
        text = json.dumps([name, key, sources, torch.__version__], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cached({name!r}): the key must be JSON: {error}") from error
    return hashlib.sha256(text.encode("utf8")).hexdigest()[:16]


def _fill(directory: Path, name: str, build, make, key: dict) -> None:
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    result = build()
    model, meta = result if isinstance(result, tuple) else (result, {})
    record = {"name": name, "key": key, "torch": torch.__version__, "meta": meta}
    if make is None:
        if not isinstance(model, PreTrainedModel):
            kind = type(model).__name__
            raise FormularyError(f"cached({name!r}) needs make=, since {kind} is not a model of transformers")
        record |= {"class": type(model).__name__, "config": json.loads(model.config.to_json_string(use_diff=False))}
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, directory / "model.safetensors")
    write_json(directory / "model.json", record)


def _load(directory: Path, make) -> nn.Module:
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((directory / "model.json").read_text("utf8"))
        state = load_file(directory / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise FormularyError(f"{directory} cannot be read ({error}): delete it, and it is trained again") from error
    with torch.random.fork_rng(devices=[]):
        if make is not None:
            model = make()
        else:
            model_class = getattr(transformers, record["class"])
            model = model_class(model_class.config_class.from_dict(record["config"]))
    model.load_state_dict(state)
    model.lab_meta = record["meta"]
    return model.eval()


def trained_char_gpt(
    *, layers: int = 4, width: int = 128, heads: int = 4, kind: str = "llama", seed: int = 0, steps: int = 400
) -> nn.Module:
    """A character-level language model of the King James Bible (`lab.tasks.CharText`), sequences up to 256 characters.

    `kind` is "llama" (RoPE, RMSNorm, gated feed-forward, heads / 2 KV heads) or "gpt2", which learns its positions
    and is further behind after so few steps: 1.52 and 1.98 nats were measured for the defaults, where uniform
    guessing has 4.16. Trained on the train books, batches of 16 x 128; `lab_meta["nats_per_character"]` is its
    loss on 64 windows of the test books. The first call trains: 6 x parameters x 2,048 x steps, 4e12
    floating-point operations for the default, about a minute on one thread.
    """
    if kind not in ("gpt2", "llama"):
        raise UsageError(f"unknown kind {kind!r}; it is 'gpt2' or 'llama'")

    def build():
        from . import tasks
        from .metrics import sequence_loss
        from .training import train

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _char_model(kind, layers, width, heads)
        lr = 4e-3 if kind == "gpt2" else 2e-3
        text = tasks.stream(tasks.CharText(128), 16, seed=seed)
        log = train(model, text, steps=steps, lr=lr, weight_decay=0.1, seed=seed)
        held_out = tasks.CharText(128, split="test").batch(64, torch.Generator().manual_seed(0))
        loss = sequence_loss(model.eval(), [held_out])
        found = {
            "nats_per_character": float(loss.nats.sum() / loss.tokens.sum()),
            "train_loss": log.final,
            "cpu_seconds": log.cpu_seconds,
        }
        return model, found

    key = {"layers": layers, "width": width, "heads": heads, "kind": kind, "seed": seed, "steps": steps}
    return cached(f"char-{kind}", build, key=key)


def _char_model(kind: str, layers: int, width: int, heads: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from .tasks import characters

    tokens = {"vocab_size": len(characters()), "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    if kind == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=layers,
                n_embd=width,
                n_head=heads,
                n_positions=256,
                activation_function="gelu_pytorch_tanh",
                **tokens,
                **drop,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            **tokens,
        )
    )


def trained_digit_vit(
    *, layers: int = 4, width: int = 64, heads: int = 4, seed: int = 0, steps: int = 500
) -> nn.Module:
    """A ViT classifier of scikit-learn's digits, upsampled to 3 x 32 x 32: 64 patches of 4 x 4 and [CLS].

    Trained on the train split with shifts of up to 2 pixels, batches of 64; `lab_meta["accuracy"]` is that on the
    test split. The first call trains: about 5e12 floating-point operations with the defaults, about a minute on
    one thread. `digit_pixels` turns (N, 8, 8) digits into its input.
    """

    def build():
        from transformers import ViTConfig, ViTForImageClassification

        from .datasets import digits
        from .metrics import accuracy
        from .training import train

        config = ViTConfig(
            image_size=32, patch_size=4, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=2 * width, num_labels=10, initializer_range=0.1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ViTForImageClassification(config)
        images, labels = (torch.from_numpy(part) for part in digits("train"))
        log = train(model, _shifted(images, labels, seed), steps=steps, lr=2e-3, weight_decay=0.05, seed=seed)
        images, labels = (torch.from_numpy(part) for part in digits("test"))
        with torch.no_grad():
            right = accuracy(model.eval()(pixel_values=digit_pixels(images)).logits, labels)
        return model, {"accuracy": float(right.mean()), "train_loss": log.final, "cpu_seconds": log.cpu_seconds}

    key = {"layers": layers, "width": width, "heads": heads, "seed": seed, "steps": steps}
    return cached("digit-vit", build, key=key)


def digit_pixels(images):
    """(N, 8, 8) digits in 0..1 -> (N, 3, 32, 32) bilinear pixel values in -1..1."""
    large = nn.functional.interpolate(images.unsqueeze(1), size=(32, 32), mode="bilinear", align_corners=False)
    return (2 * large - 1).repeat(1, 3, 1, 1)


def _shifted(images, labels, seed: int):
    """`step -> batch` of 64 digits, each rolled by up to 2 pixels of 32 in both directions."""
    pixels = digit_pixels(images)

    def batch(step: int):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(pixels), (64,), generator=generator)
        moves = torch.randint(-2, 3, (64, 2), generator=generator).tolist()
        rolled = [pixels[i].roll(move, dims=(1, 2)) for i, move in zip(chosen.tolist(), moves)]
        return {"pixel_values": torch.stack(rolled), "labels": labels[chosen]}

    return batch
