"""Adjective and noun codebooks of a language model, and the graph of which modifies which.

Paper §3.3, step 1 (codebook construction) and the first half of step 2 (the modifying graph): captions are tagged,
words that are not vision-related are dropped by their part of speech, each remaining word gets its language-model
vector, and A_ij = 1 where adjective i modifies noun j.

    python prior.py captions.txt --download --out prior.npz            CLIP's token vectors, the paper's choice
    python prior.py annotations/captions_train2017.json CUB_200_2011/text --embeddings glove --weights glove.6B.zip
    python prior.py show prior.npz --caption "a bright orange breast"

A corpus is text with a caption per line, a caption file of a public data set, or a folder of .txt files.
The result is one .npz that numpy reads without pickle.

The file reads: corpora, parts of speech, which adjective modifies which noun, counting, language models, the prior,
looking at it, the command line, and what other scripts share (errors, whole files, downloads, progress).
"""

import argparse
import csv
import difflib
import functools
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

PARTS = ("adjective", "noun")  # the two parts of speech, in the order of the codebooks everywhere
WINDOW = 5  # adjectives and nouns on each side that count as context of `corpus` vectors (Levy & Goldberg 2014)
LONGEST = 2000  # characters of a caption; a longer line is cut at white space
CHUNK = 2000  # captions a worker takes at a time, a third of a second's work
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# ======== Corpora

FORMS = (
    "text, a caption per line; Flickr's `name#k caption`; JSON or JSON lines: COCO's, Karpathy's, strings, or "
    "objects with a `caption`; a table with captions in its last column; each maybe .gz; or a folder of .txt"
)


def read_corpora(paths):
    """Yield the captions of corpora. Raises UserError for one without captions."""
    for path in paths:
        captions = read_captions(path)
        try:
            yield next(captions)
        except StopIteration:
            raise UserError(f"corpus '{path}' holds no caption; a corpus is {FORMS}") from None
        yield from captions


def read_captions(path):
    """Yield the captions of a file in one of FORMS, told by its content, or of a folder's .txt and .txt.gz.

    Raises UserError if it is missing or damaged, or neither UTF-8 nor UTF-16 with its mark.
    """
    path = Path(path).expanduser()
    for file in list_files(path, (".txt", ".txt.gz")) if path.is_dir() else [path]:
        with user_error(f"corpus '{file}' cannot be read: {{}}; a corpus is {FORMS}"):
            data = Path(regular(file)).read_bytes()
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
            captions = captions_of(data.decode("utf-16" if utf_16 else "utf-8-sig"))
        for caption in (" ".join(caption.split()) for caption in captions):
            long = len(caption) > LONGEST
            yield from filter(None, textwrap.wrap(caption, LONGEST, break_on_hyphens=False) if long else [caption])


def captions_of(text):
    """The captions of a file's text in one of FORMS, as a list. Raises ValueError for damaged JSON."""
    lines = [line for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if re.match(r'\s*[\[{]\s*[\[{"\]}]', text):
        try:
            return list(captions_in(json.loads(text)))
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
            return [caption for line in lines for caption in captions_in(json.loads(line))]
    for mark in "\t|,;":  # a table's first column holds names, numbers or URLs; so may its last
        row = ".*\t" if mark == "\t" else rf"[^\s{mark}]*[\d./:][^\s{mark}]*[{mark}]"
        if lines[1:] and all(re.match(row, line) for line in lines[1:20]):
            quoting = csv.QUOTE_NONE if mark in "\t|" else csv.QUOTE_MINIMAL
            rows = csv.reader((f"{line}\n" for line in lines), delimiter=mark, quoting=quoting)
            lines = [next(filter(is_text, reversed(row)), "") for row in rows]
            break
    return [re.sub(r"^\S+#\d+\s+", "", line) for line in lines]


def captions_in(value):
    """Yield the captions of a JSON value: its strings, and those under the keys that public data sets use."""
    if isinstance(value, str) and is_text(value):
        yield value
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(captions_in, value))
    elif isinstance(value, dict):
        for key in ("annotations", "images", "sentences", "captions", "caption", "raw", "text"):
            yield from captions_in(value.get(key))


def is_text(value):
    """Whether a string has several words, as a caption has and a name, number or URL has not."""
    return len(value.split()) > 1


# ======== From a caption to its adjectives and nouns: parts_of_speech; and to its edges: modifying_pairs
#
# Each word of a sentence is one letter, its kind, so that a rule of the grammar is a regular expression:
#
#   A  adjective                                      N  noun, or a word that WordNet does not list under its tag
#   B  noun that may be an adjective: "orange"        S  plural that is more often a verb: "walks"
#   E  participle that may be one too: "striped"      G  -ing form that may be one too: "flying"
#   -  any other word                                 the others: KINDS
#
# RULES settle B, S, E and G, in this order; EDGES then read the pairs. Each rule changes at least 5 in 1,000
# pairs of 2,500 captions of Flickr30k or of CUB; rules that changed fewer were left out.

KINDS = {"K": "is are was were", "W": "that which who", "a": "a an", "C": "CC", ",": ",", "P": "IN"}
KINDS |= {"R": "RB RBR RBS", "D": "DT PRP$"}  # words, or tags of the other words
KINDS = {word: kind for kind, words in KINDS.items() for word in words.split()}
LIST = "R*{0}(?:[C,]*{0})*"  # adjectives in a row: "very small, round and brown"
RULES = (  # new kind, where, an example
    ("-", r"(?<=[NBS])S(?=[PDa])", "a brown dog WALKS on grass"),
    ("A", "K" + LIST.format("(?:[AB]|E(?!P))"), "the bird is small, ROUND and brown"),
    ("A", r"E(?=[C,]?[ABENS])", "a zebra has STRIPED legs"),
    ("A", r"(?<=[Da])G(?=[ABNS])", "a FLYING bird"),
    ("A", r"B(?=[ABNS])", "a bright ORANGE breast"),
    ("A", r"(?<=[aP])B(?=CA)", "an ORANGE and black bird"),
    ("N", r"[BS]", "a ripe ORANGE"),
)
EDGES = (  # adjectives and the noun that they modify, an example
    (r"(?P<adjectives>A(?:[C,]*A)*)N*(?P<noun>N)", "a SMALL, BROWN water BIRD"),
    (rf"(?P<noun>N)WK(?P<adjectives>{LIST.format('A')})", "a bird with a BELLY that is WHITE"),
    (rf"(?P<noun>N)(?:P[Da]?A*N+)?K(?P<adjectives>{LIST.format('A')})", "the BELLY of the bird is WHITE"),
)
PLURALS = {"men": "man"} | {word: word for word in ("shorts", "glasses", "trunks")}  # not "short"
QUANTIFIERS = frozenset(
    "several many few more most much less other half both two three four five six seven".split()
)
INVISIBLE = (0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF)
ASCII = dict.fromkeys(INVISIBLE, "") | str.maketrans("‘’‛′‐", "''''-") | dict.fromkeys(map(ord, "–—―"), ", ")


