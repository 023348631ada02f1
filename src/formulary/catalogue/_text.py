"""Words to search terms: tokens, stems, compounds and concepts, the same for cards and for queries.

`terms("LLM.int8() keeps 8-bit weights")` holds the plain stems, the joined compounds (`llmint8`), and the concepts that several
wordings share (`=8bit` for int8, 8-bit, eight bits; `=llm` for LLM and large language model).
"""

import re
import unicodedata
from functools import cache

TOKEN = re.compile(r"[A-Za-z0-9]+(?:[-.'_/^+][A-Za-z0-9]+)*")
CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
VOWELS = "aeiou"

# Words that carry no topic: English function words, and the boilerplate of abstracts (rare in cards, so their idf would mislead).
STOP = frozenset(
    """a about above across after again against all almost along already also although always am among an and another any are as at
    be because become been before being below beside between beyond both but by can cannot could did do does doing done don
    down due during each either else enough etc even ever every everything few for from further get gets getting give given gives giving go goes
    had has have having he hence her here him his how however i if in indeed instead into is isn it its itself just keep keeps kept
    know known let lets like made mainly make makes making many may me might more moreover most mostly much must my namely
    need needs neither never no nor not now of off often on once one only onto or other others otherwise our out over own per perhaps put quite rather
    really s same shall she should since so some someone something such take takes taking t than that the their theirs them then there
    thereby therefore these they thing things this those though three through throughout thus to together too toward towards two
    under unlike until up upon us use used uses using usually very via want was way ways we well were what when where whereas whether which while
    who whole whom whose why will with within without would yet you your
    abstract achieve achieved achieves achieving additionally address addresses advance advances aim aims allow allowing
    allows amount analyses approach approaches article available based believe benefit benefits best better building built called case cases challenge
    challenges challenging code com common commonly compare compared comparing comparison competitive comprehensive conduct
    consider considerable consistently contribution contributions current currently demonstrate demonstrated demonstrates demonstrating design designed
    despite develop developed different effective effectively effectiveness enable enables enabling especially establish evaluate evaluated
    evaluation evidence example examples excellent existing experiment experimental experiments explore exploring extensive extensively
    finally find finding findings finds first following framework fully furthermore github great
    handle help helps high higher highly http https impact important importantly impressive improve improved improvement improvements improves
    improving include includes including introduce introduced introduces introducing investigate issue issues key lack large largely largest lead leading
    leads led leverage leverages leveraging limitation limitations limited main major method methods model models motivate motivated
    moreover namely new notably novel numerous obtain obtained obtains offer offers outperform outperforming outperforms paper
    particular particularly perform performance performing performs play popular possible potential present presented
    presents previous previously prior problem problems promising propose proposed proposes proposing provide provided provides providing publicly
    recent recently released require required requires requiring research respectively result resulting results reveal reveals
    second set several show showing shown shows significant significantly simple simply simultaneously single
    sota specifically state state-of-the-art strong studies study substantial substantially success successful successfully suffer suffers
    suggest suggests superior surpass surpasses surpassing task tasks technique techniques term terms url
    useful utilize utilized utilizes utilizing various verify wide widely work works yield yields
    accomplish accordingly actual actually advantage advantages aforementioned agree aid alternative alternatives
    applicability applicable applied apply applying appropriate argue around aspect aspects assess associated assume
    assumption attempt attempts attracted attractive availability aware basic became bring brings broad capability
    capabilities careful carefully certain characteristic characteristics choice choices choose clear clearly combine combined
    combines combining come comes community complete completely complex complexities component components concern concerns
    concrete consequently consist consistent consists constitute contain contains contrast contribute conventional core
    correspond corresponding crucial crucially daily deal decade degree demand demanding demands depend depends derive derived
    describe described desirable desired detailed detail details determine difficult difficulty dive dramatic dramatically
    ease easily easy efficient efficiently effort efforts emerge emerged emerging emphasis empirical empirically employ
    employed employing encounter encourage ensure ensures entire essential essentially exceed exceptional exhibit exhibits
    expect expected exploit explored extend extended extends extent facilitate facilitates facilitating fact factor factors
    fail fails far favorable feasible flexible flexibility focus focused focuses form forms found foundation framework
    frameworks fundamental gain gained gains general generally goal goals good guide hard heavily hence hinder hinders hold
    holds hope idea ideas identified identify illustrate immense implement implementation implemented implications inability
    incorporate incorporates incorporating increase increased increases increasing increasingly indicate indicates inefficient
    inefficiency inevitable inevitably influence inherent inherently innovative insight insights inspired instance integrate
    integrated integrating intend interest interesting interests intricate intrinsic involve involves involving latest likely
    little look lot main majority mainstream manner massive meaningful means mitigate mitigates modern modification
    modifications nature nearly necessary necessitate newly nontrivial notable numerous objective observation observations
    observe observed occur opportunities opportunity original outcome outcomes overcome overcoming overlook overlooked
    particular past pave paves paving performant poor poses posing potentially powerful practical practically practice
    practitioners precise precisely preliminary presence prevent primarily primary principal principle progress prohibitive
    prominent properties property prove proven purpose raise range rapid rapidly rarely readily realistic reality reason
    reasons receive received recognized referred regarding related relatively rely relies relying remain remains remarkable
    remarkably replacement requirement requirements researchers respect revolutionized rise role room said scenario scenarios
    scheme seamless seamlessly seek seem sense serious serve serves setting settings severe severely shed sheds shortcomings
    similar simplicity situation solution solutions solve solved solving sophisticated special spurred stand standard start
    starting stems strategies strategy strength strengths strive subsequently suffering sufficient suitable supports surge
    surprising surprisingly systematic systematically tackle tackled tackling thereof thorough topic traditional tremendous
    trend try trying typical typically ultimately underlying understand understanding understood undergo unexplored
    unfortunately unique unprecedented validate validated validating validity valuable vanilla variant variants variety vast
    versatile vital ways whereby widespread witnessed yet yielding""".split()
)

