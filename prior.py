"""Adjective and noun codebooks of a language model, and the graph of which modifies which.

Paper §3.3, step 1 (codebook construction) and the first half of step 2 (the modifying graph):
captions are tagged, words that are not vision-related are dropped by their part of speech, each
remaining word gets its language-model vector, and A_ij = 1 where adjective i modifies noun j.

    python prior.py captions.txt --out prior.npz                      vectors from the corpus itself
    python prior.py annotations/captions_train2017.json CUB_200_2011/text \\
        --embeddings glove --weights glove.6B.zip --dim 300
    python prior.py show prior.npz --caption "a bright orange breast" --figure figure1.png

A corpus is plain text (a caption a line), COCO captions JSON, Flickr's `name#k<TAB>caption`, any of
them gzipped, or a folder of .txt files. The result is one .npz that numpy reads without pickle.
"""

import argparse
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from PIL import Image, ImageDraw, ImageFont

VERSION = 1  # of the file written
WINDOW = 5  # words on each side that count as context of `corpus` vectors (Levy & Goldberg 2014)
CHUNK = 2000  # captions a worker takes at a time
PARTS = ("adjective", "noun")  # the two parts of speech, in the order of the codebooks everywhere


# ---------------------------------------------------------------------------------------------
# What every script here shares: errors for people, whole files, progress


class UserError(ValueError):
    """Something wrong with what the user gave; the message says what, and what to do."""


def command(main):
    """Run a script's `main`; a UserError or a failed file operation becomes a line on stderr and status 2."""
    try:
        main()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error):
    text = str(error)
    if "Original Traceback" in text:  # of a loader's worker: its last lines are the message
        text = text.rsplit("Error: ", 1)[-1].strip()
    for line in text.split("\n"):
        print(f"error: {line}", file=sys.stderr)
    return 2


@contextmanager
def whole_file(path):
    """A temporary path that becomes `path` when the block ends well and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def checksum(path):
    """sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