def plain(text):
    """A caption's text without markup, emoji and typography, which hide where words and sentences end."""
    text = unicodedata.normalize("NFKC", html.unescape(text)).translate(ASCII)
    text = text.lower() if text.isupper() else text  # capitals are tagged as names
    text = re.sub(r"<[^<>]*>|[^\w\s!#-~]|(?<!\w)'(?!s\b|re\b)|'(?!\w)", " ", text)  # tags, emoji, U+FFFD, quotation marks
    text = re.sub(r"(?<=[^\W\d_])/(?=[^\W\d_])", " and ", text)  # "red/white"
    return re.sub(r"(?<=[a-z]{2})([.!?])(?:[.!?]+|(?=[^\W\d_]))", r"\1 ", text)  # "a bird.It is red..."


class Token(NamedTuple):
    """A word of a caption as the graph sees it."""

    word: str  # lower case
    tag: str  # Penn Treebank tag
    kind: str  # letter of the grammar
    part: str  # "adjective", "noun" or ""
    lemma: str  # the node's word: the singular of a noun, otherwise the word


def parts_of_speech(tagged, speech):
    """The adjectives and nouns among tagged words: the tagger's reading, corrected where it errs in captions.

    tagged: list of (word, Penn tag); speech: WordNetSpeech, or an object with its methods.
    Returns list of Token.
    """
    words, tags = [word.lower() for word, _ in tagged], [tag for _, tag in tagged]
    kinds = "".join(kind_of(word, tag, speech) for word, tag in zip(words, tags))
    for kind, pattern, _ in RULES:
        kinds = re.sub(pattern, lambda match: re.sub("[BSEG]", kind, match[0]), kinds)
    nouns = [speech.noun(word) if kind == "N" else None for word, kind in zip(words, kinds)]
    parts = ["adjective" if kind == "A" else "noun" if noun else "" for kind, noun in zip(kinds, nouns)]
    return [Token(*fields, noun or fields[0]) for *fields, noun in zip(words, tags, kinds, parts, nouns)]


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
    participle = {"VBN": "E", "VBD": "E", "VBG": "G"}.get(tag)
    return participle if participle and speech.is_adjective(word) else KINDS.get(tag, "-")


def modifying_pairs(tokens):
    """Yield (adjective, noun) for every adjective of a sentence that modifies a noun: edges of the graph."""
    kinds = "".join(token.kind for token in tokens)
    for match in itertools.chain.from_iterable(re.finditer(pattern, kinds) for pattern, _ in EDGES):
        noun = tokens[match.start("noun")]
        for token in tokens[slice(*match.span("adjectives"))] if noun.part else ():
            if token.part == "adjective":
                yield token.lemma, noun.lemma


NLTK_RESOURCES = ("corpora/wordnet", "taggers/averaged_perceptron_tagger_eng", "tokenizers/punkt_tab")
DAMAGED_NLTK = "NLTK's data cannot be read: {}; fetch it anew, unpack averaged_perceptron_tagger_eng.zip"


def missing_nltk():
    """Names of the NLTK resources that WordNetSpeech needs and NLTK does not find → list.

    Raises UserError if one is damaged, or is only where others may write, which NLTK refuses to read.
    """
    import nltk

    def lacks(path):
        try:
            return not nltk.data.find(path)
        except LookupError:
            return True

    with user_error(DAMAGED_NLTK), warnings.catch_warnings(record=True) as refusals:
        warnings.simplefilter("always")
        missing = [path for path in NLTK_RESOURCES if lacks(path) and lacks(f"{path}.zip")]
    if missing and refusals:
        raise UserError(f"{refusals[0].message} Or point NLTK_DATA at a copy of your own.")
    return [path.split("/")[1] for path in missing]


class WordNetSpeech:
    """NLTK's tokenizer and tagger for words in context, WordNet for what a word may be.

    Raises UserError where NLTK's data are missing, with the command that downloads them.
    """

    name = "NLTK tagger and WordNet"

    def __init__(self):
        import nltk

        provide([nltk_data()], False, "python prior.py --download")
        from nltk.corpus import wordnet
        from nltk.tag.perceptron import PerceptronTagger

        with user_error(DAMAGED_NLTK):
            self.tagger = PerceptronTagger()
            self.known = {pos: frozenset(wordnet.all_lemma_names(pos)) for pos in "anr"}
            senses = re.findall(r"^(\S+)%([12])\S* \d+ (\d+)", wordnet.open("cntlist.rev").read(), re.MULTILINE)
        self.counts = Counter()  # (word, "1" for a noun or "2" for a verb) → times in WordNet's texts
        for word, part, count in senses:
            self.counts[word, part] += int(count)
        self.known["a"] |= {"rufous"}  # a colour of birds that WordNet 3.0 lacks
        self.tagger.model = DensePerceptron(self.tagger.model)
        self.tokenizer, self.split_sentences = nltk.NLTKWordTokenizer(), nltk.sent_tokenize
        self.wordnet, self.lemmatize = wordnet, nltk.WordNetLemmatizer().lemmatize

    def __reduce__(self):
        return WordNetSpeech, ()  # workers that are not forked load their own

    def __call__(self, caption):
        """Caption → list of sentences, each a list of Token."""
        found, caption = [], plain(caption)
        for sentence in self.split_sentences(caption) if re.search(r"[.!?]\s+\S", caption) else [caption]:
            found.append(parts_of_speech(self.tagger.tag(self.tokenizer.tokenize(sentence)), self))
        return found

    def is_adjective(self, word):
        return len(word) > 2 and word in self.known["a"] and word not in QUANTIFIERS  # WordNet lists "in" and "on"

    @functools.lru_cache(1 << 16)
    def noun(self, word):
        """Singular of a noun WordNet knows, or None."""
        if word in PLURALS or not word.isalpha() or len(word) < 2:
            return PLURALS.get(word)
        first, shortest = self.wordnet.morphy(word, "n"), self.lemmatize(word, "n")  # of "pass": pass, pas
        lemma = first if first == shortest or self.counts[first, "1"] >= self.counts[shortest, "1"] else shortest
        return lemma if lemma in self.known["n"] and lemma not in QUANTIFIERS else None

    @functools.lru_cache(1 << 16)
    def verb(self, word):
        """Base form of a verb WordNet knows, or None."""
        return self.wordnet.morphy(word, "v")

    def mostly_verb(self, word):
        """Whether a word is more often a verb than a noun."""
        return self.counts[self.verb(word), "2"] > self.counts[self.noun(word), "1"]

    def lists(self, word, tag):
        """Whether WordNet lists the word in the part of speech of an adjective's, adverb's or verb's tag."""
        if tag.startswith("JJ"):
            return self.is_adjective(word)
        return word in self.known["r"] if tag.startswith("RB") else self.verb(word) is not None


