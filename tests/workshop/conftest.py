"""A tiny BERT and a tiny Llama on disk, with a real tokenizer, and text that both can read."""

import shutil

import pytest

from formulary.lab import small

TEXT = "\n\n".join(f"In the beginning number {i} was the word and the word was long enough to be read by a model." for i in range(60))


def save_with_tokenizer(name: str, path) -> None:
    """A tiny model of family `name` in `path`, with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    small.tiny(name).save_pretrained(path)
    words = sorted(set(TEXT.split()))[:80]
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[CLS]").save_pretrained(path)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """A directory with a tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    save_with_tokenizer("llama", path)
    return path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A tiny BERT directory with a real tokenizer."""
    path = tmp_path_factory.mktemp("model")
    save_with_tokenizer("bert", path)
    (path / "LICENSE").write_text("a licence")
    return path


@pytest.fixture
def directory(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")