class Progress:
    """One line that is rewritten on a terminal, and printed every ten seconds to a log."""

    def __init__(self, every=10.0):
        self.live = sys.stderr.isatty()
        self.every = 0.2 if self.live else every
        self.last = time.monotonic()

    def __call__(self, text, now=False):
        if now or time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            print(f"\r\033[K{text}" if self.live else text, end="\n" if now or not self.live else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Corpora


def read_captions(path):
    """Yield the captions of one corpus, streaming.

    Args:
        path: a text file, COCO captions JSON or Flickr token file, each possibly .gz, or a folder
            whose .txt files (at any depth, in sorted order) hold a caption a line.
    Raises:
        UserError: if it is missing, not UTF-8, or JSON without captions.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"corpus '{path}' does not exist: give text, COCO captions JSON, a Flickr token file or a folder of .txt files")
    files = sorted([*path.rglob("*.txt"), *path.rglob("*.txt.gz")]) if path.is_dir() else [path]
    if not files:
        raise UserError(f"corpus folder '{path}' holds no .txt or .txt.gz file")
    for file in files:
        try:
            with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as stream:
                if file.name.removesuffix(".gz").endswith(".json"):
                    yield from _json_captions(stream, file)
                else:
                    for line in stream:
                        caption = re.sub(r"^\S+#\d+\t", "", line).strip()
                        if caption:
                            yield caption
        except UnicodeDecodeError as error:
            raise UserError(f"corpus '{file}' is not UTF-8 text: byte {error.start} of a block cannot be read") from None
        except (gzip.BadGzipFile, EOFError):
            raise UserError(f"corpus '{file}' is not a whole gzip file") from None


def _json_captions(stream, name, block=1 << 20):
    """Captions of COCO's `annotations` array, one object at a time, without loading the file."""
    buffer, decoder, found = "", json.JSONDecoder(), False
    while True:
        text = stream.read(block)
        buffer += text
        position = 0
        if not found:
            key = re.search(r'"annotations"\s*:\s*\[', buffer)
            if key is None:
                if not text:
                    raise UserError(f"corpus '{name}' is JSON without an \"annotations\" list of captions")
                buffer = buffer[-64:]  # the key may straddle two blocks
                continue
            found, position = True, key.end()
        while True:
            position = _SEPARATORS.match(buffer, position).end()
            if buffer.startswith("]", position):
                return
            try:
                annotation, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError:
                break
            if not isinstance(annotation, dict) or "caption" not in annotation:
                raise UserError(f"corpus '{name}': an annotation has no \"caption\"; is it COCO's captions file?")
            yield " ".join(annotation["caption"].split())
        if not text:
            raise UserError(f"corpus '{name}' ends in the middle of its annotations")
        buffer = buffer[position:]


_SEPARATORS = re.compile(r"[,\s]*")


# ---------------------------------------------------------------------------------------------
# Parts of speech


class Token(NamedTuple):
    """A word of a caption as the graph sees it."""

    word: str  # lower case
    tag: str  # Penn Treebank tag
    part: str  # "adjective", "noun" or ""
    lemma: str  # the node's word: the singular of a noun, otherwise the word


class WordNetSpeech:
    """NLTK's tokenizer and tagger for words in context, WordNet for what a word may be.

    The tagger's reading holds but for these rules, which `resolve_parts` applies:

    1. A noun or participle that WordNet lists as an adjective is read as one where a modifier
       stands: directly before a noun, or before an adjective that leads to one ("a bright orange
       breast", "striped wings"), or joined to such an adjective ("an orange and black bird", but
       not "its back and white belly"). An -ing form must also follow a determiner; a participle
       must not follow a noun, pronoun or verb other than "has" (it is the verb there).
    2. The same word is an adjective in a bare predicate ("the bird is small, round and brown"),
       unless it is an -ing form ("is flying") or a passive ("is covered with").
    3. An adjective, adverb or verb unknown to WordNet as such but known as a noun is a noun
       ("a bright yellow belly", which the tagger calls an adverb), and so is an adverb where only a
       noun can stand ("a black back").
    4. An adverb that is oftener an adjective is one where nothing follows that it could modify ("its
       beak is very long"), and so is a verb form that is no inflection ("it has brown wings").

    Raises:
        UserError: naming every missing NLTK resource and the command that gets them.
    """

    RESOURCES = {
        "wordnet": "corpora/wordnet",
        "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
        "punkt_tab": "tokenizers/punkt_tab",
    }
    name = "NLTK tagger and WordNet"

    def __init__(self, download=False):
        import nltk

        missing = self._missing(nltk)
        if missing and download:
            for resource in missing:
                nltk.download(resource, quiet=True)
            missing = self._missing(nltk)
        if missing:
            raise UserError(
                f"NLTK data missing: {', '.join(missing)} (tagger, tokenizer and WordNet decide the parts of speech); "
                f"get them with: python -m nltk.downloader {' '.join(missing)}   (or let prior.py --download do it; a local copy: NLTK_DATA=DIR)"
            )
        from nltk.corpus import wordnet
        from nltk.tag.perceptron import PerceptronTagger

        self.tagger, self.tokenizer, self.split_sentences = PerceptronTagger(), nltk.NLTKWordTokenizer(), nltk.sent_tokenize
        self.known = {pos: frozenset(wordnet.all_lemma_names(pos)) for pos in "anr"}
        self.wordnet, self.lemmatize = wordnet, nltk.WordNetLemmatizer().lemmatize
        self.nouns, self.bases, self.leanings = {}, {}, {}

    def __reduce__(self):
        return WordNetSpeech, ()  # workers that are not forked load their own

    @staticmethod
    def _missing(nltk):
        missing = []
        for name, path in WordNetSpeech.RESOURCES.items():
            try:
                nltk.data.find(path)
            except LookupError:
                try:
                    nltk.data.find(f"{path}.zip")
                except LookupError:
                    missing.append(name)
        return missing

    def __call__(self, caption):
        """Caption → list of sentences, each a list of Token."""
        sentences = self.split_sentences(caption) if re.search(r"[.!?]\s+\S", caption) else [caption]
        return [resolve_parts(self.tagger.tag(self._words(sentence)), self) for sentence in sentences]

    def _words(self, sentence):
        """Tokens; those of a title, whose capitals the tagger takes for names, in lower case."""
        words = self.tokenizer.tokenize(sentence)
        capitals = sum(word[0].isupper() for word in words)
        return [word.lower() for word in words] if capitals > 1 and 2 * capitals > len(words) else words

    def is_adjective(self, word):
        return len(word) > 2 and word in self.known["a"]  # WordNet lists "in" and "on"

    def noun(self, word):
        """Singular of a noun WordNet knows, or None."""
        if word not in self.nouns:
            # WordNet knows "men", the workforce, as a word of its own
            lemma = "man" if word == "men" else self.lemmatize(word, "n") if word.isalpha() and len(word) > 1 else None
            self.nouns[word] = lemma if lemma in self.known["n"] else None
        return self.nouns[word]

    def verb(self, word):
        """Base form of a verb WordNet knows, or None."""
        if word not in self.bases:
            self.bases[word] = self.wordnet.morphy(word, "v")
        return self.bases[word]

    def lists(self, word, tag):
        """Whether WordNet lists the word in the part of speech of an adjective's, adverb's or verb's tag."""
        kind = tag[:2]
        return self.is_adjective(word) if kind == "JJ" else word in self.known["r"] if kind == "RB" else self.verb(word) is not None

    def mostly_adjective(self, word):
        """Whether WordNet's sense counts of the word as an adjective exceed those as an adverb."""
        if word not in self.leanings:
            count = lambda pos: sum(lemma.count() for lemma in self.wordnet.lemmas(word, pos))
            self.leanings[word] = self.is_adjective(word) and count("a") > count("r")
        return self.leanings[word]


class WordListSpeech:
    """Parts of speech by two lists of words, for text whose language is known in advance.

    Args:
        adjectives, nouns: words; a noun's regular plural is recognised, others through `plurals`.
        plurals: irregular plural → singular.
    """

    name = "word list"
    TAGS = {
        "and": "CC",
        "or": "CC",
        "but": "CC",
        ",": ",",
        ".": ".",
        "a": "DT",
        "an": "DT",
        "the": "DT",
        "this": "DT",
        "its": "PRP$",
        "very": "RB",
        "of": "IN",
        "in": "IN",
        "on": "IN",
        "with": "IN",
        "is": "VBZ",
        "are": "VBP",
    }

    def __init__(self, adjectives, nouns, plurals=None):
        self.adjectives, self.nouns, self.plurals = frozenset(adjectives), frozenset(nouns), dict(plurals or {})

    def __call__(self, caption):
        """Caption → list of sentences, each a list of Token."""
        words = re.findall(r"[\w'-]+|[.,]", caption.lower())
        tagged = [(word, self.TAGS.get(word) or ("JJ" if word in self.adjectives else "NN" if self.noun(word) else "X")) for word in words]
        return [resolve_parts(tagged, self)]

    def is_adjective(self, word):
        return word in self.adjectives

    def noun(self, word):
        for singular in (word, self.plurals.get(word), word.removesuffix("s"), word.removesuffix("es")):
            if singular in self.nouns:
                return singular
        return None

    def verb(self, word):
        return None

    def lists(self, word, tag):
        return True

    def mostly_adjective(self, word):
        return False


def resolve_parts(tagged, speech):
    """Part of speech of each word by the four rules of WordNetSpeech.

    Args:
        tagged: list of (word, Penn tag).
        speech: an object with the methods of WordNetSpeech.
    Returns:
        list of Token.
    """
    words = [word.lower() for word, _ in tagged]
    tags = _correct_tags(words, [tag for _, tag in tagged], speech)
    parts, lemmas = [""] * len(words), list(words)
    leads = [False] * (len(words) + 2)  # whether a noun phrase goes on from this position to its noun
    for i in reversed(range(len(words))):
        word, kind = words[i], tags[i][:2]
        goes_on = leads[i + 1] or leads[i + 2] and parts[i + 2] == "adjective" and _may_join(words, tags, i)
        if speech.is_adjective(word) and (kind == "JJ" or goes_on and _may_modify(words, tags, i)):
            parts[i] = "adjective"
        elif speech.noun(word) and (kind == "NN" or kind in ("JJ", "RB", "VB") and not speech.lists(word, tags[i])):  # rule 3
            parts[i], lemmas[i] = "noun", speech.noun(word)
        if parts[i] == "adjective" or kind == "JJ":
            leads[i] = goes_on
        else:
            leads[i] = parts[i] == "noun" or kind == "NN"
    tokens = [Token(*fields) for fields in zip(words, tags, parts, lemmas)]
    for i, token in enumerate(tokens):
        if _is_copula(token):
            for j in _predicate(tokens, i, speech):
                tokens[j] = tokens[j]._replace(part="adjective", lemma=tokens[j].word)
    return tokens


def _correct_tags(words, tags, speech):
    """Rules 3 and 4 where the tag itself is at fault."""
    corrected = list(tags)
    for i, (word, tag) in enumerate(zip(words, tags)):
        before, after = corrected[i - 1] if i else "", tags[i + 1][:2] if i + 1 < len(tags) else ""
        if tag == "RB" and speech.mostly_adjective(word) and after not in ("JJ", "RB", "VB"):
            corrected[i] = "JJ"
        elif tag == "RB" and before in ("DT", "PRP$", "JJ") and after not in ("JJ", "RB", "VB", "NN") and speech.noun(word):
            corrected[i] = "NN"
        elif tag in ("VBN", "VBD") and after in ("NN", "JJ", "CC", ",") and speech.is_adjective(word) and speech.verb(word) in (None, word):
            corrected[i] = "JJ"
    return corrected


def _may_modify(words, tags, i):
    """Rule 1: whether a word that is not tagged as an adjective can be one before a noun."""
    tag, before = tags[i], tags[i - 1] if i else ""
    if tag == "VBG" or tag == "NN" and words[i].endswith("ing"):
        return before in ("DT", "PRP$") or before == "JJ" and tags[i - 2 : i - 1] == ["DT"]
    if tag in ("VBN", "VBD"):
        return before[:2] not in ("NN", "VB", "MD", "TO") and before != "PRP" or words[i - 1] in ("has", "have")
    return tag.startswith("NN")


def _may_join(words, tags, i):
    """Rule 1: whether a word before a comma or "and" belongs to the adjective after it, and is not a noun of its own."""
    if tags[i].startswith("NN"):
        return tags[i + 1] == "CC" and (i == 0 or words[i - 1] in ("a", "an") or tags[i - 1] == "IN")
    return tags[i + 1] in LINKS


# ---------------------------------------------------------------------------------------------
# Which adjective modifies which noun

COPULAS = frozenset("is are was were be been 's 're look looks seem seems appear appears".split())
RELATIVES = frozenset(("that", "which", "who"))
LINKS = frozenset((",", "CC"))


def _is_noun(token):
    return token.part == "noun" or token.tag.startswith("NN") and token.part == ""


def _is_adverb(token):
    return token.tag.startswith("RB") and token.part == ""


def _is_copula(token):
    return token.word in COPULAS and token.tag.startswith("VB")


def _predicate(tokens, copula, speech):
    """Positions of a bare list of adjectives after a copula; none if a noun ends the list."""
    found, i = [], copula + 1
    while i < len(tokens):
        token = tokens[i]
        passive = token.tag in ("VBN", "VBD") and i + 1 < len(tokens) and tokens[i + 1].tag in ("IN", "RP", "TO")
        if token.part == "adjective" or token.tag in ("NN", "VBN", "VBD") and not passive and speech.is_adjective(token.word):
            found.append(i)
        elif not (_is_adverb(token) or found and token.tag in LINKS):
            break
        i += 1
    leads_to_noun = found and found[-1] + 1 == i < len(tokens) and _is_noun(tokens[i])
    return [] if leads_to_noun else found


def _phrase_start(tokens, head):
    """First position of the noun phrase that ends at `head`."""
    start = head
    while start and (tokens[start - 1].part or tokens[start - 1].tag in ("DT", "PRP$", "CD", "POS", "JJ", "RB")):
        start -= 1
    return start


def _subjects(tokens, copula):
    """Positions of the nouns that a predicate after `copula` describes."""
    i = copula - 1
    while i >= 0 and _is_adverb(tokens[i]):
        i -= 1
    if i >= 0 and tokens[i].word in RELATIVES:
        return [i - 1] if i and tokens[i - 1].part == "noun" else []
    if i >= 0 and tokens[i].tag in LINKS:  # "has a white belly and is brown": the sentence's subject
        heads = [j for j, token in enumerate(tokens[:i]) if token.part == "noun" and tokens[j + 1].part != "noun"]
        return heads[:1]
    if i < 0 or tokens[i].part != "noun":
        return []
    heads, start = [i], _phrase_start(tokens, i)
    while start > 1 and tokens[start - 1].tag == "IN" and tokens[start - 2].part == "noun":  # "the belly of the bird is"
        heads = [start - 2]
        start = _phrase_start(tokens, heads[0])
    link = ("CC",)  # "its belly and breast are white": bare nouns before "and", then before commas
    while (
        tokens[copula].word in ("are", "were") and start > 1 and tokens[start].tag not in ("DT", "PRP$") and tokens[start - 1].tag in link
    ):
        if tokens[start - 2].part != "noun":
            break
        heads.append(start - 2)
        start, link = _phrase_start(tokens, start - 2), (",",)
    return heads


def modifying_pairs(tokens, speech):
    """Yield (adjective, noun) for every adjective of a sentence that modifies a noun.

    Attributive: every adjective of a run, commas, "and" and adverbs between them allowed, modifies
    the last noun of the phrase that follows ("small, brown water bird": small bird, brown bird).
    Predicative: every adjective of a bare list after a copula modifies its subject ("its belly is
    white"), the first noun of the sentence where the copula follows "and" or a comma.
    """
    pending = []
    for i, token in enumerate(tokens):
        following = next((later for later in tokens[i + 1 :] if not _is_adverb(later)), None)
        if token.part == "adjective":
            pending.append(token.lemma)
        elif _is_noun(token):
            if i + 1 == len(tokens) or not _is_noun(tokens[i + 1]):
                if token.part == "noun":
                    yield from ((adjective, token.lemma) for adjective in pending)
                pending = []
        elif token.tag in LINKS or _is_adverb(token):
            if following is None or following.part != "adjective":
                pending = []
        elif not token.tag.startswith("JJ"):
            pending = []
        if _is_copula(token):
            predicate = _predicate(tokens, i, speech)
            for subject in _subjects(tokens, i) if predicate else ():
                yield from ((tokens[j].lemma, tokens[subject].lemma) for j in predicate)


# ---------------------------------------------------------------------------------------------
# Counting a corpus


@dataclass
class Counts:
    """What a corpus adds up to; the sum over its parts is the count of the whole."""

    captions: int = 0
    words: Counter = field(default_factory=Counter)  # (lemma, part) → times seen
    pairs: Counter = field(default_factory=Counter)  # (adjective, noun) → times modified
    contexts: Counter = field(default_factory=Counter)  # (lemma, lemma) in sorted order → times near each other

    def add(self, other):
        self.captions += other.captions
        for name in ("words", "pairs", "contexts"):
            getattr(self, name).update(getattr(other, name))


def count_captions(captions, speech, contexts=False):
    """Tag captions and count words, modifying pairs and, if asked, neighbours within WINDOW words.

    Args:
        captions: iterable of str.
        speech: a WordNetSpeech or WordListSpeech.
    Returns:
        Counts.
    """
    counts = Counts()
    for caption in captions:
        counts.captions += 1
        for tokens in speech(caption):
            counts.words.update((token.lemma, token.part) for token in tokens if token.part)
            counts.pairs.update(modifying_pairs(tokens, speech))
            if contexts:
                lemmas = [token.lemma for token in tokens if token.word[0].isalpha()]
                counts.contexts.update(
                    tuple(sorted((lemma, near))) for i, lemma in enumerate(lemmas) for near in lemmas[i + 1 : i + 1 + WINDOW]
                )
    return counts


def _start_worker(speech, contexts):
    _count_chunk.job = speech, contexts


def _count_chunk(captions):
    return count_captions(captions, *_count_chunk.job)


def count_corpus(captions, speech, contexts=False, workers=1):
    """`count_captions` over all cores; the result does not depend on their number."""
    captions, total = iter(captions), Counts()
    chunks = iter(lambda: list(itertools.islice(captions, CHUNK)), [])
    progress, start = Progress(), time.monotonic()
    with ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(multiprocessing.Pool(workers, _start_worker, (speech, contexts)))
            parts = pool.imap_unordered(_count_chunk, chunks)
        else:
            parts = (count_captions(chunk, speech, contexts) for chunk in chunks)
        for counts in parts:
            total.add(counts)
            seconds = time.monotonic() - start
            progress(
                f"tagging: {total.captions:,} captions, {total.captions / seconds:,.0f}/s, {len(total.words):,} words, {len(total.pairs):,} pairs"
            )
    return total


# ---------------------------------------------------------------------------------------------
# Word vectors


def glove_vectors(path, wanted, dim=100):
    """Vectors of GloVe's text format, `word v1 … vd` a line, as it is or inside a .zip or .gz.

    Args:
        path: the file; a word2vec header line is skipped.
        wanted: words to keep, so that memory is that of the vocabulary.
        dim: which file of a .zip of several, `*.{dim}d.txt`.
    Returns:
        dict word → (d,) float32.
    Raises:
        UserError: missing file, not UTF-8, a row of another length or not of finite numbers.
    """
    vectors, width = {}, None
    with _open_text(path, dim) as stream:
        try:
            for number, line in enumerate(stream, 1):
                line = line.rstrip()
                if not line or number == 1 and re.fullmatch(r"\d+ \d+", line):
                    continue
                width = width or line.count(" ")
                word, *values = line.rsplit(" ", width)  # from the right: a word may contain spaces
                if len(values) != width or width == 0:
                    raise UserError(f"vectors '{path}': line {number} has {len(values)} numbers, the first has {width}")
                if word not in wanted:
                    continue
                try:
                    vector = np.array(values, dtype=np.float32)
                except ValueError:
                    raise UserError(f"vectors '{path}': line {number} is not a word and {width} numbers") from None
                if not np.isfinite(vector).all():
                    raise UserError(f"vectors '{path}': line {number} ('{word}') holds a number that is not finite")
                vectors[word] = vector
        except UnicodeDecodeError:
            raise UserError(f"vectors '{path}' are not UTF-8 text; expected GloVe's `word v1 … vd` lines") from None
    return vectors


@contextmanager
def _open_text(path, dim):
    """The text inside a file, a .gz, or a .zip: its one member, or of several the one of `dim` dimensions."""
    if not path:
        raise UserError("--embeddings glove needs --weights FILE, GloVe's text or zip file (nlp.stanford.edu/projects/glove)")
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"word vectors '{path}' do not exist: GloVe's text or zip file (nlp.stanford.edu/projects/glove); point --weights at a copy"
        )
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if name.endswith(".txt")]
                members = members if len(members) == 1 else [name for name in members if name.endswith(f".{dim}d.txt")]
                if len(members) != 1:
                    raise UserError(f"vectors '{path}': {len(members)} files inside of {dim} dimensions, expected one; choose with --dim")
                with archive.open(members[0]) as member, io.TextIOWrapper(member, encoding="utf-8", newline="\n") as stream:
                    yield stream
        else:
            with (
                gzip.open(path, "rt", encoding="utf-8", newline="\n")
                if path.suffix == ".gz"
                else open(path, encoding="utf-8", newline="\n") as stream
            ):
                yield stream
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError):
        raise UserError(f"vectors '{path}' are not a whole archive") from None