class DensePerceptron:
    """NLTK's averaged perceptron with its weights in one matrix: the same tags in half the time."""

    def __init__(self, model):
        self.labels = sorted(model.classes, reverse=True)  # of equal scores NLTK takes the last label
        self.rows = {feature: row for row, feature in enumerate(model.weights)}
        self.weights = np.zeros((len(self.rows), len(self.labels)))
        column = {label: i for i, label in enumerate(self.labels)}
        for row, weights in zip(self.weights, model.weights.values()):
            row[[column[label] for label in weights]] = list(weights.values())

    def predict(self, features, return_conf=False):
        """Features that are present → (label, None), as NLTK expects a confidence too."""
        rows = [self.rows[feature] for feature in features if feature in self.rows]
        return self.labels[self.weights[rows].sum(axis=0).argmax()], None


class WordListSpeech:
    """Parts of speech by two lists of words, for text whose language is known in advance.

    adjectives, nouns: words; a noun's plural in -s or -es is recognised, others through `plurals`.
    plurals: irregular plural → singular.

    >>> speech = WordListSpeech(["small", "orange", "white"], ["bird", "breast", "belly"])
    >>> (sentence,) = speech("a small bird with an orange breast whose belly is white")
    >>> list(modifying_pairs(sentence))
    [('small', 'bird'), ('orange', 'breast'), ('white', 'belly')]
    """

    name = "word list"
    TAGGED = "and/CC or/CC but/CC ,/, ./. a/DT an/DT the/DT this/DT its/PRP$ very/RB of/IN in/IN on/IN with/IN is/VBZ"
    TAGS = dict(word.split("/") for word in [*TAGGED.split(), "are/VBP"])

    def __init__(self, adjectives, nouns, plurals=None):
        self.adjectives, self.nouns, self.plurals = frozenset(adjectives), frozenset(nouns), dict(plurals or {})

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
        singulars = (word, self.plurals.get(word), word.removesuffix("s"), word.removesuffix("es"))
        return next((singular for singular in singulars if singular in self.nouns), None)

    def lists(self, word, tag):
        return True

    def mostly_verb(self, word):
        return False


# ======== Counting a corpus

@dataclass
class Counts:
    """Counts of a corpus."""

    captions: int = 0
    words: Counter = field(default_factory=Counter)  # (lemma, part) → times seen
    pairs: Counter = field(default_factory=Counter)  # (adjective, noun) → times modified
    contexts: Counter = field(default_factory=Counter)  # (lemma, lemma) in sorted order → times near each other


def count_captions(captions, speech, contexts=False):
    """Tag captions, count their words and modifying pairs and, if asked, words within WINDOW of each other → Counts."""
    counts = Counts()
    for caption in captions:
        counts.captions += 1
        for tokens in speech(caption):
            counts.words.update((token.lemma, token.part) for token in tokens if token.part)
            counts.pairs.update(modifying_pairs(tokens))
            if contexts:
                lemmas = [token.lemma for token in tokens if token.part]
                for i, lemma in enumerate(lemmas):
                    near = lemmas[i + 1 : i + 1 + WINDOW]
                    counts.contexts.update((lemma, other) if lemma < other else (other, lemma) for other in near)
    return counts


def _start_worker(*job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _count_chunk.job = job


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _count_chunk(captions):
    return count_captions(captions, *_count_chunk.job)


def count_corpus(captions, speech, contexts=False, workers=CORES):
    """`count_captions` over all cores; the result does not depend on their number.

    Raises UserError if a worker is killed or lacks memory, or no adjective or noun is found.
    """
    captions, total, progress, began = iter(captions), Counts(), Progress(), time.monotonic()
    chunks = list(iter(lambda: list(itertools.islice(captions, CHUNK)), []))
    with ExitStack() as stack:
        parts = (count_captions(chunk, speech, contexts) for chunk in chunks)
        if workers > 1:
            ended = "a process that tagged captions was killed or lacked memory; give fewer --workers"
            stack.enter_context(user_error(ended, BrokenProcessPool, MemoryError))
            pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(speech, contexts))
            parts = stack.enter_context(pool).map(_count_chunk, chunks)
        for counts in parts:
            total.captions += counts.captions
            for name in ("words", "pairs", "contexts"):
                getattr(total, name).update(getattr(counts, name))
            speed = total.captions / (time.monotonic() - began)
            progress(f"tagging: {total.captions:,} captions, {speed:,.0f}/s, {len(total.pairs):,} pairs")
    if not total.words:
        raise UserError(f"no adjective or noun in {total.captions:,} captions; is it English text, a caption per line?")
    return total


# ======== Language models
# Each is a function of (dict part → words, --weights, --dim, Counts) that gives dict part → dict word → (d,) float32,
# in which words may be missing

def glove_vectors(words, weights, dim, counts):
    """GloVe's text, `word v1 … vd` a line, as it is or in a .gz or .zip; of a zip's files, `dim` (0: 100) chooses one.

    Raises UserError for a missing file, a row of another length, or one of `words` without finite numbers.
    """
    wanted, vectors, width = set().union(*words.values()), {}, 0
    with user_error(f"vectors '{weights}' cannot be read: {{}}"), ExitStack() as stack:
        if weights.endswith(".zip"):
            archive = stack.enter_context(zipfile.ZipFile(weights))
            members = [name for name in archive.namelist() if name.endswith(".txt") and not is_hidden(name)]
            if len(members) > 1:
                members = [name for name in members if name.endswith(f".{dim or 100}d.txt")]
            if len(members) != 1:
                raise ValueError(f"{len(members)} files of {dim or 100} dimensions inside; choose one by --dim")
            stream = io.TextIOWrapper(archive.open(members[0]), encoding="utf-8-sig", newline="\n")
        else:
            stream = (gzip.open if weights.endswith(".gz") else open)(weights, "rt", encoding="utf-8-sig", newline="\n")
        for number, line in enumerate(stack.enter_context(stream), 1):
            line = line.rstrip()
            if not line or number == 1 and re.fullmatch(r"\d+ \d+", line):  # word2vec's header
                continue
            width = width or line.count(" ")
            word, *values = line.rsplit(" ", width)  # from the right: a word may contain spaces
            if len(values) != width or not width:
                raise ValueError(f"line {number} is not a word and {width or 'its'} numbers, as in GloVe's text")
            if not wanted:  # the caller only asks whether the file can be read
                break
            if word in wanted:
                vectors[word] = np.array(values, dtype=np.float32)
                if not np.isfinite(vectors[word]).all():
                    raise ValueError(f"line {number} ('{word}') holds a number that is not finite")
        if dim not in (0, width):
            raise ValueError(f"it has {width} dimensions, --dim asks for {dim}")
    return dict.fromkeys(PARTS, vectors)


