"""Build a prior: adjectives and nouns, their vectors, and the graph of which modifies which noun.

Paper §3.3, step 1 and the first half of step 2. Captions are tagged, and their adjectives and nouns are
kept. Each gets a vector of a language model, and A_ij = 1 where adjective i modifies noun j.

    python prior.py captions.txt --download --out prior.npz
    python prior.py captions.json texts/ --embeddings glove --weights glove.6B.zip --out glove.npz
    python prior.py show prior.npz --caption "a bright orange breast"

The first two make a prior, of CLIP's vectors by default. `show` prints what a prior holds.
"""

import argparse
import csv
import functools
import gzip
import hashlib
import html
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

PARTS = ("adjective", "noun")  # the order of the codebooks everywhere
WINDOW = 5  # words on each side that count as context of `corpus` vectors (Levy & Goldberg 2014)
CHUNK = 2000  # captions that a worker takes at a time, about a second's work
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# ======== Corpora

FORMS = (
    "text with a caption per line; Flickr's `name#k caption`; JSON or JSON lines (COCO's, Karpathy's, "
    "strings, or objects with a `caption`); a table, captions last; or a folder of .txt files; .gz or not"
)


def read_corpora(paths):
    """Yield the captions of corpora. Raises UserError for a corpus without captions."""
    for path in paths:
        captions = list(read_captions(path))
        if not captions:
            raise UserError(f"corpus '{path}' holds no caption; a corpus is {FORMS}")
        yield from captions


def read_captions(path):
    """Yield the captions of a file in one of FORMS, or of the .txt and .txt.gz files of a folder.

    Raises UserError if a file is missing, damaged, or neither UTF-8 nor UTF-16.
    """
    path = Path(path)
    for file in list_files(path, (".txt", ".txt.gz")) if path.is_dir() else [path]:
        with user_error(f"corpus '{file}' cannot be read: {{}}; a corpus is {FORMS}"):
            data = file.read_bytes()
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
            captions = captions_of(data.decode("utf-16" if utf_16 else "utf-8-sig"))
        for caption in captions:
            if caption := " ".join(caption.split()):
                yield caption