def corpus_vectors(contexts, min_count=1, dim=100):
    """Word vectors of the corpus itself: positive PMI, then truncated SVD (Levy & Goldberg 2014).

    PPMI(w, c) = max(0, log P(w, c) / (P(w) P(c)^¾ normalised)), factored as U Σ Vᵀ; a word is its
    row of U Σ^½. No download, and deterministic.

    Args:
        contexts: Counter of sorted word pairs (w, c), as in Counts.
        min_count: words with fewer neighbours in all are left out.
        dim: columns kept, at most one less than there are words.
    Returns:
        dict word → (dim,) float32.
    Raises:
        UserError: if fewer than three words are left.
    """
    totals = Counter()
    for (a, b), count in contexts.items():
        totals[a] += count
        totals[b] += count
    words = sorted(word for word, count in totals.items() if count >= min_count)
    if len(words) < 3:
        raise UserError(f"the corpus holds {len(words)} words with neighbours; `--embeddings corpus` needs a larger one")
    index = {word: i for i, word in enumerate(words)}
    kept = [(index[a], index[b], count) for (a, b), count in sorted(contexts.items()) if a in index and b in index]
    row, column, count = np.array(kept, dtype=np.float64).T
    matrix = scipy.sparse.coo_array((count, (row.astype(int), column.astype(int))), shape=(len(words),) * 2).tocsr()
    matrix = (matrix + matrix.T).tocoo()
    frequency = matrix.sum(axis=0)
    smoothed = frequency**0.75 / (frequency**0.75).sum()  # lifts the PMI of rare contexts less
    pmi = np.log(matrix.data / (frequency[matrix.coords[0]] * smoothed[matrix.coords[1]]))
    ppmi = scipy.sparse.coo_array((np.maximum(pmi, 0), matrix.coords), shape=matrix.shape).tocsr()
    u, s, _ = scipy.sparse.linalg.svds(ppmi, k=min(dim, len(words) - 1), v0=np.ones(len(words)))
    order = np.argsort(-s)
    vectors = u[:, order] * np.sqrt(s[order])
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])  # the SVD's sign is arbitrary
    return dict(zip(words, vectors.astype(np.float32)))