def corpus_vectors(words, weights, dim, counts):
    """Word vectors of the corpus itself: positive PMI, then truncated SVD (Levy & Goldberg 2014; ¾: Levy et al. 2015).

    PPMI(w, c) = max(0, log P(w, c) / (P(w) P(c)^¾ normalised)), factored as U Σ Vᵀ; a word is its row of U Σ^½. Words
    and contexts are the codebooks' own. No download, and deterministic.

    Raises UserError if fewer than three words have neighbours, or no more than `dim`.
    """
    codes = sorted(set().union(*words.values()))
    index = {word: i for i, word in enumerate(codes)}
    near = [(index[a], index[b], n) for (a, b), n in sorted(counts.contexts.items()) if a in index and b in index]
    row, column, count = np.array(near, dtype=np.int64).reshape(-1, 3).T
    matrix = scipy.sparse.coo_array((count.astype(float), (row, column)), shape=(len(codes),) * 2).tocsr()
    matrix = matrix + matrix.T
    kept = np.flatnonzero(matrix.sum(axis=0))
    if len(kept) < max(3, dim + 1):
        raise UserError(f"{len(kept)} words have neighbours, too few; give prior.py a larger corpus or a lower --min-count")
    matrix = matrix[kept][:, kept].tocoo()
    frequency = matrix.sum(axis=0)
    smoothed = frequency**0.75 / (frequency**0.75).sum()  # lifts the PMI of rare contexts less
    pmi = np.log(matrix.data / (frequency[matrix.coords[0]] * smoothed[matrix.coords[1]]))
    ppmi = scipy.sparse.coo_array((np.maximum(pmi, 0), matrix.coords), shape=matrix.shape).tocsr()
    dim = dim or min(100, len(kept) - 1)
    if len(kept) <= 1000:  # the sparse solver starts at random where the matrix lacks rank, as small ones may
        u, s, _ = np.linalg.svd(ppmi.toarray())
    else:
        u, s, _ = scipy.sparse.linalg.svds(ppmi, k=dim, v0=np.ones(len(kept)))
        u, s = u[:, ::-1], s[::-1]
    vectors = u[:, :dim] * np.sqrt(s[:dim])
    largest = np.abs(vectors).round(6).argmax(axis=0)  # rounded, as two may be equal
    vectors *= np.sign(vectors[largest, np.arange(dim)])  # the SVD's sign is arbitrary
    return dict.fromkeys(PARTS, dict(zip((codes[i] for i in kept), vectors.astype(np.float32))))


def random_vectors(words, weights, dim, counts):
    """Standard normal vectors that depend on the word alone, a control (the paper's RI, Table 2)."""

    def draw(word):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(dim or 100, dtype=np.float32)

    return {part: {word: draw(word) for word in words[part]} for part in PARTS}


def bert_vectors(words, weights, dim, counts):
    """The rows of BERT's token table (or of its kin's) of those words that are one token.

    weights: a Hugging Face folder with vocab.txt and model.safetensors or pytorch_model.bin.
    """
    with user_error(f"'{weights}' is no folder with vocab.txt and model.safetensors or pytorch_model.bin: {{}}"):
        tokens = (Path(weights) / "vocab.txt").read_text(encoding="utf-8").split("\n")
        rows = {token: row for row, token in enumerate(tokens)}
        return token_vectors(words, rows, read_tensors(weights))


def clip_vectors(words, weights, dim, counts):
    """The rows of the token table of CLIP ViT-B/32, the paper's choice, of those words that are one token.

    weights: a Hugging Face folder with vocab.json and model.safetensors or pytorch_model.bin; "" for the cache.
    """
    return token_vectors(words, *clip_files(weights))


def clip_files(weights):
    """CLIP ViT-B/32's whole-word tokens, a dict word → row, and its tensors by name."""
    vocabulary, model = Path(weights) / "vocab.json", weights
    if not weights:
        vocabulary, model = (file.get() for file in clip_needs())
    with user_error(f"'{weights or vocabulary}' is not CLIP: {{}} (--weights is a folder with vocab.json and "
                    "model.safetensors or pytorch_model.bin)"):
        rows = json.loads(vocabulary.read_text(encoding="utf-8"))
        whole = {token.removesuffix("</w>"): row for token, row in rows.items() if token.endswith("</w>")}
        return whole, read_tensors(model)


def token_vectors(words, rows, tensors):
    """The rows of a model's token embeddings that words have; words of several tokens have none (§3.3 step 1)."""
    pattern = r"(^|\.)(token_embedding|word_embeddings)\.weight$"
    tables = [value.float().numpy() for name, value in tensors.items() if re.search(pattern, name)]
    if len(tables) != 1:
        raise UserError(f"the weights hold {len(tables)} tables of token embeddings, not one")
    return {part: {word: tables[0][rows[word]] for word in words[part] if word in rows} for part in PARTS}


def clip_text_vectors(words, weights, dim, counts):
    """CLIP's features of "a photo of ADJECTIVE object" or "a photo of NOUN", of those words that are one token.

    The authors' code takes these features of all its words, also of those that are several tokens.

    weights: as of clip_vectors.
    """
    import torch

    rows, tensors = clip_files(weights)
    tensors = {name: value.float() for name, value in tensors.items() if name.startswith("text_")}
    start, end, vectors, progress = 49406, 49407, {part: {} for part in PARTS}, Progress()
    with user_error(f"'{weights or 'the cache'}' is not CLIP, whose words have {{}}"):
        before = [start, *(rows[word] for word in ("a", "photo", "of"))]
        after = {"adjective": [rows["object"]], "noun": []}
    for part, listed in words.items():
        single = [word for word in listed if word in rows]
        for first in range(0, len(single), 256):
            batch = single[first : first + 256]
            prompts = torch.tensor([[*before, rows[word], *after[part], end] for word in batch])
            vectors[part].update(zip(batch, clip_text_features(prompts, tensors).numpy()))
            progress(f"encoding prompts: {len(vectors[part]):,} of {len(single):,} {part}s")
    return vectors


def clip_text_features(prompts, tensors):
    """CLIP's text features (N, D) of prompts (N, T), token indices of which the last is the end token.

    The text tower of Radford et al. 2021: pre-norm blocks with causal attention, heads of 64 channels, and the
    activation x·σ(1.702 x).

    tensors: float32, named as in Hugging Face's CLIPModel.
    """
    import torch.nn.functional as F

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    table, positions = (tensors[f"text_model.embeddings.{name}_embedding.weight"] for name in ("token", "position"))
    x = table[prompts] + positions[: prompts.shape[1]]  # (N, T, W)
    depth = sum(name.startswith("text_model.") and name.endswith("mlp.fc1.weight") for name in tensors)
    for block in (f"text_model.encoder.layers.{i}" for i in range(depth)):
        normed = norm(f"{block}.layer_norm1", x)
        parts = (linear(f"{block}.self_attn.{name}_proj", normed) for name in "qkv")
        query, key, value = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in parts)  # (N, heads, T, 64)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + linear(f"{block}.self_attn.out_proj", attended.transpose(1, 2).flatten(2))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.layer_norm2", x))  # (N, T, 4 W)
        x = x + linear(f"{block}.mlp.fc2", hidden * (1.702 * hidden).sigmoid())
    return F.linear(norm("text_model.final_layer_norm", x[:, -1]), tensors["text_projection.weight"])