# Concepts: each line is a concept and the wordings (in plain words) that stand for it. A single word matches by its stem.
CONCEPTS = """
8bit: int8, 8 bit, 8 bits, eight bit, eight bits, w8a8, byte
4bit: int4, 4 bit, 4 bits, four bit, four bits, w4a4, w4a16
1bit: 1 bit, one bit, single bit, binary weights, binarized, binarization, binary neural network, binary network
ternary: ternary, three valued, 1.58 bit
llm: llm, large language model, large language models, gpt, chatbot
lm: language model, language models, causal lm, plm, lms
vit: vit, vision transformer, vision transformers, visual transformer, image transformer
ffn: ffn, feed forward, feedforward, mlp, multilayer perceptron, multi layer perceptron, fully connected
icl: icl, in context, few shot prompt, demonstrations, in context learner
rl: rl, reinforcement learning, policy gradient, offline rl, agent, policy
ssm: ssm, ssms, state space, mamba, structured state
rnn: rnn, recurrent, recurrence, lstm
moe: moe, mixture of experts, experts, expert
kd: kd, distillation, distil, distill, teacher, student
lora: lora, low rank adaptation, low rank adapter, low rank adapters
lowrank: low rank, rank, svd, factorize, factorization, factorized, decomposition
peft: peft, petl, parameter efficient, adapter, adapters, adaptor, side network
finetune: fine tune, fine tuning, fine tuned, finetune, finetuning, finetuned
pretrain: pre train, pre training, pre trained, pretrain, pretraining, pretrained, foundation model
ehr: ehr, emr, electronic health record, electronic health records, patient records, medical records
clinical: clinical, clinic, medical, medicine, hospital, patient, patients, doctor, physician, health, healthcare
radiology: radiology, radiologist, x ray, xray, chest, ct, mri
qa: qa, question answering, questions
ner: ner, named entity, entity, entities
asr: asr, speech recognition, transcription, transcribe
speech: speech, voice, spoken, audio, sound, acoustic, waveform, spectrogram
music: music, musical, song, songs, melody, vocals, singing
nli: nli, natural language inference, entailment
nlp: nlp, natural language processing
kv: kv, key value, kv cache
long: long context, long sequence, long sequences, long range, long document, long documents, long form, long input, long inputs, lengthy
linear: linear time, linear complexity, subquadratic, sub quadratic, linear cost, linear attention
quadratic: quadratic, quadratically
sparse: sparse, sparsity, sparsify, sparsification, prune, pruning, pruned
quant: quantize, quantization, quantized, low bit, low precision, ptq, qat, bitwidth, bit width
ptq: ptq, post training quantization, post training, training free, without retraining, no retraining, zero shot
compress: compress, compression, shrink, smaller, compact, lightweight, light weight, tiny
speed: speed, speedup, speed up, fast, faster, accelerate, acceleration, latency, throughput, runtime, quick, quicker, real time
memory: memory, footprint, ram
compute: flops, flop, compute, computation, computational, cost, costs, budget, mac, macs
image: image, images, picture, pictures, photo, photos, photograph, photographs
video: video, videos, clip, clips, movie, footage
text2image: text to image, t2i, stable diffusion
diffusion: diffusion, denoising, ddpm, dit, diffusion transformer
consistency: consistency model, consistency models, few step, one step, four step
forecast: forecast, forecasts, forecasting, predict the future, time series, horizon
token: token, tokens, patch, patches
drop: drop, dropped, dropping, discard, discarding, remove, removing, removal, skip, skipping, prune, pruning, merge, merging, reduction, reduce
init: initialization, initialize, initializing, warm start, warmup, starting point
grow: grow, growth, growing, expand, expansion, stacking, enlarge, deeper
freeze: frozen, freeze, freezing, fixed weights
adv: adversarial, adversary, attack, attacks, attacker, perturbation, perturbations
robust: robust, robustness, corruption, corruptions, distribution shift, out of distribution, ood
secure: secure, private, privacy, encrypted, secret sharing, mpc, cryptographic, cryptography
retrieve: retrieval, retrieve, retriever, search, ranking, rank, matching
explain: explain, explanation, explanations, explainable, interpret, interpretable, interpretability, attribution, saliency
mechint: circuit, circuits, mechanistic, mechanism, ablation, ablate, head, heads
detect: detect, detection, detector, detectors, detr, bounding box, boxes
segment: segment, segmentation, segmenting, mask, masks, segmenter
3d: 3d, 3 d, three dimensional, point cloud, point clouds, mesh, voxel, volumetric
pose: pose, poses, joints, skeleton
molecule: molecule, molecules, molecular, chemical, chemistry, compound, compounds, drug, drugs, smiles
protein: protein, proteins, peptide, amino, sequence alignment, mutation, mutations, variant
tabular: tabular, table, tables, spreadsheet, spreadsheets, columns
code: source code, program, programs, programming, codebase, software
bayes: bayesian, posterior, prior, priors, probabilistic
cnn: cnn, cnns, convnet, convolution, convolutional, convolutions
norm: layernorm, layer normalization, rmsnorm, normalization, layer norm, normalize
rope: rope, rotary, positional, position embedding, position encoding, position encodings, positions
lr: learning rate, learning rates, step size
flat: sharpness, flat minima, loss landscape, flatter, sharp minima, sam
ssl: self supervised, unlabeled, unlabelled, ssl, dino, contrastive
semi: semi supervised, pseudo label, pseudo labels, few labels, pseudo targets
finance: stock, stocks, financial, finance, trading, trader, market
segtask: semantic segmentation, per pixel
doc: document, documents, pages, page
driver: driver, driving, drowsy, drowsiness
face: face, faces, facial
hallucinate: hallucination, factuality, factual, facts, fact
survey: survey, review, overview, reading list, literature
dataset: dataset, data set, corpus, benchmark, collection
generate: generate, generation, generating, generative, generator, synthesis, synthesize
gd: gradient descent, gd
math: math, mathematical, arithmetic, multiplication, formula, formulas, equation, symbolic regression
causal: causal reasoning, causality, cause and effect
cache: cache, caching
decode: decode, decoding, autoregressive decoding, token by token, generation speed
hardware: gpu, gpus, cpu, cpus, kernel, kernels, hardware
teststime: test time, inference time, at inference
lowres: low resource, scarce, small data, few samples, limited data
multilingual: multilingual, cross lingual, languages
"""