def random_vectors(words, dim=100, seed=0):
    """Standard normal vectors that depend on the word and the seed alone (the paper's RI, Table 2)."""

    def draw(word):
        key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return np.random.default_rng((seed, key)).standard_normal(dim, dtype=np.float32)

    return {word: draw(word) for word in words}


# ---------------------------------------------------------------------------------------------
# The prior


@dataclass
class Prior:
    """Nodes P = [P_a ; P_n] and edges A of the modifying graph, as the .npz file holds them.

    The arrays can be read by name, `prior["edges"]`, like the file's own.
    """

    adjective_words: np.ndarray  # (Na,) str
    adjective_vectors: np.ndarray  # (Na, d) float32
    noun_words: np.ndarray  # (Nn,) str
    noun_vectors: np.ndarray  # (Nn, d) float32
    edges: np.ndarray  # (E, 2) int64, adjective and noun index
    edge_counts: np.ndarray  # (E,) int64, times the pair occurs
    provenance: dict  # corpora and captions, vectors and checksum, part of speech, options, version

    def __getitem__(self, name):
        return getattr(self, name)

    def save(self, path):
        """Write the .npz, whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if name != "provenance"}
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, provenance=json.dumps(self.provenance), **arrays)

    @classmethod
    def load(cls, path):
        """Read a .npz of `save`. Raises UserError where it is missing or something else."""
        if not Path(path).is_file():
            raise UserError(f"prior '{path}' does not exist; make one with: python prior.py CORPUS --out {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in cls.__dataclass_fields__}
        except (ValueError, KeyError, zipfile.BadZipFile, EOFError):
            raise UserError(
                f"prior '{path}' is not a file of prior.py (or is damaged); make one with: python prior.py CORPUS --out prior.npz"
            ) from None
        return cls(**{**arrays, "provenance": json.loads(str(arrays["provenance"]))})


def build_prior(counts, embeddings, weights=None, min_count=1, dim=100, seed=0, provenance=None):
    """Step 1 and the graph of step 2, from counts.

    Args:
        counts: Counts of the corpora, with contexts for `corpus` vectors.
        embeddings: "glove", "corpus" or "random".
        weights: GloVe's file.
        min_count: times a word must be seen in a part of speech to be a node of it.
        dim, seed: of `corpus` and `random` vectors.
        provenance: dict kept in the file beside what this function adds.
    Returns:
        Prior; nodes in order of frequency, then alphabet.
    Raises:
        UserError: if no adjective or no noun is left.
    """
    seen = {part: sorted((-count, word) for (word, p), count in counts.words.items() if p == part and count >= min_count) for part in PARTS}
    seen = {part: [word for _, word in ranked] for part, ranked in seen.items()}
    wanted = set(seen["adjective"]) | set(seen["noun"])
    source = {"name": embeddings}
    if embeddings == "glove":
        vectors = glove_vectors(weights, wanted, dim)
        source.update(file=Path(weights).name, sha256=checksum(weights))
    elif embeddings == "corpus":
        vectors = corpus_vectors(counts.contexts, min_count, dim)
    else:
        vectors = random_vectors(wanted, dim, seed)
    words = {part: [word for word in seen[part] if word in vectors] for part in PARTS}
    for part in PARTS:
        if not words[part]:
            raise UserError(
                f"no {part} is left of {counts.captions:,} captions: {len(seen[part])} seen at least {min_count} times, none of them "
                f"with a {embeddings} vector; give a larger English corpus or a lower --min-count"
            )
    index = {part: {word: i for i, word in enumerate(words[part])} for part in PARTS}
    edges = sorted(
        (index["adjective"][a], index["noun"][n], count)
        for (a, n), count in counts.pairs.items()
        if a in index["adjective"] and n in index["noun"]
    )
    edges = np.array(edges, dtype=np.int64).reshape(-1, 3)
    stack = {part: np.stack([vectors[word] for word in words[part]]) for part in PARTS}
    if embeddings != "glove":  # no file to name, so the vectors' own checksum
        source["sha256"] = hashlib.sha256(b"".join(stack[part].tobytes() for part in PARTS)).hexdigest()
    notes = {
        **(provenance or {}),
        "captions": counts.captions,
        "vectors": source,
        "dim": int(stack["noun"].shape[1]),
        "version": VERSION,
        "min_count": min_count,
        "without_vector": {part: len(seen[part]) - len(words[part]) for part in PARTS},
    }
    return Prior(np.array(words["adjective"]), stack["adjective"], np.array(words["noun"]), stack["noun"], edges[:, :2], edges[:, 2], notes)


def build_from_corpora(corpora, embeddings, weights=None, min_count=1, dim=100, seed=0, workers=1, speech=None, download=False):
    """Everything from caption sources to a Prior.

    Args:
        corpora: list of (name, iterable of captions).
        speech: parts of speech; by default WordNetSpeech, which needs NLTK's data.
        others: as `build_prior`.
    """
    if min_count < 1 or dim < 1 or workers < 1:
        raise UserError(f"--min-count {min_count}, --dim {dim} and --workers {workers} must be at least 1")
    if embeddings == "glove":
        with _open_text(weights, dim):  # a wrong path is known before the tagging starts
            pass
    speech = speech or WordNetSpeech(download)
    total, lines = Counts(), {}
    for name, captions in corpora:
        counts = count_corpus(captions, speech, embeddings == "corpus", workers)
        lines[name] = counts.captions
        total.add(counts)
    notes = {"corpora": lines, "part_of_speech": speech.name, "plurals": getattr(speech, "plurals", {}), "seed": seed}
    return build_prior(total, embeddings, weights, min_count, dim, seed, notes)


def shuffled(prior, what, seed=0):
    """A control: the same Prior with what it claims to know destroyed.

    Args:
        what: "vectors" permutes them within each part of speech; "edges" rewires the graph, every
            word keeping its number of edges; "none" changes nothing.
    """
    if what == "none":
        return prior
    rng = np.random.default_rng(seed)
    changed = {"provenance": {**prior.provenance, "shuffled": what}}
    if what == "vectors":
        changed.update({f"{part}_vectors": rng.permutation(prior[f"{part}_vectors"]) for part in PARTS})
    else:
        changed["edges"] = rewired(prior.edges, rng)
    return dataclasses.replace(prior, **changed)


def rewired(edges, rng, rounds=100):
    """(E, 2) edges → (E, 2) of the same degrees, by double edge swaps (Maslov & Sneppen 2002).

    Each round pairs the edges at random, and a pair exchanges its nouns unless an edge would be there twice.
    """
    edges, nouns = edges.copy(), int(edges[:, 1].max(initial=0)) + 1
    half = len(edges) // 2
    for _ in range(rounds):
        first, second = rng.permutation(len(edges))[: 2 * half].reshape(2, half)
        taken = edges @ [nouns, 1]
        crossed = [edges[first, 0] * nouns + edges[second, 1], edges[second, 0] * nouns + edges[first, 1]]
        new, position, repeats = np.unique(np.concatenate(crossed), return_inverse=True, return_counts=True)
        free = ((repeats == 1) & ~np.isin(new, taken))[position].reshape(2, half).all(axis=0)
        edges[first[free], 1], edges[second[free], 1] = edges[second[free], 1], edges[first[free], 1]
    return edges


# ---------------------------------------------------------------------------------------------
# Looking at a prior


def nearest_words(words, vectors, word, count):
    """The `count` words of largest cosine similarity to `word`: list of (word, cosine)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit[list(words).index(word)]
    order = [i for i in np.argsort(-cosine, kind="stable") if words[i] != word]
    return [(str(words[i]), float(cosine[i])) for i in order[:count]]