CLIP_URL = (os.environ.get("HF_ENDPOINT", "https://huggingface.co") + "/openai/clip-vit-base-patch32/resolve/"
            "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268/")  # one revision of the repository
CLIP_FILES = {  # name → size, sha256
    "vocab.json": ("0.9 MB", "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"),
    "pytorch_model.bin": ("605 MB", "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"),
}


def clip_needs():
    """The published files of CLIP: its vocabulary and its weights → list of PublishedFile."""
    local = "python prior.py CORPUS --weights DIR"
    return [PublishedFile(f"CLIP's {name}", size, CLIP_URL + name, local, f"clip-vit-base-patch32-{name}", sha256)
            for name, (size, sha256) in CLIP_FILES.items()]


LANGUAGE_MODELS = {  # --embeddings: the one place where a new one is added
    "clip": clip_vectors,
    "clip-text": clip_text_vectors,
    "glove": glove_vectors,
    "bert": bert_vectors,
    "corpus": corpus_vectors,
    "random": random_vectors,
}
WITHOUT_FILES = ("corpus", "random")  # those of them that read no file

# ======== The prior

@dataclass
class Prior:
    """Nodes P = [P_a ; P_n] and edges A of the modifying graph; an array can be read by its name, `prior["edges"]`."""

    adjective_words: np.ndarray  # (Na,) str
    adjective_vectors: np.ndarray  # (Na, d) float32
    noun_words: np.ndarray  # (Nn,) str
    noun_vectors: np.ndarray  # (Nn, d) float32
    edges: np.ndarray  # (E, 2) int64, adjective and noun index
    edge_counts: np.ndarray  # (E,) int64, times the pair occurs
    provenance: dict  # corpora and captions, vectors and checksum, part of speech, options

    def __getitem__(self, name):
        return getattr(self, name)

    def save(self, path):
        """Write the .npz, whole or not at all."""
        with atomic_write(path) as part, open(part, "wb") as file:
            np.savez_compressed(file, **{**vars(self), "provenance": json.dumps(self.provenance)})

    @classmethod
    def load(cls, path):
        """Read a .npz of `save`. Raises UserError if it is missing or no prior."""
        with user_error(f"'{path}' is no prior: {{}}; make one with: python prior.py CORPUS --out prior.npz"):
            with np.load(regular(path), allow_pickle=False) as file:
                if missing := cls.__dataclass_fields__.keys() - set(file):
                    raise ValueError(f"it lacks {', '.join(sorted(missing))}")
                arrays = {name: file[name] for name in cls.__dataclass_fields__}
            prior = cls(**{**arrays, "provenance": json.loads(str(arrays["provenance"]))})
            if fault := prior.fault():
                raise ValueError(fault)
            return prior

    def fault(self):
        """Why these arrays are no prior, in a line, or None if they are one."""
        for part in PARTS:
            words, vectors = self[f"{part}_words"], self[f"{part}_vectors"]
            texts = words.ndim == 1 and words.dtype.kind == "U" and len(words)
            if not texts or any(map(str.isnumeric, words.tolist())):
                return f"its {part}s are not words"
            if len(np.unique(words)) < len(words):
                return f"one of its {part}s is there twice"
            if vectors.dtype.kind != "f" or vectors.ndim != 2 or len(vectors) != len(words):
                return f"its {part}s do not have a vector each"
            if not (vectors.any(axis=1) & (np.abs(vectors) < 1e6).all(axis=1)).all():
                return f"a vector of its {part}s is zero, huge or not finite"
        if self.adjective_vectors.shape[1] != self.noun_vectors.shape[1]:
            return "its adjectives and nouns differ in dimensions"
        edges, counts, sizes = self.edges, self.edge_counts, (len(self.adjective_words), len(self.noun_words))
        whole = edges.dtype.kind == "i" and edges.shape == (len(edges), 2)
        if not whole or (edges < 0).any() or (edges >= sizes).any():
            return "its edges are not pairs of an adjective's and a noun's index"
        if len(np.unique(edges, axis=0)) < len(edges):
            return "one of its edges is there twice"
        if counts.dtype.kind != "i" or counts.shape != (len(edges),) or (counts < 1).any():
            return "its edges do not have a count of one or more each"
        return None if isinstance(self.provenance, dict) else "its provenance is not a JSON object"

    def tensors(self):
        """The arrays as tensors and lists of strings, which a checkpoint may hold → dict."""
        import torch

        arrays = {name: value for name, value in vars(self).items() if name != "provenance"}
        return {name: x.tolist() if x.dtype.kind == "U" else torch.from_numpy(x) for name, x in arrays.items()}


def build_prior(captions, speech=None, embeddings="clip", weights="", min_count=10, dim=0, workers=CORES, name=""):
    """Step 1 and the graph of step 2, from captions to a Prior.

    captions: iterable of str; speech: parts of speech; by default WordNetSpeech, which needs NLTK's data.
    embeddings: of LANGUAGE_MODELS; weights, dim: its files, and the dimensions of its vectors.
    min_count: times a word must occur in its part of speech to become a code (the authors: more than 10).
    name: of the corpus, for the file's provenance.
    Returns Prior; nodes in order of frequency, then alphabet.
    Raises UserError if no adjective or no noun is left, or a file of the language model is missing or damaged.
    """
    speech = speech or WordNetSpeech()
    if embeddings not in WITHOUT_FILES:  # its files are read before minutes of tagging, for no words
        LANGUAGE_MODELS[embeddings](dict.fromkeys(PARTS, ()), weights, dim, Counts())
    captions = list(captions)
    counts = count_corpus(captions, speech, embeddings == "corpus", workers)
    frequent = sorted((-count, word, part) for (word, part), count in counts.words.items() if count >= min_count)
    seen = {part: [word for _, word, kind in frequent if kind == part] for part in PARTS}
    vectors = LANGUAGE_MODELS[embeddings](seen, weights, dim, counts)
    has_vector = lambda part, word: word in vectors[part] and vectors[part][word].any()
    words = {part: [word for word in seen[part] if has_vector(part, word)] for part in PARTS}
    for part in PARTS:
        if not words[part]:
            raise UserError(
                f"no {part} is left: {len(seen[part])} are seen at least {min_count} times, none of them with a vector "
                f"of {embeddings}; give prior.py a larger English corpus or a lower --min-count"
            )
    place = {part: {word: i for i, word in enumerate(words[part])} for part in PARTS}
    edges = sorted(
        (place["adjective"][adjective], place["noun"][noun], count)
        for (adjective, noun), count in counts.pairs.items()
        if adjective in place["adjective"] and noun in place["noun"]
    )
    edges = np.array(edges, dtype=np.int64).reshape(-1, 3)
    tables = {part: np.stack([vectors[part][word] for word in words[part]]) for part in PARTS}
    sha256 = hashlib.sha256(b"".join(tables[part].tobytes() for part in PARTS)).hexdigest()
    provenance = {
        "corpus": name,
        "captions": counts.captions,
        "captions_sha256": text_checksum(captions),
        "vectors": {"name": embeddings, "file": Path(weights).name, "sha256": sha256},
        "dim": tables["noun"].shape[1],
        "min_count": min_count,
        "without_vector": {part: len(seen[part]) - len(words[part]) for part in PARTS},
        "part_of_speech": speech.name,
        "plurals": getattr(speech, "plurals", {}),
    }
    arrays = {f"{part}_words": np.array(words[part]) for part in PARTS}
    arrays.update({f"{part}_vectors": tables[part] for part in PARTS})
    return Prior(**arrays, edges=edges[:, :2], edge_counts=edges[:, 2], provenance=provenance)


