"""Half of MiniLM's layers, distilled for a short while on Bible verses: what do its features say about a verse's place?

Every arm ends in the same ridge classifier on the student's mean-pooled last states, which tells from which of six parts of the Bible
a verse is. The distilled students and "undistilled" start from the teacher's 2nd, 4th and 6th layer, "scratch" from random weights.
"undistilled" is the arm that must not fulfill the claim: it shows what the layers are worth without the loss.
"""

from functools import partial

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from formulary import lab
from formulary.contracts import Data
from formulary.evidence import Check, Outcome, all_of, at_least, no_worse

from .method import adamw, attention_loss, distil, minilm_loss, new_student, real_tokens

# The last book of each part: law, history, poetry, prophets, gospels and acts, letters and revelation.
LAST = ("Deuteronomy", "Esther", "Song of Solomon", "Malachi", "Acts", "Revelation")
STEPS, BATCH, TOKENS, RATE, LAYERS = 40, 8, 32, 5e-4, 3
TRAIN, TEST = 40, 70


def verses_by_part() -> list[list[str]]:
    found = [[]]
    for row, after in zip(rows := lab.kjv_rows(), [*rows[1:], None]):
        found[-1].append(row["text"])
        if row["book"] in LAST[:-1] and after["book"] != row["book"]:
            found.append([])
    return found


def prepare(seed: int):
    """The teacher, unlabeled verses to distil on, and labeled ones to train and test the classifier on, all different."""
    generator = np.random.default_rng(seed)
    unlabeled, labeled = [], {"train": [], "test": []}
    for mark, texts in enumerate(verses_by_part()):
        texts = generator.permutation(list(dict.fromkeys(texts))).tolist()
        labeled["train"] += [(text, mark) for text in texts[:TRAIN]]
        labeled["test"] += [(text, mark) for text in texts[TRAIN : TRAIN + TEST]]
        unlabeled += texts[TRAIN + TEST :]
    teacher, tokenizer = lab.minilm()
    chosen = generator.choice(unlabeled, STEPS * BATCH, replace=False).tolist()
    ids = tokenizer(chosen, truncation=True, max_length=TOKENS)["input_ids"]
    data = Data([{"input_ids": torch.tensor(one)} for one in ids], batch_size=BATCH, seed=seed)
    return {"teacher": teacher, "tokenizer": tokenizer, "data": data, **labeled}


def state_loss(teacher, model, batch):
    """Mean squared difference of the last hidden states at real tokens."""
    with torch.no_grad():
        wanted = teacher(**batch).last_hidden_state
    return (model(**batch).last_hidden_state - wanted)[real_tokens(batch)].square().mean()


def student(name: str, context):
    """The student that arm `name` ends with."""
    teacher, data = context["teacher"], context["data"]
    torch.manual_seed(data.seed)
    model, _ = new_student(teacher, LAYERS, teacher.config.hidden_size, "random" if name == "scratch" else "teacher")
    if name in LOSSES:
        distil(teacher, model, data, steps=STEPS, learning_rate=RATE, loss=LOSSES[name])
    elif name == "hidden states":
        loss = partial(state_loss, teacher)
        lab.train(model, data, steps=STEPS, lr=RATE, loss=loss, optimizer=adamw(RATE), schedule="linear", seed=data.seed)
    return model


def arm(name: str, context) -> Outcome:
    """One outcome per test verse: 1 where its part is told right."""
    model = student(name, context).eval()
    features = {}
    for split in ("train", "test"):
        texts = [text for text, _ in context[split]]
        features[split] = lab.embed(model, context["tokenizer"], texts, max_length=TOKENS).numpy(), [mark for _, mark in context[split]]
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(0, 5, 11))).fit(*features["train"])
    inputs, marks = features["test"]
    return Outcome((classifier.predict(inputs) == marks).astype(float).tolist(), budget={"parameters": model.num_parameters()})


LOSSES = {"at+vr": minilm_loss, "at": attention_loss}

check = Check(
    claim="Three layers of MiniLM, distilled for 40 steps on the last layer's attention and value relations (AT+VR), tell a verse's part "
    "of the Bible no more than 3 points worse than after AT alone, at least 3 points better than random layers, and better than the same "
    "layers undistilled.",
    setup=prepare,
    arms={name: partial(arm, name) for name in ("at+vr", "at", "hidden states", "undistilled", "scratch")},
    metric="accuracy",
    holds=all_of(
        no_worse("at+vr", "at", margin=0.03, higher_is_better=True),
        at_least("at+vr", "scratch", plus=0.03),
        at_least("at+vr", "undistilled", effect=0.03),
    ),
    items="fresh",
    redraws="the verses to distil, train and test on, the random weights and the dropout",
    seeds=5,
    version=1,
    null_arm="undistilled",
    scope="3 of 6 layers of MiniLM after 40 batches of 8 verses, read by a linear classifier without fine-tuning",
)