SMALL, FONT, BOLD = (ImageFont.load_default(size) for size in (13, 15, 18))


def save_png(image, path):
    with whole_file(path) as temporary:
        image.save(temporary, "PNG")


def write_free(draw, at, text, colour, taken, font=SMALL):
    """Write a label beside a point, below the labels that stand there already and then joined to it by a line.

    `taken` keeps the places of labels.
    """
    width, (x, y) = draw.textlength(text, font), (at[0] + 7, at[1] - font.size / 2)
    while any(abs(y - top) < font.size + 1 and x < right and left < x + width for left, top, right in taken):
        y += 3
    if y > at[1]:
        draw.line((*at, x, y + font.size / 2), colour, 1)
    taken.append((x, y, x + width))
    draw.text((x, y), text, colour, font)


def draw_codebook_space(prior, chosen, path, neighbours=4, size=560):
    """The paper's Fig. 1: chosen words and their nearest neighbours, each codebook in its own panel.

    Positions are the first two principal components of the words shown; lines join a chosen word
    to its nearest neighbours in the full space, whose cosines stand below.

    Args:
        chosen: dict part → words; words without a node are an error.
        path: PNG file to write.
    """
    rows = max(len(words) for words in chosen.values())
    image = Image.new("RGB", (2 * size, size + 30 + 24 * rows), "white")
    draw = ImageDraw.Draw(image)
    for panel, part in enumerate(PARTS):
        words, vectors = prior[f"{part}_words"], prior[f"{part}_vectors"]
        draw.rectangle((panel * size + 8, 8, (panel + 1) * size - 8, size), outline="#bbbbbb")
        draw.text((panel * size + 20, 16), f"{part} codebook space ({len(words):,} words)", "black", BOLD)
        near = {word: nearest_words(words, vectors, word, neighbours) for word in chosen[part]}
        if not near:  # words of one part of speech alone were asked for
            continue
        shown = sorted({*near, *(name for names in near.values() for name, _ in names)})
        points = vectors[[list(words).index(word) for word in shown]].astype(np.float64)
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        points -= points.mean(axis=0)
        u, s, _ = np.linalg.svd(points, full_matrices=False)
        flat = np.zeros((len(shown), 2))
        flat[:, : min(2, len(s))] = (u * s)[:, :2]
        span = np.ptp(flat, axis=0)
        flat = (flat - flat.min(axis=0)) / np.where(span > 1e-9, span, 1.0)
        place = {word: (panel * size + 50 + x * (size - 170), 60 + y * (size - 100)) for word, (x, y) in zip(shown, flat)}
        for word, names in near.items():
            for name, _ in names:
                draw.line((*place[word], *place[name]), "#b8cbe6", 2)
        taken = []
        for word, (x, y) in sorted(place.items(), key=lambda item: (item[0] not in near, item[1][1])):
            colour = "#c2410c" if word in near else "#475569"
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            write_free(draw, (x, y), word, colour, taken, BOLD if word in near else FONT)
        for row, (word, names) in enumerate(near.items()):
            text = f"{word}: " + ", ".join(f"{name} {cosine:.2f}" for name, cosine in names)
            draw.text((panel * size + 20, size + 12 + 24 * row), text, "black", FONT)
    save_png(image, path)