AUTHORS_SIZES = (1949, 4258)  # adjectives and nouns of the authors' vocabulary


def describe_codebook(prior):
    """A prior's sizes beside the authors', and the bits of a position, in words; a warning where they are small."""
    sizes = len(prior.adjective_words), len(prior.noun_words)
    bits, authors = (sum(map(math.log2, numbers)) for numbers in (sizes, AUTHORS_SIZES))
    text = (f"{sizes[0]:,} adjectives + {sizes[1]:,} nouns, {bits:.1f} bits a position "
            f"(authors: {AUTHORS_SIZES[0]:,} + {AUTHORS_SIZES[1]:,}, {authors:.1f} bits)")
    if any(10 * size < usual for size, usual in zip(sizes, AUTHORS_SIZES)):
        text += ("\nwarning: this codebook is under a tenth of the authors'; "
                 "for a larger one give prior.py more captions, or a lower --min-count")
    return text


def shuffled(prior, what, seed=0):
    """A control: the same Prior with its vectors permuted, or its edges rewired.

    what: "vectors" permutes them within each part of speech; "edges" rewires the graph, every word keeping its number
        of edges; "none" changes nothing.
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

    Each round pairs the edges at random, and a pair exchanges its nouns unless an edge would be there twice.
    """
    edges, nouns = edges.copy(), int(edges[:, 1].max(initial=0)) + 1
    half = len(edges) // 2
    for _ in range(rounds):
        first, second = rng.permutation(len(edges))[: 2 * half].reshape(2, half)
        crossed = [edges[first, 0] * nouns + edges[second, 1], edges[second, 0] * nouns + edges[first, 1]]
        new, position, repeats = np.unique(np.concatenate(crossed), return_inverse=True, return_counts=True)
        free = ((repeats == 1) & ~np.isin(new, edges @ [nouns, 1]))[position].reshape(2, half).all(axis=0)
        edges[first[free], 1], edges[second[free], 1] = edges[second[free], 1], edges[first[free], 1]
    return edges


# ======== Looking at a prior: prior.py show

EXAMPLES = {"adjective": ("orange", "yellow", "blue"), "noun": ("breast", "belly", "wheel")}  # the paper's Fig. 1
CAPTION = "this small brown bird has a bright orange breast and a short black beak."


def examples(words, part):
    """The words of the paper's Fig. 1 in a list of one part of speech; its first three if it lacks them."""
    found = [word for word in EXAMPLES[part] if word in words]
    return found if len(found) > 1 else words[:3]


def nearest_words(words, vectors, word, count):
    """The `count` words of largest cosine similarity to `word`: list of (word, cosine)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit[list(words).index(word)]
    order = [i for i in np.argsort(-cosine, kind="stable") if words[i] != word]
    return [(str(words[i]), float(cosine[i])) for i in order[:count]]


def show_prior(prior, args):
    """Print a prior's sizes, most frequent pairs and neighbourhoods, and take one caption apart."""
    adjectives, nouns = prior.adjective_words, prior.noun_words
    if unknown := set(args.words) - set(adjectives.tolist()) - set(nouns.tolist()):
        raise UserError(f"not a word of this prior: {', '.join(sorted(unknown))}")
    share = len(prior.edges) / (len(adjectives) * len(nouns))
    print(f"{len(adjectives):,} adjectives, {len(nouns):,} nouns, {len(prior.edges):,} edges ({share:.2%} of pairs)")
    for key, value in prior.provenance.items():
        print(f"  {key}: {json.dumps(value)}")
    print("\nmost frequent pairs")
    for i in np.argsort(-prior.edge_counts, kind="stable")[: args.pairs]:
        print(f"  {prior.edge_counts[i]:8,}  {adjectives[prior.edges[i, 0]]} {nouns[prior.edges[i, 1]]}")
    for column, part in enumerate(PARTS):
        words, vectors, others = prior[f"{part}_words"], prior[f"{part}_vectors"], (nouns, adjectives)[column]
        chosen = [word for word in args.words if word in words] if args.words else examples(words.tolist(), part)
        cosines = {word: dict(nearest_words(words, vectors, word, len(words))) for word in chosen}
        pairs = itertools.combinations(chosen, 2)
        print(f"\n{part}s, cosines: " + ", ".join(f"{a}–{b} {cosines[a][b]:.2f}" for a, b in pairs))
        for word in chosen:
            mine = np.flatnonzero(prior.edges[:, column] == words.tolist().index(word))
            mine = mine[np.argsort(-prior.edge_counts[mine], kind="stable")]
            linked = ", ".join(f"{others[prior.edges[i, 1 - column]]} {prior.edge_counts[i]:,}" for i in mine[:6])
            near = ", ".join(f"{name} {cosine:.2f}" for name, cosine in list(cosines[word].items())[:6])
            print(f"  {word}: near {near}")
            print(f"  {'':{len(word)}}  {('modifies', 'is')[column]} {linked or 'nothing'} ({len(mine):,} edges)")
    try:
        show_caption(prior, args.caption or CAPTION)
    except UserError as error:
        if args.caption:
            raise
        print(f"\nno caption is taken apart: {error}")