def captions_of(text):
    """The captions of a file's text in one of FORMS → list. Raises ValueError for damaged JSON."""
    lines = [line for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if re.match(r'\s*[\[{]\s*[\[{"\]}]', text):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = [json.loads(line) for line in lines]
        return list(captions_in(value))
    for mark in "\t|,;":
        # The first column of a table holds names, numbers or URLs, and the last one may.
        row = ".*\t" if mark == "\t" else rf"[^\s{mark}]*[\d./:][^\s{mark}]*[{mark}]"
        if lines[1:] and all(re.match(row, line) for line in lines[1:20]):
            quoting = csv.QUOTE_NONE if mark in "\t|" else csv.QUOTE_MINIMAL
            rows = csv.reader((f"{line}\n" for line in lines), delimiter=mark, quoting=quoting)
            lines = [next(filter(is_text, reversed(row)), "") for row in rows]
            break
    return [re.sub(r"^\S+#\d+\s+", "", line) for line in lines]


def captions_in(value):
    """Yield a JSON value's captions: its strings, and those under keys of public data sets."""
    if isinstance(value, str) and is_text(value):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from captions_in(item)
    elif isinstance(value, dict):
        for key in ("annotations", "images", "sentences", "captions", "caption", "raw", "text"):
            yield from captions_in(value.get(key))


def is_text(value):
    """Whether a string has several words. A caption has; a name, a number or a URL has not."""
    return len(value.split()) > 1


# ======== Parts of speech
#
# The tagger errs in captions: it takes the colour of "an orange breast" for a noun, and the verb of "a
# dog walks" for a plural. RULES correct it. Each word of a sentence becomes one letter, so that a rule
# is a regular expression over the letters of the sentence:
#
#   A  adjective                                      N  noun, or a word that WordNet lacks under its tag
#   B  noun that may be an adjective: "orange"        S  plural that is more often a verb: "walks"
#   E  participle that may be an adjective: "striped" G  -ing form that may be an adjective: "flying"
#   K, W, a, C, P, R, D and the comma: see LETTERS    -  any other word
#
# "A bright orange breast" is aABN. A rule turns each B, E, G and S in its match into its letter, so the
# fifth rule makes it aAAN. The rules apply in this order; an E or G that is left is no adjective. Each
# rule changes at least 5 in 1,000 pairs of 2,500 captions of Flickr30k or of CUB.

LETTERS = {  # letter → words, or Penn Treebank tags
    "K": "is are was were",
    "W": "that which who",
    "a": "a an",
    "C": "CC",  # and, or
    ",": ",",
    "P": "IN",  # prepositions
    "R": "RB RBR RBS",  # adverbs
    "D": "DT PRP$",  # the, this, its
    "-": "not n't",  # no adverbs: "the bird is not red"
}
KINDS = {word: letter for letter, words in LETTERS.items() for word in words.split()}
LIST = "R*{0}(?:[C,]*{0})*"  # adjectives in a row: "very small, round and brown"
RULES = (  # letter, where, an example with the word in capitals
    ("-", r"(?<=[NBS])S(?=[PDa])", "a brown dog WALKS on grass"),
    ("A", "K" + LIST.format("(?:[AB]|E(?!P))"), "the bird is small, ROUND and brown"),
    ("A", r"E(?=[C,]?[ABENS])", "a zebra has STRIPED legs"),
    ("A", r"(?<=[Da])G(?=[ABNS])", "a FLYING bird"),
    ("A", r"B(?=[ABNS])", "a bright ORANGE breast"),
    ("A", r"(?<=[aP])B(?=CA)", "an ORANGE and black bird"),
    ("N", r"[BS]", "a ripe ORANGE"),
)
PLURALS = {"men": "man", "shorts": "shorts", "glasses": "glasses", "trunks": "trunks"}  # not "short"
QUANTIFIERS = frozenset(
    "several many few more most much less other half both two three four five six seven".split()
)
INVISIBLE = (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
ASCII = dict.fromkeys(INVISIBLE, "") | dict.fromkeys(map(ord, "–—―"), ", ")
ASCII |= str.maketrans("‘’‛′‐", "''''-")


def plain(text):
    """A caption's text without markup, emoji and typography, which hide where words end."""
    text = unicodedata.normalize("NFKC", html.unescape(text)).translate(ASCII)
    text = text.lower() if text.isupper() else text  # capitals are tagged as names
    # Tags, emoji, U+FFFD and quotation marks
    text = re.sub(r"<[^<>]*>|[^\w\s!#-~]|(?<!\w)'(?!s\b|re\b)|'(?!\w)", " ", text)
    text = re.sub(r"(?<=[^\W\d_])/(?=[^\W\d_])", " and ", text)  # "red/white"
    return re.sub(r"(?<=[a-z]{2})([.!?])(?:[.!?]+|(?=[^\W\d_]))", r"\1 ", text)  # "a bird.It is red..."


class Token(NamedTuple):
    """A word of a caption."""

    word: str  # lower case
    tag: str  # Penn Treebank tag
    kind: str  # its letter after all rules
    part: str  # "adjective", "noun" or ""
    lemma: str  # the node's word: the singular of a noun, otherwise the word


def parts_of_speech(tagged, speech):
    """The parts of speech of a sentence: the tagger's reading, corrected by RULES → list of Token.

    tagged: list of (word, Penn tag); speech: WordNetSpeech, or an object with its methods.
    """
    tagged = [(word.lower(), tag) for word, tag in tagged]
    kinds = "".join(kind_of(word, tag, speech) for word, tag in tagged)
    for letter, pattern, _ in RULES:
        kinds = re.sub(pattern, lambda match: re.sub("[BEGS]", letter, match[0]), kinds)
    tokens = []
    for (word, tag), kind in zip(tagged, kinds):
        part, lemma = "", word
        if kind == "A":
            part = "adjective"
        elif kind == "N" and (singular := speech.noun(word)):
            part, lemma = "noun", singular
        tokens.append(Token(word, tag, kind, part, lemma))
    return tokens


@functools.lru_cache(1 << 16)
def kind_of(word, tag, speech):
    """The letter of a tagged word before any rule."""
    if word in KINDS or not re.search("[a-z]", word):
        return KINDS.get(word) or KINDS.get(tag, "-")
    if tag[:2] in ("JJ", "RB", "VB") and not speech.lists(word, tag):
        tag = "NN"  # "a bright yellow belly", where the tagger takes the belly for an adverb
    if tag.startswith("JJ"):
        return "A"
    if tag in ("NNS", "NNPS"):
        return "S" if speech.mostly_verb(word) else "N"
    if tag.startswith("NN"):
        return "B" if speech.is_adjective(word) and not word.endswith("ing") else "N"
    if tag in ("VBN", "VBD", "VBG") and speech.is_adjective(word):
        return "G" if tag == "VBG" else "E"
    return KINDS.get(tag, "-")


class WordNetSpeech:
    """NLTK's tokenizer and tagger for words in context, WordNet for what a word may be."""

    name = "NLTK tagger and WordNet"

    def __init__(self):
        import nltk

        provide([NLTKData()], False, "python prior.py --embeddings corpus --download")
        from nltk.corpus import wordnet
        from nltk.tag.perceptron import PerceptronTagger

        with user_error("NLTK's data cannot be read: {}; download it again, and unpack the tagger's zip"):
            self.tagger = PerceptronTagger()
            adjectives, self.nouns, self.adverbs = (
                frozenset(wordnet.all_lemma_names(pos)) for pos in "anr"
            )
            frequencies = wordnet.open("cntlist.rev").read()
        self.adjectives = adjectives | {"rufous"}  # a colour of birds that WordNet 3.0 lacks
        self.counts = Counter()  # (word, "1" for a noun or "2" for a verb) → times in WordNet's texts
        for word, part, count in re.findall(r"(?m)^(\S+)%([12])\S* \d+ (\d+)", frequencies):
            self.counts[word, part] += int(count)
        self.tokenizer, self.split_sentences = nltk.NLTKWordTokenizer(), nltk.sent_tokenize
        self.wordnet, self.lemmatize = wordnet, nltk.WordNetLemmatizer().lemmatize

    def __reduce__(self):
        return WordNetSpeech, ()  # workers that are not forked load their own

    def __call__(self, caption):
        """Caption → list of sentences, each a list of Token."""
        sentences = [plain(caption)]
        if re.search(r"[.!?]\s+\S", sentences[0]):
            sentences = self.split_sentences(sentences[0])
        tagged = (self.tagger.tag(self.tokenizer.tokenize(sentence)) for sentence in sentences)
        return [parts_of_speech(sentence, self) for sentence in tagged]

    def is_adjective(self, word):
        """Whether a word may be an adjective; WordNet lists "in" and "on"."""
        return len(word) > 2 and word in self.adjectives and word not in QUANTIFIERS

    @functools.lru_cache(1 << 16)
    def noun(self, word):
        """Singular of a noun that WordNet lists, or None."""
        if word in PLURALS or not word.isalpha() or len(word) < 2:
            return PLURALS.get(word)
        lemma, shortest = self.wordnet.morphy(word, "n"), self.lemmatize(word, "n")  # of "pass": pass, pas
        if lemma != shortest and self.counts[lemma, "1"] < self.counts[shortest, "1"]:
            lemma = shortest
        return lemma if lemma in self.nouns and lemma not in QUANTIFIERS else None

    @functools.lru_cache(1 << 16)
    def verb(self, word):
        """Base form of a verb that WordNet lists, or None."""
        return self.wordnet.morphy(word, "v")

    def mostly_verb(self, word):
        """Whether a word is more often a verb than a noun."""
        return self.counts[self.verb(word), "2"] > self.counts[self.noun(word), "1"]

    def lists(self, word, tag):
        """Whether WordNet lists a word as its tag's adjective, adverb or verb."""
        if tag.startswith("JJ"):
            return self.is_adjective(word)
        return word in self.adverbs if tag.startswith("RB") else self.verb(word) is not None


class WordListSpeech:
    """Parts of speech by two lists of words, for text whose words are known in advance.

    Plurals in -s or -es are recognised.

    >>> speech = WordListSpeech(["small", "orange", "white"], ["bird", "breast", "belly"])
    >>> (sentence,) = speech("a small bird with an orange breast whose belly is white")
    >>> list(modifying_pairs(sentence))
    [('small', 'bird'), ('orange', 'breast'), ('white', 'belly')]
    """

    name = "word list"
    TAGS = {",": ",", ".": ".", "very": "RB", "is": "VBZ", "are": "VBP"}
    TAGS |= dict.fromkeys(("a", "an", "the", "this"), "DT") | {"its": "PRP$"}
    TAGS |= dict.fromkeys(("of", "in", "on", "with"), "IN")
    TAGS |= dict.fromkeys(("and", "or", "but"), "CC")

    def __init__(self, adjectives, nouns):
        self.adjectives, self.nouns = frozenset(adjectives), frozenset(nouns)

    def __call__(self, caption):
        """Caption → list of sentences, each a list of Token."""
        tagged = []
        for word in re.findall(r"[\w'-]+|[.,]", plain(caption).lower()):
            guess = "JJ" if word in self.adjectives else "NN" if self.noun(word) else "X"
            tagged.append((word, self.TAGS.get(word, guess)))
        return [parts_of_speech(tagged, self)]

    def is_adjective(self, word):
        return word in self.adjectives

    def noun(self, word):
        singulars = word, word.removesuffix("s"), word.removesuffix("es")
        return next((singular for singular in singulars if singular in self.nouns), None)

    def lists(self, word, tag):
        return True

    def mostly_verb(self, word):
        return False


# ======== Modifying pairs: the edges of the graph

EDGES = (  # adjectives and the noun that they modify, over letters as above; an example
    (r"(?P<adjectives>A(?:[C,]*A)*)N*(?P<noun>N)", "a SMALL, BROWN water BIRD"),
    (rf"(?P<noun>N)WK(?P<adjectives>{LIST.format('A')})", "a bird with a BELLY that is WHITE"),
    (rf"(?P<noun>N)(?:P[Da]?A*N+)?K(?P<adjectives>{LIST.format('A')})", "the BELLY of the bird is WHITE"),
)


def modifying_pairs(tokens):
    """Yield (adjective, noun) for every adjective of a sentence that modifies a noun."""
    kinds = "".join(token.kind for token in tokens)
    for pattern, _ in EDGES:
        for match in re.finditer(pattern, kinds):
            noun = tokens[match.start("noun")]
            for token in tokens[slice(*match.span("adjectives"))]:
                if token.part == "adjective" and noun.part:
                    yield token.lemma, noun.lemma


# ======== Counting

@dataclass
class Counts:
    """What a corpus holds."""

    captions: int = 0
    words: Counter = field(default_factory=Counter)  # (lemma, part) → times seen
    pairs: Counter = field(default_factory=Counter)  # (adjective, noun) → times modified
    contexts: Counter = field(default_factory=Counter)  # (lemma, lemma), sorted → times near each other


def count_captions(captions, speech, contexts=False):
    """Counts of the words and modifying pairs of captions, and of neighbours if `contexts` → Counts."""
    counts = Counts()
    for caption in captions:
        counts.captions += 1
        for tokens in speech(caption):
            counts.words.update((token.lemma, token.part) for token in tokens if token.part)
            counts.pairs.update(modifying_pairs(tokens))
            lemmas = [token.lemma for token in tokens if token.part and contexts]
            for i, lemma in enumerate(lemmas):
                near = lemmas[i + 1 : i + 1 + WINDOW]
                counts.contexts.update(tuple(sorted((lemma, other))) for other in near)
    return counts


def count_corpus(captions, speech, contexts=False, workers=CORES):
    """`count_captions` over all cores → Counts, which do not depend on the number of workers.

    Raises UserError if a worker is killed, or if no adjective or noun is found.
    """
    captions = list(captions)
    chunks = [captions[first : first + CHUNK] for first in range(0, len(captions), CHUNK)]
    if workers == 1:
        total = add_counts(count_captions(chunk, speech, contexts) for chunk in chunks)
    else:
        killed = "a process that tagged captions was killed, perhaps for its memory; give fewer --workers"
        pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(speech, contexts))
        with user_error(killed, BrokenProcessPool), pool:
            total = add_counts(pool.map(_count_chunk, chunks))
    if not total.words:
        raise UserError(f"no adjective or noun in {total.captions:,} captions; is it English text?")
    return total


def add_counts(counted):
    """The sum of an iterable of Counts, with a line of progress → Counts."""
    total, progress = Counts(), Progress()
    for counts in counted:
        total.captions += counts.captions
        total.words.update(counts.words)
        total.pairs.update(counts.pairs)
        total.contexts.update(counts.contexts)
        progress(f"tagging: {total.captions:,} captions, {len(total.pairs):,} pairs")
    return total


def _start_worker(*job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _count_chunk.job = job


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _count_chunk(captions):
    return count_captions(captions, *_count_chunk.job)


# ======== Language models
# Each is a function (words, weights, dim, counts). words: {part of speech: list}; weights, dim: the flags.
# It returns {part: {word: (d,) float32}}, without the words that have no vector.

def glove_vectors(words, weights, dim, counts):
    """Vectors of GloVe's text, `word v1 … vd` a line; of a .zip, those of `dim` (0: 100) dimensions.

    Raises UserError if the file is missing, a row has another length, or a number is not finite.
    """
    wanted, vectors, width = set().union(*words.values()), {}, 0
    with user_error(f"vectors '{weights}' cannot be read: {{}}"):
        for number, line in enumerate(glove_lines(weights, dim), 1):
            line = line.rstrip()
            if number == 1 and re.fullmatch(r"\d+ \d+", line):  # word2vec's header
                continue
            width = width or line.count(" ")
            word, *values = line.rsplit(" ", width)  # from the right: a word may contain spaces
            if len(values) != width or not width:
                raise ValueError(f"line {number} is not a word and {width} numbers")
            if word in wanted:
                vectors[word] = np.array(values, dtype=np.float32)
                if not np.isfinite(vectors[word]).all():
                    raise ValueError(f"line {number} ('{word}') holds a number that is not finite")
        if dim not in (0, width):
            raise ValueError(f"it has {width} dimensions, --dim asks for {dim}")
    return dict.fromkeys(PARTS, vectors)


def glove_lines(weights, dim):
    """Yield the lines of GloVe's text, or of one text in its .zip."""
    if not weights.endswith(".zip"):
        with open(weights, encoding="utf-8", newline="\n") as stream:
            yield from stream
        return
    with zipfile.ZipFile(weights) as archive:
        members = [name for name in archive.namelist() if name.endswith(f".{dim or 100}d.txt")]
        if len(members) != 1:
            raise ValueError(f"{len(members)} files of {dim or 100} dimensions inside; give --dim")
        with archive.open(members[0]) as stream:
            yield from io.TextIOWrapper(stream, encoding="utf-8", newline="\n")


def corpus_vectors(words, weights, dim, counts):
    """Vectors of the corpus itself, without a download: positive PMI, then a truncated SVD.

    PPMI(w, c) = max(0, log P(w, c) / (P(w) P(c)^¾ normalised)), factored as U Σ Vᵀ; a word is its row
    of U Σ^½. Words and contexts are the codebooks' own (Levy & Goldberg 2014; ¾: Levy et al. 2015).

    Raises UserError if fewer than three words have neighbours, or no more than `dim`.
    """
    codes = sorted(set().union(*words.values()))
    index = {word: i for i, word in enumerate(codes)}
    near = np.zeros((len(codes), len(codes)))  # times that two words are near each other
    for (word, other), count in counts.contexts.items():
        if word in index and other in index:
            near[index[word], index[other]] += count
    near = near + near.T
    kept = np.flatnonzero(near.sum(axis=0))
    if len(kept) < max(3, dim + 1):
        raise UserError(
            f"{len(kept)} words have neighbours, too few; "
            "give prior.py a larger corpus or a lower --min-count"
        )
    near = near[kept][:, kept]
    frequency = near.sum(axis=0)
    smoothed = frequency**0.75 / (frequency**0.75).sum()  # lifts the PMI of rare contexts less
    with np.errstate(divide="ignore"):
        ppmi = np.maximum(np.log(near / (frequency[:, None] * smoothed)), 0)
    dim = dim or min(100, len(kept) - 1)
    u, s, _ = np.linalg.svd(ppmi)
    vectors = u[:, :dim] * np.sqrt(s[:dim])
    largest = np.abs(vectors).round(6).argmax(axis=0)  # rounded, as two may be equal
    vectors *= np.sign(vectors[largest, np.arange(dim)])  # the SVD's sign is arbitrary
    return dict.fromkeys(PARTS, dict(zip((codes[i] for i in kept), vectors.astype(np.float32))))


def bert_vectors(words, weights, dim, counts):
    """The rows of BERT's token table for words that are one token.

    weights: a Hugging Face folder with vocab.txt and pytorch_model.bin.
    """
    with user_error(f"'{weights}' is no folder with vocab.txt and pytorch_model.bin: {{}}"):
        tokens = (Path(weights) / "vocab.txt").read_text(encoding="utf-8").split("\n")
        rows = {token: row for row, token in enumerate(tokens)}
        return token_vectors(words, rows, read_tensors(Path(weights) / "pytorch_model.bin"))


def clip_vectors(words, weights, dim, counts):
    """The rows of the token table of CLIP ViT-B/32, the paper's choice, for words that are one token.

    weights: a Hugging Face folder with the files of CLIP_FILES; by default what --download fetched.
    """
    return token_vectors(words, *clip_files(weights))


def clip_files(weights):
    """CLIP ViT-B/32's whole-word tokens, a dict word → row, and its tensors by name."""
    if weights:
        vocabulary, model = (Path(weights) / name for name in CLIP_FILES)
    else:
        vocabulary, model = (file.get() for file in clip_needs())
    with user_error(f"'{vocabulary.parent}' is no folder with {' and '.join(CLIP_FILES)}: {{}}"):
        rows = json.loads(vocabulary.read_text(encoding="utf-8"))
        whole = {token.removesuffix("</w>"): row for token, row in rows.items() if token.endswith("</w>")}
        return whole, read_tensors(model)


def token_vectors(words, rows, tensors):
    """The rows of a model's token table for words; words of several tokens have none (§3.3 step 1)."""
    pattern = r"(^|\.)(token_embedding|word_embeddings)\.weight$"
    tables = [value.float().numpy() for name, value in tensors.items() if re.search(pattern, name)]
    if len(tables) != 1:
        raise UserError(f"the weights hold {len(tables)} tables of token embeddings, not one")
    return {part: {word: tables[0][rows[word]] for word in words[part] if word in rows} for part in PARTS}


def clip_text_vectors(words, weights, dim, counts):
    """CLIP's features of "a photo of ADJECTIVE object" or "a photo of NOUN", for words that are one token.

    The authors' code takes them, also for words of several tokens. weights: as for clip_vectors.
    """
    import torch

    rows, tensors = clip_files(weights)
    tensors = {name: value.float() for name, value in tensors.items() if name.startswith("text_")}
    start, end = 49406, 49407
    before = [start, *(rows[word] for word in ("a", "photo", "of"))]
    after = {"adjective": [rows["object"], end], "noun": [end]}
    vectors = {part: {} for part in PARTS}
    for part, listed in words.items():
        single = [word for word in listed if word in rows]
        for first in range(0, len(single), 256):
            batch = single[first : first + 256]
            prompts = torch.tensor([[*before, rows[word], *after[part]] for word in batch])
            vectors[part].update(zip(batch, clip_text_features(prompts, tensors).numpy()))
    return vectors


def clip_text_features(prompts, tensors):
    """CLIP's text features (N, D) of prompts (N, T), token indices that end in the end token.

    The text tower of Radford et al. 2021, with heads of 64 channels and the activation x·σ(1.702 x).

    tensors: float32, named as in Hugging Face's CLIPModel.
    """
    import torch.nn.functional as F

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    table = tensors["text_model.embeddings.token_embedding.weight"]
    positions = tensors["text_model.embeddings.position_embedding.weight"]
    x = table[prompts] + positions[: prompts.shape[1]]  # (N, T, W)
    layers = "text_model.encoder.layers."
    depth = sum(name.startswith(layers) and name.endswith("mlp.fc1.weight") for name in tensors)
    for block in (f"{layers}{i}" for i in range(depth)):
        normed = norm(f"{block}.layer_norm1", x)
        query, key, value = (
            linear(f"{block}.self_attn.{name}_proj", normed).unflatten(-1, (-1, 64)).transpose(1, 2)
            for name in "qkv"
        )  # (N, heads, T, 64) each
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + linear(f"{block}.self_attn.out_proj", attended.transpose(1, 2).flatten(2))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.layer_norm2", x))  # (N, T, 4 W)
        x = x + linear(f"{block}.mlp.fc2", hidden * (1.702 * hidden).sigmoid())
    return F.linear(norm("text_model.final_layer_norm", x[:, -1]), tensors["text_projection.weight"])


LANGUAGE_MODELS = {  # --embeddings: to add one, write a function as above, and a line here
    "clip": clip_vectors,
    "clip-text": clip_text_vectors,
    "glove": glove_vectors,
    "bert": bert_vectors,
    "corpus": corpus_vectors,
}
CLIP_URL = (
    "https://huggingface.co/openai/clip-vit-base-patch32/resolve/"
    "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268/"  # one revision of the repository
)
CLIP_FILES = {  # name → size, sha256
    "vocab.json": ("0.9 MB", "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"),
    "pytorch_model.bin": ("605 MB", "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"),
}


def clip_needs():
    """CLIP's vocabulary and weights → list of PublishedFile."""
    local = "--prior FILE.npz, made by python prior.py CORPUS --weights DIR --out FILE.npz"
    return [
        PublishedFile(
            f"CLIP's {name}", size, CLIP_URL + name, local, f"clip-vit-base-patch32-{name}", sha256
        )
        for name, (size, sha256) in CLIP_FILES.items()
    ]


def language_needs(embeddings, weights=""):
    """What must be downloaded for a prior of a language model → list of Need."""
    of_clip = embeddings in ("clip", "clip-text") and not weights
    return [NLTKData(), *(clip_needs() if of_clip else [])]


# ======== The prior

@dataclass
class Prior:
    """Nodes P = [P_a ; P_n] and edges A of the modifying graph; `prior["edges"]` is `prior.edges`."""

    adjective_words: np.ndarray  # (Na,) str
    adjective_vectors: np.ndarray  # (Na, d) float32
    noun_words: np.ndarray  # (Nn,) str
    noun_vectors: np.ndarray  # (Nn, d) float32
    edges: np.ndarray  # (E, 2) int64, adjective and noun index
    edge_counts: np.ndarray  # (E,) int64, times the pair occurs
    provenance: dict  # what it was made from

    def __getitem__(self, name):
        return getattr(self, name)

    def save(self, path):
        """Write the .npz, whole or not at all."""
        arrays = {**vars(self), "provenance": json.dumps(self.provenance)}
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path):
        """The Prior that `save` wrote. Raises UserError if the file is missing or no prior."""
        advice = "make one with: python prior.py CORPUS --out prior.npz"
        with user_error(f"'{path}' is no prior: {{}}; {advice}"):
            with np.load(path, allow_pickle=False) as file:
                arrays = {item.name: file[item.name] for item in fields(cls)}
            arrays["provenance"] = json.loads(str(arrays["provenance"]))
            prior = cls(**arrays)
            prior.check()
            return prior

    def check(self):
        """Raise ValueError if the arrays do not fit each other, or a vector is not finite."""
        for part in PARTS:
            words, vectors = self[f"{part}_words"], self[f"{part}_vectors"]
            if vectors.shape != (len(words), self.noun_vectors.shape[-1]):
                raise ValueError(f"its {part}s do not have a vector each, of one length")
            if not np.isfinite(vectors).all():
                raise ValueError(f"a vector of its {part}s is not finite")
        if self.edges.shape != (len(self.edge_counts), 2):
            raise ValueError("its edges are not pairs with a count each")
        sizes = len(self.adjective_words), len(self.noun_words)
        if (self.edges < 0).any() or (self.edges >= sizes).any():
            raise ValueError("one of its edges names no adjective or no noun")

    def tensors(self):
        """The arrays as tensors and lists of strings, which a checkpoint may hold → dict."""
        import torch

        return {
            name: x.tolist() if x.dtype.kind == "U" else torch.from_numpy(x)
            for name, x in vars(self).items()
            if name != "provenance"
        }


def build_prior(
    captions, speech=None, embeddings="clip", weights="", min_count=10, dim=0, workers=CORES, name=""
):
    """The prior of captions: step 1, and the graph of step 2 → Prior.

    captions: iterable of str; speech: by default WordNetSpeech, which needs NLTK's data.
    embeddings: one of LANGUAGE_MODELS; weights, dim: its files, and the dimensions of its vectors.
    min_count: times a word must occur in its part of speech to become a code (the authors: more than 10).
    name: of the corpus, for the provenance.
    Raises UserError if no adjective or no noun is left, or a language model's file cannot be read.
    """
    speech, vectors_of = speech or WordNetSpeech(), LANGUAGE_MODELS[embeddings]
    captions = list(captions)
    counts = count_corpus(captions, speech, embeddings == "corpus", workers)
    seen = frequent_words(counts, min_count)
    vectors = vectors_of(seen, weights, dim, counts)
    words, arrays = {}, {}
    for part in PARTS:
        words[part] = [word for word in seen[part] if np.any(vectors[part].get(word, 0))]
        if not words[part]:
            raise UserError(
                f"no {part} is left: {len(seen[part])} are seen at least {min_count} times, none of them "
                f"with a vector of {embeddings}; give prior.py more English captions or a lower --min-count"
            )
        arrays[f"{part}_words"] = np.array(words[part])
        arrays[f"{part}_vectors"] = np.stack([vectors[part][word] for word in words[part]])
    provenance = {
        "corpus": name,
        "captions": counts.captions,
        "made_from": made_from(captions, embeddings, min_count),
        "weights": weights,
        "without_vector": {part: len(seen[part]) - len(words[part]) for part in PARTS},
        "part_of_speech": speech.name,
    }
    edges, edge_counts = edges_between(words, counts.pairs)
    return Prior(**arrays, edges=edges, edge_counts=edge_counts, provenance=provenance)


def made_from(captions, embeddings, min_count):
    """What decides a prior's words and edges: it is made again where this differs → dict."""
    return {
        "captions_sha256": text_checksum(captions),
        "embeddings": embeddings,
        "min_count": min_count,
        "rules_sha256": text_checksum(map(str, [*RULES, *EDGES, LETTERS, PLURALS])),
    }


def frequent_words(counts, min_count):
    """The words of each part that occur often enough, the most frequent first → dict part → list."""
    often = [(-count, *word) for word, count in counts.words.items() if count >= min_count]
    return {part: [word for _, word, other in sorted(often) if other == part] for part in PARTS}


def edges_between(words, pairs):
    """Edges (E, 2) between listed words, and the count of each (E,): A_ij = 1 where i modifies j."""
    adjectives, nouns = ({word: i for i, word in enumerate(words[part])} for part in PARTS)
    edges = sorted(
        (adjectives[adjective], nouns[noun], count)
        for (adjective, noun), count in pairs.items()
        if adjective in adjectives and noun in nouns
    )
    edges = np.array(edges, dtype=np.int64).reshape(-1, 3)
    return edges[:, :2], edges[:, 2]


def describe_codebook(prior):
    """A prior's sizes and bits beside the authors' → str."""
    adjectives, nouns = len(prior.adjective_words), len(prior.noun_words)
    return (
        f"{adjectives:,} adjectives + {nouns:,} nouns, {math.log2(adjectives * nouns):.1f} bits "
        "per position (the authors: 1,949 + 4,258, 23.0 bits)"
    )


def shuffled(prior, what, seed=0):
    """A control: the same Prior with its vectors permuted, or its edges rewired.

    what: "vectors" (permuted within each part of speech), "edges" (each word keeps its number) or "none".
    """
    rng = np.random.default_rng(seed)
    if what == "none":
        return prior
    if what == "vectors":
        changed = {f"{part}_vectors": rng.permutation(prior[f"{part}_vectors"]) for part in PARTS}
    else:
        changed = {"edges": rewired(prior.edges, rng)}
    return replace(prior, **changed, provenance={**prior.provenance, "shuffled": what})


def rewired(edges, rng, rounds=100):
    """(E, 2) edges → (E, 2) of the same degrees, by double edge swaps (Maslov & Sneppen 2002).

    Each round pairs the edges at random. A pair exchanges its nouns unless an edge would be there twice.
    """
    edges, nouns = edges.copy(), int(edges[:, 1].max(initial=0)) + 1
    half = len(edges) // 2
    for _ in range(rounds):
        first, second = rng.permutation(len(edges))[: 2 * half].reshape(2, half)
        crossed = [edges[a, 0] * nouns + edges[b, 1] for a, b in ((first, second), (second, first))]
        new, position, repeats = np.unique(
            np.concatenate(crossed), return_inverse=True, return_counts=True
        )
        free = (repeats == 1) & ~np.isin(new, edges @ [nouns, 1])
        free = free[position].reshape(2, half).all(axis=0)
        first, second = first[free], second[free]
        edges[first, 1], edges[second, 1] = edges[second, 1], edges[first, 1]
    return edges


# ======== prior.py show

EXAMPLES = {"adjective": ("orange", "yellow", "blue"), "noun": ("breast", "belly", "wheel")}  # Fig. 1
CAPTION = "this small brown bird has a bright orange breast and a short black beak."


def examples(words, part):
    """The words of the paper's Fig. 1 in a list of one part of speech, or the list's first three."""
    shared = [word for word in EXAMPLES[part] if word in words]
    return shared if len(shared) > 1 else words[:3]


def nearest_words(words, vectors, word, count):
    """The `count` words of largest cosine similarity to `word` → list of (word, cosine)."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit[list(words).index(word)]
    order = [i for i in np.argsort(-cosine, kind="stable") if words[i] != word]
    return [(str(words[i]), float(cosine[i])) for i in order[:count]]


def show_prior(prior, caption):
    """Print a prior's sizes, its most frequent pairs, some words and what becomes of a caption."""
    print(f"{describe_codebook(prior)}\n{len(prior.edges):,} edges")
    for key, value in prior.provenance.items():
        print(f"  {key}: {json.dumps(value)}")
    print("\nmost frequent pairs")
    for i in np.argsort(-prior.edge_counts, kind="stable")[:20]:
        adjective, noun = prior.edges[i]
        pair = f"{prior.adjective_words[adjective]} {prior.noun_words[noun]}"
        print(f"  {prior.edge_counts[i]:8,}  {pair}")
    for part in PARTS:
        print(f"\n{part}s")
        words, vectors = prior[f"{part}_words"].tolist(), prior[f"{part}_vectors"]
        for word in examples(words, part):
            near = [f"{name} {cosine:.2f}" for name, cosine in nearest_words(words, vectors, word, 6)]
            print(f"  {word}: near {', '.join(near)}")
    show_caption(prior, caption)


def show_caption(prior, caption):
    """Print what a caption becomes: tags, parts of speech, nodes and modifying pairs."""
    words = {part: prior[f"{part}_words"].tolist() for part in PARTS}
    listed = prior.provenance.get("part_of_speech") == WordListSpeech.name
    speech = WordListSpeech(*words.values()) if listed else WordNetSpeech()
    print(f"\n{caption}\n  {'word':16} {'tag':6} {'part of speech':15} node")
    for tokens in speech(caption):
        for token in tokens:
            node = f"{token.part} ({token.lemma})" if token.lemma in words.get(token.part, ()) else "-"
            print(f"  {token.word:16} {token.tag:6} {token.part or '-':15} {node}")
        for adjective, noun in modifying_pairs(tokens):
            kept = adjective in words["adjective"] and noun in words["noun"]
            print(f"  {adjective} → {noun}" + ("" if kept else "   (not both are nodes)"))


# ======== Command line

def parse(argv):
    """The flags of `prior.py CORPUS…`, or of `prior.py show PRIOR`."""
    if argv[:1] == ["show"]:
        parser = Parser(prog="prior.py show", description="Print what a prior holds.")
        parser.add_argument("prior", metavar="PRIOR", help="a .npz file of prior.py")
        parser.add_argument("--caption", default=CAPTION, help="caption whose words and pairs to print")
        return parser.parse_args(argv[1:])
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("captions").add_argument
    add("corpora", nargs="*", metavar="CORPUS", help="a file of captions, or a folder of .txt files")
    add("--min-count", type=bounded(int, 1), default=10, help="times a word must occur (default: 10)")
    add("--workers", type=bounded(int, 1), default=CORES, help=f"processes that tag (default: {CORES})")
    add = parser.add_argument_group("vectors").add_argument
    add("--embeddings", choices=LANGUAGE_MODELS, default="clip", help="language model (default: clip, the "
        "paper's); corpus: PPMI and SVD of the captions")
    add("--weights", default="", help="glove: its text or zip; clip, clip-text, bert: a Hugging Face folder")
    add("--dim", type=bounded(int, 0), default=0, help="dimensions of corpus or glove's zip (default: 100)")
    add("--download", action="store_true", help="download NLTK's data (17 MB) and CLIP (606 MB) if missing")
    add = parser.add_argument_group("output").add_argument
    add("--out", default="prior.npz", help="file to write (default: prior.npz)")
    args = parser.parse_args(argv)
    if not args.corpora and not args.download:
        parser.error("name a CORPUS")
    if args.embeddings in ("glove", "bert") and not args.weights:
        parser.error(f"--embeddings {args.embeddings} needs --weights")
    for flag, models in (("weights", ("corpus",)), ("dim", ("clip", "clip-text", "bert"))):
        if getattr(args, flag) and args.embeddings in models:
            parser.error(f"--{flag} has no effect on --embeddings {args.embeddings}")
    for path in (*args.corpora, args.weights):
        if not Path(path).exists():
            parser.error(f"'{path}' does not exist")
    if Path(args.out).exists() and args.corpora:
        parser.error(f"--out {args.out} exists; delete it, or name another")
    return args


def main(argv=None):
    """Build a prior, or show one."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if argv[:1] == ["show"]:
        show_prior(Prior.load(args.prior), args.caption)
        return
    again = shlex.join(["python", "prior.py", *argv, "--download"])
    provide(language_needs(args.embeddings, args.weights), args.download, again)
    if not args.corpora:
        return
    options = args.embeddings, args.weights, args.min_count, args.dim, args.workers, " ".join(args.corpora)
    prior = build_prior(read_corpora(args.corpora), None, *options)
    prior.save(args.out)
    lost = sum(prior.provenance["without_vector"].values())
    print(f"{args.out}: {describe_codebook(prior)}")
    print(f"{len(prior.edges):,} edges; {lost:,} words have no vector of {args.embeddings}")


# ======== Helpers for all scripts: errors and the command line

class UserError(ValueError):
    """An error of what the user gave. Its message says what is wrong, and what to do."""


@contextmanager
def user_error(message, *kinds):
    """A block whose errors become UserError(message), where the error's first line replaces `{}`.

    kinds: classes of errors; all by default.
    """
    try:
        yield
    except (UserError, MemoryError):  # a lack of memory is no fault of what the user gave
        raise
    except kinds or Exception as error:
        line = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(message.replace("{}", line)) from None


SHORTAGE = "out of memory|allocate|too many open files|DataLoader worker"  # in errors of several classes


def command(main):
    """Run a script's `main`, then end with status 2 and one line for a user's error.

    A lack of memory, files or workers ends the same way; a signal ends it with 128 + its number.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _end(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack ℓ and β
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = str(error).strip() or "out of memory"
        of_user = isinstance(error, UserError)
        if message.startswith("Caught "):  # by a loader, with the traceback of its worker
            message = re.sub(r"^\S*Error: ", "", message.splitlines()[-1])
        elif not of_user:
            message = message.splitlines()[0]
        short = not of_user and re.search(SHORTAGE, message, re.IGNORECASE)
        if isinstance(error, RuntimeError) and not short:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        if short and not isinstance(error, MemoryError):
            _end(2)  # loaders would wait for their workers
        sys.exit(2)


def _end(status):
    """End without cleaning up: what is half written is NAME.part, which the next write replaces."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def error(self, message):
        self.exit(2, f"error: {message}; see {self.prog} --help\n")

    def add_fields(self, kind, default_text=lambda name, value: value):
        """Add a flag for each field of a dataclass, --batch-size for batch_size, with its bounds and choices.

        Its own fields come before those that it inherits.
        default_text: (name, default) → how --help shows the default.
        """
        group = self
        for item in sorted(fields(kind), key=lambda item: item.name not in kind.__annotations__):
            more, value = item.metadata, item.default
            if "group" in more:
                group = self.add_argument_group(more["group"])
            default = "" if value in ("", ()) else f" (default: {default_text(item.name, value)})"
            text = more["reason"] + default
            flag = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))
            if isinstance(value, bool):
                flag["action"] = argparse.BooleanOptionalAction
            elif "each" in more:
                flag.update(type=more["each"], nargs="+", metavar="X")
            else:
                choices = more.get("choices")
                choices = choices() if callable(choices) else choices
                if not isinstance(value, str):
                    least = more.get("least", 0 if isinstance(value, float) else 1)
                    flag["type"] = bounded(type(value), least, more.get("most", 2**62))
                flag.update(choices=choices and tuple(choices), metavar=None if choices else "X")
            group.add_argument("--" + item.name.replace("_", "-"), **flag)


def bounded(kind, least, most=2**62):
    """For argparse: a type of a number, or of numbers such as 1,2,4, within bounds."""

    def value(text):
        number = tuple(map(int, text.split(","))) if kind is tuple else kind(text)
        for each in number if kind is tuple else (number,):
            if not least <= each <= most:
                raise argparse.ArgumentTypeError(f"{text} does not lie between {least} and {most}")
        return number

    value.__name__ = kind.__name__  # for argparse's message
    return value


# ======== Helpers for all scripts: files

@contextmanager
def atomic_write(path, folder=True):
    """A path NAME.part that replaces `path` when the block ends well; `folder`: make its folder."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is a folder or a device; name a file")
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def save_png(image, path):
    """Write a PIL image, whole or not at all. Raises UserError if the name does not end in .png."""
    if Path(path).suffix != ".png":
        raise UserError(f"'{path}' must end in .png")
    with atomic_write(path) as part:
        image.save(part, "PNG")


def list_files(root, suffixes, above=()):
    """Yield the files below a folder that end in one of the suffixes, in any case, sorted.

    Hidden ones and macOS's `__MACOSX` are left out. Linked folders are followed; `above`, the folders
    that this one lies in, ends loops of links. Raises UserError if there is no such folder.
    """
    real = os.path.realpath(root)
    if not os.path.isdir(real):
        raise UserError(f"no such folder: '{root}'")
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == "__MACOSX" or real in above:
            continue
        if entry.is_dir():
            yield from list_files(entry.path, suffixes, (*above, real))
        elif entry.name.lower().endswith(tuple(suffixes)) and entry.is_file():
            yield Path(entry.path)


def read_tensors(path):
    """The tensors of a published file, by name → dict. Raises UserError if it cannot be read."""
    import torch

    with user_error(f"weights '{path}' cannot be read: {{}}"):
        # Published VQGANs hold the state of this callback, a dict, under its class.
        callback = (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
        with torch.serialization.safe_globals([callback]):
            state = load_tensors(path)
        state = state.get("state_dict", state.get("model", state))
        return {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}


def load_tensors(file):
    """What torch.save wrote, on the CPU. Raises ValueError for objects, which `weights_only` refuses."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message is advice, with codes for a terminal
        fault = "it is damaged, or holds objects other than tensors, numbers and strings"
        raise ValueError(fault) from None


def text_checksum(lines):
    """The sha256 of strings, in hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checksum(path, kind):
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ======== Helpers for all scripts: downloads and progress

def download(url, path, digest):
    """Download a file with a progress bar and verify it. A failed download leaves nothing.

    digest: the published sha256 or its first digits, or an md5 of 32 digits.
    """
    import torch

    md5 = len(digest) == 32
    print(f"downloading {url}", file=sys.stderr, flush=True)
    with user_error(f"{url} is unavailable: {{}}; run the command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{path.name}.*.partial"):  # of a download that was killed
            stale.unlink()
        torch.hub.download_url_to_file(url, str(path), hash_prefix=None if md5 else digest)
        if md5 and checksum(path, "md5") != digest:
            path.unlink()
            raise ValueError("its md5 is not the published one")


@dataclass
class Need:
    """Something that a command needs. present() says whether it is there; fetch() downloads it."""

    what: str
    size: str  # "528 MB"
    source: str  # its URL, or the command that downloads it
    local: str  # how to point at a local copy


@dataclass
class PublishedFile(Need):
    """A file in torch hub's cache, whose place the variable TORCH_HOME sets."""

    name: str  # of the file in the cache
    sha256: str  # or the first digits of it

    @property
    def path(self):
        """Where it is, or will be."""
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def present(self):
        return self.path.is_file()

    def fetch(self):
        download(self.source, self.path, self.sha256)

    def get(self, again="add --download"):
        """Its path. Raises UserError if it is missing."""
        provide([self], False, again)
        return self.path


NLTK_RESOURCES = ("corpora/wordnet/", "taggers/averaged_perceptron_tagger_eng/", "tokenizers/punkt_tab/")


@dataclass
class NLTKData(Need):
    """NLTK's data, which decide the parts of speech."""

    what: str = "NLTK's tagger, tokenizer and WordNet"
    size: str = "17 MB"
    source: str = "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng punkt_tab"
    local: str = "NLTK_DATA=DIR"

    def present(self):
        import nltk

        try:
            return all(nltk.data.find(path) for path in NLTK_RESOURCES)
        except (LookupError, zipfile.BadZipFile):
            return False

    def fetch(self):
        import nltk

        with user_error(f"NLTK's data are unavailable: {{}}; run the command again, or set {self.local}"):
            for path in NLTK_RESOURCES:
                nltk.download(path.split("/")[1], raise_on_error=True)


def provide(needs, download, again):
    """Download what is missing of a list of Need, if `download`.

    Otherwise raises UserError that lists it; `again` tells there how to download it.
    """
    missing = [need for need in needs if not need.present()]
    for need in missing if download else ():
        need.fetch()
    if download or not missing:
        return
    lines = [
        f"{need.what} ({need.size}): {need.source}, or use a local copy: {need.local}" for need in missing
    ]
    lines.append(f"to download: {again}")
    raise UserError("missing: " + ("; " if len(missing) == 1 else "\n  ").join(lines))


class Progress:
    """One line that is rewritten on a terminal, and printed every ten seconds to a log."""

    def __init__(self):
        self.live, self.last = sys.stderr.isatty(), time.monotonic()

    def __call__(self, text, now=False):
        if now or time.monotonic() - self.last >= (0.2 if self.live else 10.0):
            self.last = time.monotonic()
            line = f"\r\033[K{text}" if self.live else text
            print(line, end="\n" if now or not self.live else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command(main)