EXAMPLES = {"adjective": ("orange", "yellow", "blue"), "noun": ("breast", "belly", "wheel")}  # the paper's Fig. 1
CAPTION = "this small brown bird has a bright orange breast and a short sharp beak."


def chosen_words(prior, words=None):
    """dict part → words to draw: those asked for, or the paper's own, or the most frequent."""
    wanted = {part: words or EXAMPLES[part] for part in PARTS}
    chosen = {part: [word for word in wanted[part] if word in set(prior[f"{part}_words"])] for part in PARTS}
    missing = [word for word in words or () if not any(word in chosen[part] for part in PARTS)]
    if missing:
        raise UserError(f"not a word of this prior: {', '.join(missing)}")
    return {part: found if words or len(found) > 1 else [str(w) for w in prior[f"{part}_words"][:3]] for part, found in chosen.items()}


def show(prior, caption, pairs=20, download=False):
    """Print a prior's sizes, its most frequent pairs, and what one caption turns into."""
    adjectives, nouns = prior.adjective_words, prior.noun_words
    possible = len(adjectives) * len(nouns)
    print(
        f"{len(adjectives):,} adjectives, {len(nouns):,} nouns, {prior.provenance['dim']} dimensions; "
        f"{len(prior.edges):,} edges ({100 * len(prior.edges) / possible:.2f} % of all pairs)"
    )
    for key, value in prior.provenance.items():
        print(f"  {key}: {json.dumps(value)}")
    print("\nmost frequent pairs")
    for i in np.argsort(-prior.edge_counts, kind="stable")[:pairs]:
        a, n = prior.edges[i]
        print(f"  {prior.edge_counts[i]:8,}  {adjectives[a]} {nouns[n]}")
    of_list = prior.provenance.get("part_of_speech") == WordListSpeech.name
    speech = WordListSpeech(map(str, adjectives), map(str, nouns), prior.provenance["plurals"]) if of_list else WordNetSpeech(download)
    nodes = {part: {str(word): i for i, word in enumerate(prior[f"{part}_words"])} for part in PARTS}
    print(f"\n{caption}\n  {'word':16} {'tag':6} {'part of speech':15} node")
    for tokens in speech(caption):
        for token in tokens:
            node = nodes[token.part].get(token.lemma) if token.part else None
            print(
                f"  {token.word:16} {token.tag:6} {token.part or '-':15} {'-' if node is None else f'{token.part} {node} ({token.lemma})'}"
            )
        for a, n in modifying_pairs(tokens, speech):
            kept = a in nodes["adjective"] and n in nodes["noun"]
            print(f"  {a} → {n}" + ("" if kept else "   (not both are nodes)"))