def show_caption(prior, caption):
    """Print what a caption turns into: tags, parts of speech, nodes and modifying pairs."""
    words = {part: prior[f"{part}_words"].tolist() for part in PARTS}
    of_list = prior.provenance["part_of_speech"] == WordListSpeech.name
    speech = WordListSpeech(*words.values(), prior.provenance["plurals"]) if of_list else WordNetSpeech()
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
    parser = Parser(description=__doc__)
    add = parser.add_argument
    if argv[:1] == ["show"]:
        add("show", choices=["show"], help="print what a prior holds")
        add("prior", metavar="PRIOR", help="a .npz of prior.py")
        add("--caption", help="caption to take apart")
        add("--pairs", type=int, default=20, help="most frequent pairs to print")
        add("--words", nargs="+", default=(), help="words to look at, instead of the paper's or the most frequent")
        return parser.parse_args(argv)
    add("corpora", nargs="*", metavar="CORPUS", help="text, COCO JSON or Flickr file (.gz or not), or folder of .txt")
    add("--embeddings", choices=LANGUAGE_MODELS, default="clip", help="language model (default: clip, the paper's); "
        "corpus: PPMI + SVD of the captions")
    add("--weights", default="", help="glove: its text or zip; clip, clip-text, bert: a Hugging Face folder")
    add("--download", action="store_true", help="download NLTK's data and CLIP if they are missing (17 and 606 MB)")
    add("--min-count", type=bounded(int, 1), default=10, help="times a word must occur to be a code (default: 10)")
    add("--dim", type=bounded(int, 0), default=0, help="dimensions; of glove's zip, the file to take (0: 100)")
    add("--workers", type=bounded(int, 1), default=CORES, help=f"processes that tag captions (default: {CORES})")
    add("--out", default="prior.npz", help="file to write (default: prior.npz)")
    add("--overwrite", action="store_true", help="replace that file if it is there")
    args = parser.parse_args(argv)
    if not args.corpora and not args.download:
        parser.error("name a CORPUS")
    if args.embeddings in ("glove", "bert") and not args.weights:
        parser.error(f"--embeddings {args.embeddings} needs --weights")
    for flag, models in (("weights", WITHOUT_FILES), ("dim", ("clip", "clip-text", "bert"))):
        if getattr(args, flag) and args.embeddings in models:
            parser.error(f"--{flag} changes nothing for --embeddings {args.embeddings}")
    for path in (*args.corpora, args.weights):
        if path and not Path(path).expanduser().exists():
            parser.error(f"'{path}' does not exist")
    if not args.out.endswith(".npz"):
        parser.error(f"--out {args.out} must end in .npz")
    if Path(args.out).exists() and args.corpora and not args.overwrite:
        parser.error(f"--out {args.out} exists; replace it with --overwrite, or name another")
    return args


def language_needs(embeddings, weights=""):
    """What a prior of a language model's vectors needs → list of Need."""
    return [nltk_data(), *(clip_needs() if embeddings.startswith("clip") and not weights else ())]


def main(argv=None):
    """Build a prior, or show one."""
    argv = sys.argv[1:] if argv is None else argv
    args, began = parse(argv), time.monotonic()
    if argv[:1] == ["show"]:
        return show_prior(Prior.load(args.prior), args)
    again = shlex.join(["python", "prior.py", *argv, "--download"])
    provide(language_needs(args.embeddings, args.weights), args.download, again)
    if not args.corpora:
        return None
    captions = read_corpora(args.corpora)
    options = (args.embeddings, args.weights, args.min_count, args.dim, args.workers, " ".join(args.corpora))
    prior = build_prior(captions, WordNetSpeech(), *options)
    prior.save(args.out)
    lost = sum(prior.provenance["without_vector"].values())
    print(
        f"{args.out}: {len(prior.edges):,} edges, {args.embeddings} vectors of {prior.provenance['dim']} dimensions "
        f"({lost:,} words without one) from {prior.provenance['captions']:,} captions "
        f"in {time.monotonic() - began:.1f} s\n{describe_codebook(prior)}"
    )
    return None


# ======== What other scripts share

class UserError(ValueError):
    """Something wrong with what the user gave; the message says what, and what to do."""


@contextmanager
def user_error(message, *kinds):
    """A block whose errors, of these kinds or any, become a UserError: the message, with the error's line for `{}`."""
    try:
        yield
    except UserError:
        raise
    except kinds or Exception as error:
        if isinstance(error, MemoryError) and MemoryError not in kinds:
            raise  # it is no fault of what the user gave
        raise UserError(message.replace("{}", str(error).partition("\n")[0] or type(error).__name__)) from None


SHORTAGE = "out of memory|allocate|too many open files|DataLoader worker"  # in errors of several classes


def command(main):
    """Run a script's `main`. A user's error is one line and status 2, as is a lack of memory, files or
    workers; a signal ends it with 128 + its number."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _end(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack ℓ and β
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        message = str(error).rsplit("UserError: ", 1)[-1]  # a loader's worker sends its traceback along
        print(f"error: {message.strip()}", file=sys.stderr)
        sys.exit(2)
    except (OSError, MemoryError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or ["out of memory"]
        line = lines[-1 if lines[0].startswith("Caught ") else 0]
        short = isinstance(error, MemoryError) or re.search(SHORTAGE, line, re.IGNORECASE)
        if isinstance(error, RuntimeError) and not short:
            raise
        if short:
            calls = traceback.extract_tb(error.__traceback__)
            call = [call for call in calls if Path(call.filename).parent == Path(__file__).parent][-1]
            line += f" in {call.name} ({Path(call.filename).name}, line {call.lineno}: {call.line})"
        print(f"error: {line}", file=sys.stderr, flush=True)
        if short and not isinstance(error, MemoryError):
            _end(2)  # to take loaders and tensors apart may fail again
        sys.exit(2)


def _end(status):
    """Nothing needs cleaning: what is half written is NAME.part, and the next write replaces it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown arguments here, so that a sub-command names its own page and flags."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f"; near: {flag}" for flag in near))
        return found, unknown

    def error(self, message):
        self.exit(2, f"error: {message} ({self.prog} --help lists all flags)\n")

    def add_fields(self, kind, sections=None, default_text=lambda name, value: value):
        """Add a flag for each field of a dataclass, --batch-size for batch_size, with its bounds and choices.

        sections: title → names of the fields that stand under it in --help.
        default_text: (name, default) → how --help shows the default.
        """
        groups = {}
        for title, names in (sections or {}).items():
            groups.update(dict.fromkeys(names.split(), self.add_argument_group(title)))
        for item in fields(kind):
            more, value = item.metadata, item.default
            default = "" if value in ("", ()) else f" (default: {default_text(item.name, value)})"
            text = more["reason"] + default
            flag = dict(default=argparse.SUPPRESS, help=text.replace("%", "%%"))
            if isinstance(value, bool):
                flag["action"] = argparse.BooleanOptionalAction
            elif "each" in more:
                flag.update(type=more["each"], nargs="+", metavar="X")
            else:
                choices = more.get("choices", lambda: None)
                choices = choices() if callable(choices) else choices
                least = more.get("least", 0 if isinstance(value, float) else 1)
                kept = str if isinstance(value, str) else bounded(type(value), least, more.get("most", 2**62))
                flag.update(type=kept, choices=choices and tuple(choices), metavar=None if choices else "X")
            groups.get(item.name, self).add_argument("--" + item.name.replace("_", "-"), **flag)