def terms(text: str) -> list[str]:
    """Every search term of `text`, in order and with repeats: stems, joined compounds, and `=concepts`.

    >>> terms("Quantizing LLM.int8()")
    ['quantiz', 'llm', 'int8', 'llmint8', '=quant', '=llm', '=8bit']
    """
    words, joined = _words(text)
    kept = [stem(word) for word in words if word not in STOP and (len(word) > 1 or word.isdigit())]
    return kept + [stem(word) for word in joined if word not in STOP] + _concepts([stem(word) for word in words])


def pairs(text: str) -> list[str]:
    """Neighbouring stems of `text`, stop words left out: what a phrase adds to its words."""
    kept = [stem(word) for word in _words(text)[0] if word not in STOP and (len(word) > 1 or word.isdigit())]
    return [f"{a} {b}" for a, b in zip(kept, kept[1:]) if a != b]


def _words(text: str) -> tuple[list[str], list[str]]:
    """The plain words in order, and the compounds joined (`top-k` -> `topk`, `XAttention` -> `xattention`)."""
    plain = unicodedata.normalize("NFKD", text.replace("δ", "delta").replace("’", "'"))
    plain = plain.encode("ascii", "ignore").decode().replace("\\", " ").replace("$", "").replace("{", "").replace("}", "")
    words: list[str] = []
    joined: list[str] = []
    for token in TOKEN.findall(plain):
        token = token[:-2] if token.endswith("'s") else token
        parts = [part for part in re.split(r"[-.'_/^+]", token) if part]
        for part in parts:
            if part[-1] == "s" and len(part) > 2 and part[:-1].isupper():
                part = part[:-1]
            words.append(part.lower())
            humps = CAMEL.findall(part) if not part.islower() and not part.isupper() else []
            if len(humps) > 1:
                joined += [hump.lower() for hump in humps if len(hump) > 2 and not hump.isdigit()]
        if len(parts) > 1 and "/" not in token and len(token) < 40:
            joined.append("".join(parts).lower())
    joined += [a + b for a, b in zip(words, words[1:]) if len(b) == 1 and b.isalpha() and len(a) > 2 and b not in STOP and a not in STOP]
    return words, joined