# ---------------------------------------------------------------------------------------------
# Command line


def parse_build(argv):
    """Flags of `prior.py CORPUS…`."""
    parser = argparse.ArgumentParser(
        prog="prior.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python prior.py show PRIOR   looks at a finished file; see python prior.py show --help",
    )
    parser.add_argument(
        "corpora",
        nargs="+",
        metavar="CORPUS",
        help="text, COCO JSON or Flickr file (.gz or not), or a folder of .txt files; several add up",
    )
    parser.add_argument(
        "--embeddings",
        choices=("glove", "corpus", "random"),
        default="corpus",
        help="language model: GloVe's vectors, PPMI + SVD of the corpus itself, or random ones as a control (default: corpus, no download)",
    )
    parser.add_argument("--weights", metavar="FILE", help="GloVe's text or zip file; a local copy")
    parser.add_argument(
        "--min-count",
        type=int,
        default=10,
        help="times a word must occur in its part of speech to become a code (default: 10; the authors keep words seen more than 10 times)",
    )
    parser.add_argument(
        "--dim",
        type=int,
        default=100,
        help="dimensions of corpus and random vectors, and which of GloVe's to take from its zip (default: 100)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random vectors (default: 0)")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes that tag (default: every core, as tagging is nearly all of the time)",
    )
    parser.add_argument("--download", action="store_true", help="fetch missing NLTK data (tagger, tokenizer, WordNet: 17 MB)")
    parser.add_argument("--out", default="prior.npz", help="file to write (default: prior.npz)")
    return parser.parse_args(argv)