def bounded(kind, least, most=2**62):
    """For argparse: a number, or numbers such as 1,2,4, within bounds."""

    def value(text):
        found = tuple(map(int, text.split(","))) if kind is tuple else kind(text)
        for number in found if kind is tuple else (found,):
            if not least <= number <= most:
                raise argparse.ArgumentTypeError(f"{text} does not lie between {least} and {most}")
        return found

    value.__name__ = kind.__name__  # for argparse's message
    return value


@contextmanager
def atomic_write(path, folder=True):
    """A path NAME.part that takes the place of `path` when the block ends well; links are followed.

    folder: whether to make the folder that it lies in.
    """
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


def regular(path):
    """The path. Raises ValueError for a folder, or a pipe, which might never end."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is not a regular file")
    return path


def save_png(image, path):
    """Write a PIL image, whole or not at all. Raises UserError for a name that is not a PNG's."""
    if Path(path).suffix != ".png":
        raise UserError(f"'{path}' must end in .png")
    with atomic_write(path) as part:
        image.save(part, "PNG")


def text_checksum(lines):
    """The sha256 of a list of strings, in hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def checksum(path, kind="sha256"):
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.new(kind)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url, path, digest):
    """Download a file whole, with a progress bar, and verify it; a failed download leaves nothing.

    digest: the published sha256, or the first digits of it; or an md5, of 32 digits.
    Raises UserError where the file is unavailable, cut or another.
    """
    import torch

    md5 = len(digest) == 32
    print(f"downloading {url}", file=sys.stderr, flush=True)
    with user_error(f"{url} is unavailable: {{}}; run the command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=None if md5 else digest)
        if md5 and checksum(path, "md5") != digest:
            path.unlink()
            raise ValueError("its md5 is not the published one")


@dataclass
class Need:
    """Something that a command needs and this repository does not hold: `present` tells whether it is there.

    Where it can be downloaded, a method `fetch` does so, and raises UserError if it fails.
    """

    what: str  # its name
    size: str  # "528 MB"
    source: str  # its URL, or another way to get it
    local: str  # how to point at a local copy

    fetch = None


@dataclass
class PublishedFile(Need):
    """A file that lies in torch hub's cache, which the variable TORCH_HOME moves."""

    name: str  # of the file in the cache
    sha256: str  # or the first digits of it

    @property
    def path(self):
        """Where it is, or will be."""
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def present(self):
        """Whether it is there with the right checksum, which NAME.verified notes beside its size and time."""
        if not self.path.is_file():
            return False
        mark, stat = self.path.with_name(f"{self.name}.verified"), self.path.stat()
        note = f"{self.sha256} {stat.st_size} {stat.st_mtime_ns}"
        if mark.is_file() and mark.read_text() == note:
            return True
        right = checksum(self.path).startswith(self.sha256)
        with suppress(OSError):  # of a cache that cannot be written
            mark.write_text(note if right else "")
        return right

    def fetch(self):
        download(self.source, self.path, self.sha256)

    def get(self):
        """Its path. Raises UserError where it is missing."""
        provide([self], False, "add --download")
        return self.path


class NLTKData(Need):
    """NLTK's data, which decide the parts of speech."""

    def present(self):
        return not missing_nltk()

    def fetch(self):
        import nltk

        with user_error(f"NLTK's data are unavailable: {{}}; run the command again, or set {self.local}"):
            for name in missing_nltk():
                nltk.download(name, raise_on_error=True)


def nltk_data():
    """The Need of every text whose parts of speech are to be decided."""
    command = "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng punkt_tab"
    return NLTKData("NLTK's tagger, tokenizer and WordNet", "17 MB", command, "NLTK_DATA=DIR")


def provide(needs, download, again):
    """Download those of some Needs that are missing, if `download`; again: words that tell how to.

    Raises UserError that lists all that is missing, if it is not to be downloaded or cannot be.
    """
    missing = [need for need in needs if not need.present()]
    for need in missing if download else ():
        if need.fetch:
            need.fetch()
    if left := [need for need in missing if not (download and need.fetch)]:
        lines = [f"{need.what}, {need.size}: {need.source}   (a local copy: {need.local})" for need in left]
        lines += [f"download it: {again}"] if any(need.fetch for need in left) else []
        raise UserError("missing: " + "\n  ".join(["", *lines] if len(left) > 1 else ["; ".join(lines)]))


def read_tensors(path):
    """Tensors of a published file by name: .safetensors, what torch.save wrote, or a Hugging Face folder with either.

    Raises UserError for a file that is missing, damaged, or holds objects that `weights_only` refuses.
    """
    import torch

    if Path(path).is_dir():
        safe = Path(path) / "model.safetensors"
        path = safe if safe.is_file() else Path(path) / "pytorch_model.bin"
    with user_error(f"weights '{path}' cannot be read: {{}}"):
        if Path(path).suffix != ".safetensors":
            # Published VQGANs hold the state of this callback, a dict, under its class.
            callback = (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
            with torch.serialization.safe_globals([callback]):
                state = load_tensors(regular(path))
            for name in ("state_dict", "model"):
                state = state[name] if isinstance(state.get(name), dict) else state
            return {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
        data = bytearray(Path(regular(path)).read_bytes())  # the length of a JSON header, the header, raw numbers
        start = 8 + int.from_bytes(data[:8], "little")
        kinds = dict(F64="float64", F32="float32", F16="float16", BF16="bfloat16", I64="int64")
        tensors = {}
        for name, entry in json.loads(data[8:start]).items():
            if entry.get("dtype") in kinds:  # not "__metadata__"; no network here has tensors of other kinds
                kind, offset = getattr(torch, kinds[entry["dtype"]]), start + entry["data_offsets"][0]
                flat = torch.frombuffer(data, dtype=kind, count=math.prod(entry["shape"]), offset=offset)
                tensors[name] = flat.reshape(entry["shape"])
        return tensors


def list_files(root, suffixes, above=()):
    """Yield, in sorted order, the files below a folder whose names end in one of the suffixes, in any case.

    Linked folders are followed, as torchvision's ImageFolder does; `above` (real paths) ends loops of links.
    Hidden files and folders are left out. Raises UserError if there is no such folder.
    """
    real = os.path.realpath(root)
    if not os.path.isdir(real):
        raise UserError(f"no such folder: '{root}'")
    with os.scandir(root) as entries:
        shown = sorted((entry.name, entry) for entry in entries if not is_hidden(entry.name))
    for name, entry in shown if real not in above else ():
        if entry.is_dir():
            yield from list_files(entry.path, suffixes, (*above, real))
        elif name.lower().endswith(tuple(suffixes)) and entry.is_file():
            yield Path(entry.path)


def is_hidden(name):
    """Whether a relative path has a part that starts with a dot, or macOS's `__MACOSX`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def load_tensors(file):
    """What torch.save wrote, on the CPU. Raises ValueError for objects, which `weights_only` refuses."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose message is advice, with codes for a terminal
        raise ValueError("it is damaged, or holds objects other than tensors, numbers and strings") from None


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