@cache
def _concept_table() -> tuple[dict[tuple[str, ...], list[str]], int]:
    """Stemmed wording -> its concepts, and the length of the longest wording."""
    table: dict[tuple[str, ...], list[str]] = {}
    for line in CONCEPTS.strip().splitlines():
        name, _, wordings = line.partition(":")
        for wording in wordings.split(","):
            key = tuple(stem(word) for word in wording.split())
            concepts = table.setdefault(key, [])
            if f"={name}" not in concepts:
                concepts.append(f"={name}")
    return table, max(len(key) for key in table)


def _concepts(stems: list[str]) -> list[str]:
    table, longest = _concept_table()
    found: list[str] = []
    for start in range(len(stems)):
        for length in range(1, longest + 1):
            found += table.get(tuple(stems[start : start + length]), ()) if start + length <= len(stems) else ()
    return found


@cache
def stem(word: str) -> str:
    """The stem of a lower-case word, after Porter (1980), with British spelling folded into American first.

    >>> [stem(word) for word in ("quantised", "quantization", "modelling", "models", "behaviour")]
    ['quantiz', 'quantiz', 'model', 'model', 'behavior']
    """
    if len(word) < 4 or not word.isalpha():
        return word
    word = _american(word)
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and len(word) > 2 and word[-2] not in VOWELS:
        word = word[:-1] + "i"
    for suffixes, least in ((STEP_2, 0), (STEP_3, 0), (STEP_4, 1)):
        word = _replace(word, suffixes, least)
    if word.endswith("e") and len(word) > 3 and _measure(word[:-1]) >= 1:
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and len(word) > 3 else word


STEP_2 = tuple(
    pair.split(">")
    for pair in "ational>ate tional>tion enci>ence anci>ance izer>ize ization>ize ational>ate ation>ate ator>ate alism>al iveness>ive "
    "fulness>ful ousness>ous aliti>al iviti>ive biliti>ble entli>ent ousli>ous abli>able alli>al eli>e".split()
)
STEP_3 = tuple(pair.split(">") for pair in "icate>ic ative> alize>al iciti>ic ical>ic ful> ness>".split())
STEP_4 = tuple((suffix, "") for suffix in "ement ance ence able ible ment sion>s tion ant ent ism ate iti ous ive al er ic".split())


def _american(word: str) -> str:
    for british, american in (("isation", "ization"), ("isers", "izers"), ("iser", "izer"), ("ising", "izing"), ("ised", "ized"), ("ise", "ize"), ("yse", "yze"), ("iour", "ior")):
        if word.endswith(british) and len(word) > len(british) + 2:
            return word[: -len(british)] + american
    return re.sub(r"(?<=[a-z]{2})our(?=s?$|ed$|ing$|al$|hood)", "or", word) if "our" in word and word not in ("hour", "four", "your", "tour", "pour") else word


def _plural(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-3] + "i" if len(word) > 4 else word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) else word
    for suffix in ("ed", "ing"):
        root = word[: -len(suffix)]
        if word.endswith(suffix) and re.search("[aeiouy]", root) and len(root) > 1:
            if root.endswith(("at", "bl", "iz")):
                return root + "e"
            if len(root) > 2 and root[-1] == root[-2] and root[-1] not in "aeious":
                return root[:-1]
            return root + "e" if len(root) == 3 and _measure(root) == 1 and re.fullmatch("[^aeiou][aeiouy][^aeiouwxy]", root) else root
    return word


def _replace(word: str, suffixes, least: int) -> str:
    for suffix, new in suffixes:
        if word.endswith(suffix):
            root = word[: -len(suffix)]
            return root + new if _measure(root) > least else word
    return word


def _measure(root: str) -> int:
    """Porter's m: how many times a vowel is followed by a consonant."""
    return len(re.findall("[aeiouy]+[^aeiouy]+", root))