def parse_show(argv):
    """Flags of `prior.py show`."""
    parser = argparse.ArgumentParser(prog="prior.py show", description="Print what a prior holds; draw the paper's Fig. 1.")
    parser.add_argument("prior", metavar="PRIOR", help="a .npz of prior.py")
    parser.add_argument("--caption", default=CAPTION, help="caption to take apart (default: one with the paper's words)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs to print (default: 20)")
    parser.add_argument("--figure", metavar="FILE", help="PNG of nearest neighbours in codebook space (Fig. 1)")
    parser.add_argument("--words", nargs="+", help="words of the figure (default: the paper's, or the most frequent)")
    parser.add_argument("--download", action="store_true", help="fetch missing NLTK data")
    return parser.parse_args(argv)


def main(argv=None):
    """Build a prior, or show one."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["show"]:
        args = parse_show(argv[1:])
        prior = Prior.load(args.prior)
        if args.figure:
            draw_codebook_space(prior, chosen_words(prior, args.words), args.figure)
            print(f"Fig. 1: {args.figure}\n")
        return show(prior, args.caption, args.pairs, args.download)
    args = parse_build(argv)
    start = time.monotonic()
    for path in args.corpora:
        next(read_captions(path), None)  # a wrong path is known before the tagging starts
    corpora = [(str(path), read_captions(path)) for path in args.corpora]
    prior = build_from_corpora(
        corpora, args.embeddings, args.weights, args.min_count, args.dim, args.seed, args.workers, download=args.download
    )
    prior.save(args.out)
    print(
        f"{args.out}: {len(prior.adjective_words):,} adjectives, {len(prior.noun_words):,} nouns, {len(prior.edges):,} edges "
        f"from {prior.provenance['captions']:,} captions in {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    command(main)
