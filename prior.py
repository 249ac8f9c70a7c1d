"""Adjective and noun codebooks of a language model, and the graph of which modifies which.

Paper §3.3, step 1 (codebook construction) and the first half of step 2 (the modifying graph):
captions are tagged, words that are not vision-related are dropped by their part of speech, each
remaining word gets its language-model vector, and A_ij = 1 where adjective i modifies noun j.

    python prior.py captions.txt --out prior.npz                      vectors from the corpus itself
    python prior.py annotations/captions_train2017.json CUB_200_2011/text \\
        --embeddings glove --weights glove.6B.zip --dim 300
    python prior.py captions.txt --embeddings clip                    CLIP's token vectors, downloaded
    python prior.py show prior.npz --caption "a bright orange breast" --figure figure1.png

    python prior.py count part1.txt --out part1.npz                   a corpus in parts, on any machines,
    python prior.py merge part1.npz part2.npz --embeddings glove …    gives the same file as in one pass

A corpus is plain text (one caption per line), COCO captions JSON, Flickr's `name#k<TAB>caption`, any of
them gzipped, or a folder of .txt files. The result is one .npz that numpy reads without pickle.

The file reads: what all scripts share (errors, whole files, flags), corpora, parts of speech, which adjective modifies
which noun, counting, word vectors, published files, language models, the prior, looking at it, main.
"""

import argparse
import dataclasses
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
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
MEMORY = 1 << 16  # words whose WordNet entries a worker remembers
PARTS = ("adjective", "noun")  # the two parts of speech, in the order of the codebooks everywhere


# ---------------------------------------------------------------------------------------------
# What every script here shares: errors for people, whole files, progress


class UserError(ValueError):
    """Something wrong with what the user gave; the message says what, and what to do."""


@contextmanager
def explained(message, *errors):
    """A block in which an error of these types, or any without types, becomes a UserError: the message, {} in it what was wrong."""
    try:
        yield
    except UserError:
        raise
    except errors or Exception as error:
        fault = "missing" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0] or type(error).__name__
        fault = re.sub(r" ('[^']*')", lambda name: "" if name[1] in message else name[0], fault)  # which the message names already
        raise UserError(message.replace("{}", fault)) from None


def command(main):
    """Run a script's `main`; a UserError or a failed file operation becomes a line on stderr and status 2, a signal 128 + its number."""
    signal.signal(signal.SIGTERM, _unwind)
    try:
        main()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _unwind(number, frame):
    """SIGTERM as an exception, so that temporary files go."""
    raise SystemExit(128 + number)


def _complain(error):
    text = str(error)
    if "Original Traceback" in text:  # of a loader's worker: its last lines are the message
        text = text.rsplit("Error: ", 1)[-1].strip()
    for line in text.split("\n"):
        print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr)
    return 2


@contextmanager
def whole_file(path):
    """A temporary path that becomes `path` when the block ends well and vanishes when it does not."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"'{path}' is a {'folder' if path.is_dir() else 'device'}; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        os.umask(mask := os.umask(0))  # the only way to read it
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_arrays(path, **arrays):
    """Write a .npz that numpy reads without pickle, whole or not at all; the same arrays give the same bytes."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_arrays(path, names, what, made_by):
    """dict of the arrays in a .npz that `names` lists.

    Raises:
        UserError: for any other file, with what it should be and the command that makes it.
    """
    if not Path(path).exists():
        raise UserError(f"{what} '{path}' does not exist; make one with: {made_by}")
    with explained(f"'{path}' is not a {what}, or is damaged; make one with: {made_by}"):  # numpy raises eight types
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}


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


def option(default, reason, **more):
    """A dataclass field whose `reason` becomes the help of its command-line flag."""
    return field(default=default, metadata={"help": reason, **more})


def did_you_mean(word, known):
    """ "; did you mean 'vqgan'?" for a word that is nearly one of those known, else nothing."""
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean '{near[0]}'?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, with what may have been meant."""

    def __init__(self, **more):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def error(self, message):
        word, known = "", ()
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            word, known = choice[1], re.findall(r"[\w-]+", choice[2])
        elif flag := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            word, known = flag[1], self._option_string_actions
        raise UserError(f"{message}{did_you_mean(word, known)} ({self.prog} --help lists all)")


def add_flags(parser, defaults):
    """A flag for each field of a dataclass instance: --batch-size for batch_size, help and type from the field, a group for each base."""
    for kind in filter(dataclasses.is_dataclass, type(defaults).__mro__):
        group = parser.add_argument_group(kind.__doc__.splitlines()[0].rstrip("."))
        for item in dataclasses.fields(defaults):
            if item.name in kind.__annotations__:
                add_flag(group, item, getattr(defaults, item.name))


def add_flag(group, item, value):
    """The flag of one field, with its default."""
    each, choices = item.metadata.get("each"), item.metadata.get("choices")
    choices = tuple(choices()) if callable(choices) else choices  # of a table further down
    default = "" if value in ("", ()) else f" (default: {','.join(map(str, value)) if isinstance(value, tuple) else value})"
    more = {"default": argparse.SUPPRESS, "help": f"{item.metadata['help']}{default}".replace("%", "%%")}
    if isinstance(value, bool):
        more["action"] = argparse.BooleanOptionalAction
    elif each:  # several values after one flag
        more.update(type=each, nargs="+", metavar=item.name.upper().removesuffix("S"))
    else:
        kind = _integers if isinstance(value, tuple) else type(value)
        more.update(type=kind, choices=choices, metavar=None if choices else item.name.upper().split("_")[-1])
    group.add_argument("--" + item.name.replace("_", "-"), **more)


def take_flags(kind, args):
    """The fields of a dataclass among parsed flags, which are taken out of the dict `args` → dict."""
    return {item.name: args.pop(item.name) for item in dataclasses.fields(kind) if item.name in args}


def _integers(text):
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of whole numbers such as 1,2,4")
    return tuple(map(int, text.split(",")))


# ---------------------------------------------------------------------------------------------
# Corpora


def read_captions(path):
    """Yield the captions of one corpus, streaming.

    Args:
        path: a text file, COCO captions JSON or Flickr token file, each possibly .gz, or a folder
            whose .txt files (at any depth, in sorted order) hold one caption per line.
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
        whole = explained(f"corpus '{file}' is not a whole gzip file", gzip.BadGzipFile, EOFError)
        text = explained(f"corpus '{file}' is not UTF-8 text (a counts file is for prior.py merge)", UnicodeDecodeError)
        with whole, text, (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            if file.name.removesuffix(".gz").endswith(".json"):
                yield from _json_captions(stream, file)
            else:
                captions = (re.sub(r"^\S+#\d+\t", "", line).strip() for line in stream)
                yield from filter(None, captions)


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

        for resource in self._missing(nltk) if download else ():
            nltk.download(resource, quiet=True)
        if missing := self._missing(nltk):
            raise UserError(
                f"NLTK data missing: {', '.join(missing)} (tagger, tokenizer and WordNet decide the parts of speech); "
                f"get them with: python -m nltk.downloader {' '.join(missing)}   (or let prior.py --download do it; a local copy: NLTK_DATA=DIR)"
            )
        from nltk.corpus import wordnet
        from nltk.tag.perceptron import PerceptronTagger

        with explained("this version of NLTK wants averaged_perceptron_tagger_eng.zip unpacked, in the folder where it lies", TypeError):
            self.tagger = PerceptronTagger()
        self.tokenizer, self.split_sentences = nltk.NLTKWordTokenizer(), nltk.sent_tokenize
        self.tagger.model = DensePerceptron(self.tagger.model)
        self.known = {pos: frozenset(wordnet.all_lemma_names(pos)) for pos in "anr"}
        self.wordnet, self.lemmatize = wordnet, nltk.WordNetLemmatizer().lemmatize

    def __reduce__(self):
        return WordNetSpeech, ()  # workers that are not forked load their own

    @staticmethod
    def _missing(nltk):
        def there(path):
            try:
                return bool(nltk.data.find(path))
            except LookupError:
                return False

        return [name for name, path in WordNetSpeech.RESOURCES.items() if not there(path) and not there(f"{path}.zip")]

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

    @functools.lru_cache(MEMORY)
    def noun(self, word):
        """Singular of a noun WordNet knows, or None."""
        # WordNet knows "men", the workforce, as a word of its own
        lemma = "man" if word == "men" else self.lemmatize(word, "n") if word.isalpha() and len(word) > 1 else None
        return lemma if lemma in self.known["n"] else None

    @functools.lru_cache(MEMORY)
    def verb(self, word):
        """Base form of a verb WordNet knows, or None."""
        return self.wordnet.morphy(word, "v")

    def lists(self, word, tag):
        """Whether WordNet lists the word in the part of speech of an adjective's, adverb's or verb's tag."""
        kind = tag[:2]
        return self.is_adjective(word) if kind == "JJ" else word in self.known["r"] if kind == "RB" else self.verb(word) is not None

    def knows(self, word):
        """Whether WordNet, or the tagger's list of frequent words, holds the word: a vocabulary that no corpus outgrows."""
        return word in self.tagger.tagdict or any(word in listed for listed in self.known.values()) or self.verb(word) is not None

    @functools.lru_cache(MEMORY)
    def mostly_adjective(self, word):
        """Whether WordNet's sense counts of the word as an adjective exceed those as an adverb."""
        count = lambda pos: sum(lemma.count() for lemma in self.wordnet.lemmas(word, pos))
        return self.is_adjective(word) and count("a") > count("r")


class DensePerceptron:
    """An averaged perceptron of NLTK's with its weights in one matrix: the same tags in half the time.

    Args:
        model: with `weights`, dict feature → dict label → weight, and `classes`, the labels.
    """

    def __init__(self, model):
        self.labels = sorted(model.classes, reverse=True)  # of equal scores NLTK takes the last label
        self.rows = {feature: row for row, feature in enumerate(model.weights)}
        self.weights = np.zeros((len(self.rows), len(self.labels)))
        column = {label: i for i, label in enumerate(self.labels)}
        for row, weights in zip(self.weights, model.weights.values()):
            row[[column[label] for label in weights]] = list(weights.values())

    def predict(self, features, return_conf=False):
        """Features that are present → (label, None for the confidence that nothing here asks for)."""
        rows = [self.rows[feature] for feature in features if feature in self.rows]
        return self.labels[self.weights[rows].sum(axis=0).argmax()], None


class WordListSpeech:
    """Parts of speech by two lists of words, for text whose language is known in advance.

    Args:
        adjectives, nouns: words; a noun's regular plural is recognised, others through `plurals`.
        plurals: irregular plural → singular.
    """

    name = "word list"
    TAGGED = "and/CC or/CC but/CC ,/, ./. a/DT an/DT the/DT this/DT its/PRP$ very/RB of/IN in/IN on/IN with/IN is/VBZ are/VBP"
    TAGS = dict(word.split("/") for word in TAGGED.split())

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

    def knows(self, word):
        return True

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
    corpora: Counter = field(default_factory=Counter)  # name → captions

    TABLES = ("words", "pairs", "contexts")

    def add(self, other):
        self.captions += other.captions
        for name in (*self.TABLES, "corpora"):
            getattr(self, name).update(getattr(other, name))

    def save(self, path, notes):
        """Write a .npz: each table as rows (i, j, count) of two indices into one sorted vocabulary, and the JSON `notes`."""
        vocabulary = sorted({word for name in self.TABLES for key in getattr(self, name) for word in key})
        index = {word: i for i, word in enumerate(vocabulary)}
        tables = {name: [(index[a], index[b], n) for (a, b), n in sorted(getattr(self, name).items())] for name in self.TABLES}
        tables = {name: np.array(rows, np.int64).reshape(-1, 3) for name, rows in tables.items()}
        notes = json.dumps({**notes, "captions": self.captions, "corpora": self.corpora})
        save_arrays(path, counts=notes, vocabulary=np.array(vocabulary, dtype=str), **tables)

    @classmethod
    def load(cls, path):
        """Read a file of `save` → (Counts, notes). Raises UserError where it is missing or something else."""
        arrays = load_arrays(path, ("counts", "vocabulary", *cls.TABLES), "counts file", "python prior.py count CORPUS")
        notes, words = json.loads(str(arrays["counts"])), arrays["vocabulary"].tolist()
        tables = {name: Counter({(words[i], words[j]): n for i, j, n in arrays[name].tolist()}) for name in cls.TABLES}
        return cls(notes.pop("captions"), **tables, corpora=Counter(notes.pop("corpora"))), notes


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
                lemmas = [token.lemma if speech.knows(token.lemma) else None for token in tokens if token.word[0].isalpha()]
                near = ((lemma, other) for i, lemma in enumerate(lemmas) for other in lemmas[i + 1 : i + 1 + WINDOW])
                counts.contexts.update((a, b) if a < b else (b, a) for a, b in near if a and b)
    return counts


def _start_worker(speech, contexts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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


def glove_vectors(path, wanted, dim=0):
    """Vectors of GloVe's text format, `word v1 … vd` a line, as it is or inside a .zip or .gz.

    Args:
        path: the file; a word2vec header line is skipped.
        wanted: words to keep, so that memory is that of the vocabulary.
        dim: dimensions to insist on, and which file of a .zip of several, `*.{dim}d.txt`; 0 takes what there is.
    Returns:
        dict word → (d,) float32.
    Raises:
        UserError: missing file, not UTF-8, a row of another length or not of finite numbers.
    """
    vectors, width, where = {}, None, f"vectors '{path}'"
    with (
        explained(f"{where} are not UTF-8 text; expected GloVe's `word v1 … vd` lines", UnicodeDecodeError),
        _open_text(path, dim) as stream,
    ):
        for number, line in enumerate(stream, 1):
            line = line.rstrip()
            if not line or number == 1 and re.fullmatch(r"\d+ \d+", line):
                continue
            if width is None:
                width = line.count(" ")
                if not width:
                    raise UserError(f"{where}: line {number} is not a word and its numbers, as in GloVe's text")
                if dim not in (0, width):
                    raise UserError(f"{where} have {width} dimensions, --dim asks for {dim}")
            word, *values = line.rsplit(" ", width)  # from the right: a word may contain spaces
            if len(values) != width:
                raise UserError(f"{where}: line {number} has {len(values)} numbers, the first has {width}")
            if word in wanted:
                with explained(f"{where}: line {number} is not a word and {width} numbers", ValueError):
                    vectors[word] = np.array(values, dtype=np.float32)
                if not np.isfinite(vectors[word]).all():
                    raise UserError(f"{where}: line {number} ('{word}') holds a number that is not finite")
    if wanted and not vectors:
        raise UserError(f"vectors '{path}' hold none of the {len(wanted):,} words; expected GloVe's `word v1 … vd` lines")
    return vectors


@contextmanager
def _open_text(path, dim):
    """The text inside a file, a .gz, or a .zip: its one member, or of several the one of `dim` dimensions (0: 100)."""
    if not path or not Path(path).is_file():
        said = f"'{path}' is no file: --weights" if path else "--embeddings glove needs --weights FILE,"
        raise UserError(f"{said} GloVe's text or zip file (nlp.stanford.edu/projects/glove)")
    path = Path(path)
    with explained(f"vectors '{path}' are not a whole archive", zipfile.BadZipFile, gzip.BadGzipFile, EOFError), ExitStack() as stack:
        if path.suffix == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = [name for name in archive.namelist() if name.endswith(".txt")]
            members = members if len(members) == 1 else [name for name in members if name.endswith(f".{dim or 100}d.txt")]
            if len(members) != 1:
                raise UserError(
                    f"vectors '{path}': {len(members)} files inside of {dim or 100} dimensions, expected one; choose with --dim"
                )
            stream = io.TextIOWrapper(archive.open(members[0]), encoding="utf-8", newline="\n")
        else:
            stream = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n")
        yield stack.enter_context(stream)


def corpus_vectors(contexts, min_count=1, dim=0):
    """Word vectors of the corpus itself: positive PMI, then truncated SVD (Levy & Goldberg 2014).

    PPMI(w, c) = max(0, log P(w, c) / (P(w) P(c)^¾ normalised)), factored as U Σ Vᵀ; a word is its
    row of U Σ^½. No download, and deterministic.

    Args:
        contexts: Counter of sorted word pairs (w, c), as in Counts.
        min_count: words with fewer neighbours in all are left out.
        dim: columns kept; 0 takes 100, or what there is.
    Returns:
        dict word → (dim,) float32.
    Raises:
        UserError: if fewer than three words are left, or no more than `dim`.
    """
    totals = Counter()
    for (a, b), count in contexts.items():
        totals[a] += count
        totals[b] += count
    words = sorted(word for word, count in totals.items() if count >= min_count)
    if len(words) < 3:
        raise UserError(f"{len(words)} words have neighbours often enough; give a larger corpus, a lower --min-count or other --embeddings")
    if dim >= len(words):
        raise UserError(f"--dim {dim}: vectors of {len(words)} words have at most {len(words) - 1} dimensions")
    index = {word: i for i, word in enumerate(words)}
    kept = [(index[a], index[b], count) for (a, b), count in sorted(contexts.items()) if a in index and b in index]
    row, column, count = np.array(kept, dtype=np.float64).T
    matrix = scipy.sparse.coo_array((count, (row.astype(int), column.astype(int))), shape=(len(words),) * 2).tocsr()
    matrix = (matrix + matrix.T).tocoo()
    frequency = matrix.sum(axis=0)
    smoothed = frequency**0.75 / (frequency**0.75).sum()  # lifts the PMI of rare contexts less
    pmi = np.log(matrix.data / (frequency[matrix.coords[0]] * smoothed[matrix.coords[1]]))
    ppmi = scipy.sparse.coo_array((np.maximum(pmi, 0), matrix.coords), shape=matrix.shape).tocsr()
    u, s, _ = scipy.sparse.linalg.svds(ppmi, k=dim or min(100, len(words) - 1), v0=np.ones(len(words)))
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
# Published files: tensors on disk, whole downloads, and one tensor out of a file on a server

SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
STRIP = """
  import torch, types
  with torch.serialization.safe_globals([(types.SimpleNamespace, name) for name in {names}]):
      torch.save(torch.load("{path}", map_location="cpu", weights_only=True)["state_dict"], "stripped.pt")"""


def read_tensors(path, wanted=""):
    """Tensors of a published file by name, as numpy arrays.

    Args:
        path: .safetensors, or whatever torch.save wrote (.bin, .pt, .ckpt); a "state_dict" inside is opened.
        wanted: regular expression; only names that it finds are read.
    Raises:
        UserError: for a file that is missing, damaged, or that holds objects other than tensors.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights '{path}' are no file")
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:

            def read(start, stop):
                file.seek(start)
                return file.read(stop - start)

            start, header = safetensors_header(read, path)
            entries = {name: entry for name, entry in header.items() if re.search(wanted, name)}
            return {name: safetensors_tensor(read, start, entry, f"{path}: {name}") for name, entry in entries.items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "Unsupported global" not in str(error):
            raise UserError(f"weights '{path}' cannot be read; they are damaged or no file of torch.save") from None
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # of torch before 1.6: not a zip
            names = re.findall(r"GLOBAL (\S+)", str(error))
        strip = STRIP.format(path=path, names=names)
        raise UserError(
            f"weights '{path}' carry more than tensors ({', '.join(names)}); without running any of it, strip them with:{strip}"
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and re.search(wanted, name)}
    return {name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy() for name, value in tensors.items()}


def safetensors_header(read, name):
    """Eight bytes of length, then JSON: name → dtype, shape, data_offsets.

    Args:
        read: function (start, stop) → those bytes of the file.
    Returns:
        the position that data_offsets count from, and the entries.
    Raises:
        UserError: if it is no such file.
    """
    length = int.from_bytes(read(0, 8), "little")
    with explained(f"'{name}' is not a safetensors file (or is damaged)", ValueError, AttributeError):
        if not 2 <= length <= 100_000_000:  # the format's own limit
            raise ValueError
        header = json.loads(read(8, 8 + length))
        return 8 + length, {key: entry for key, entry in header.items() if key != "__metadata__"}


def safetensors_tensor(read, start, entry, name):
    """One entry of a header → array; bfloat16 becomes float32. Raises UserError where bytes, dtype and shape disagree."""
    damaged = f"'{name}': {entry} does not fit its bytes; the file is damaged, or of a type not read here"
    with explained(damaged, KeyError, TypeError, ValueError):
        dtype, shape, (begin, end) = np.dtype(SAFETENSORS[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError
        array = np.frombuffer(read(start + begin, start + end), dtype).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array


def read_range(url, start, stop, progress=lambda text: None):
    """Bytes start … stop − 1 of a file on a server, also of one that ignores ranges and sends the file from its beginning.

    Raises:
        UserError: if the connection is cut or the server sends another range.
        OSError, http.client.HTTPException, ValueError: if it is unavailable.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}", "User-Agent": "vqct"})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise UserError(f"{url}: asked for bytes from {start}, the server sent {response.headers.get('Content-Range')}")
        skip, data = 0 if response.status == 206 else start, bytearray()
        while skip or len(data) < stop - start:
            try:
                block = response.read(min(1 << 20, skip or stop - start - len(data)))
            except (http.client.HTTPException, OSError):
                block = b""
            if not block:
                raise UserError(f"{url}: the connection was cut after {len(data):,} of {stop - start:,} bytes; nothing was kept, try again")
            if skip:
                skip -= len(block)
            else:
                data += block
            progress(
                f"downloading: {'skipping ' + format(skip / 1e6, ',.0f') if skip else format(len(data) / 1e6, ',.0f')} of {(stop - start) / 1e6:,.0f} MB"
            )
    return bytes(data)


def cache_folder():
    """Where downloads are kept: torch hub's folder, which TORCH_HOME moves."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(url, what, advice, sha256=None, name=None):
    """A published file, whole: from the cache or downloaded → path.

    Args:
        what: its use; advice: how to give a local copy. Both are for the error.
        sha256: hexadecimal; of its start alone, which torchvision puts into names, only a download is held to it.
        name: of the cached file, by default the last part of the URL.
    Raises:
        UserError: one line with the file, its use, its source and the advice.
    """
    import torch

    path = cache_folder() / (name or url.rsplit("/", 1)[-1])
    if path.is_file() and (len(sha256 or "") < 64 or checksum(path) == sha256):
        return path
    with explained(f"{path.name} ({what}) is unavailable: {{}}; get it from {url} and {advice}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, path, hash_prefix=sha256)  # complete and verified, or not there
    return path


# ---------------------------------------------------------------------------------------------
# Language models with token tables: CLIP and the BERT family

TABLE = r"(^|\.)(token_embedding|embeddings\.word_embeddings|word_embeddings)\.weight$"
CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_ARCHIVE = f"https://openaipublic.azureedge.net/clip/models/{CLIP_SHA256}/ViT-B-32.pt"
CLIP_MERGES = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
CLIP_MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_FOLDER = "openai/clip-vit-base-patch32/resolve"  # at huggingface.co, or where HF_ENDPOINT says
CLIP_SHAPE = (49408, 512)  # of ViT-B/32's token table
PROMPTS = {"adjective": ("a photo of", "object"), "noun": ("a photo of", "")}  # before and after the word, as in the authors' code


class TokenModel:
    """The token embeddings of a language model, and the tokens that a word falls into.

    Args:
        ids: dict token → row; CLIP's byte-pair tokens end a word with `</w>`, BERT's word pieces go on with `##`.
        table: (V, d) array, V at least the vocabulary's.
        source: what a prior's provenance says of them.
        archive: CLIP's, where it came from one.
    Raises:
        UserError: if there are fewer rows than tokens.
    """

    def __init__(self, ids, table, source, archive=None):
        self.ids, self.table, self.source, self.archive = ids, np.asarray(table, dtype=np.float32), source, archive
        self.byte_pairs = any(token.endswith("</w>") for token in ids)
        if self.table.ndim != 2 or len(self.table) <= max(ids.values(), default=0):
            raise UserError(f"{source['file']}: a table of shape {self.table.shape} has no row for each of {len(ids):,} tokens")

    def words(self):
        """The vocabulary's whole words."""
        if self.byte_pairs:
            return [token.removesuffix("</w>") for token in self.ids if token.endswith("</w>")]
        return [token for token in self.ids if not token.startswith("##")]

    def rows(self, word):
        """Rows of a word's tokens in order; none where the vocabulary cannot spell it."""
        pieces = []
        for part in re.findall(r"[^\W\d_]+|\d|[^\w\s]+|_" if self.byte_pairs else r"\w+|[^\w\s]", word):
            spelled = self._byte_pairs(part) if self.byte_pairs else self._word_pieces(part)
            if not all(piece in self.ids for piece in spelled):
                return []
            pieces += spelled
        return [self.ids[piece] for piece in pieces]

    def _byte_pairs(self, word):
        """Byte-pair encoding (Sennrich et al. 2016): the pair of lowest rank joins first; a token's rank is its row."""
        parts = [BYTES[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, i = min((self.ids.get(a + b, math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def _word_pieces(self, word):
        """WordPiece (Wu et al. 2016): the longest known piece from the left, each after the first marked `##`."""
        pieces = []
        while word:
            mark = "##" if pieces else ""
            end = next((end for end in range(len(word), 1, -1) if mark + word[:end] in self.ids), 1)
            pieces.append(mark + word[:end])
            word = word[end:]
        return pieces

    def vectors(self, words, multi_token="drop"):
        """Vectors of words, and the words that are several tokens.

        Args:
            multi_token: "drop" leaves those out, as the paper filters tokens; "mean" averages their tokens.
        Returns:
            dict word → (d,) float32, and a sorted list.
        """
        rows = {word: self.rows(word) for word in words}
        kept = {word: self.table[of].mean(axis=0) for word, of in rows.items() if len(of) == 1 or of and multi_token == "mean"}
        return kept, sorted(word for word, of in rows.items() if len(of) > 1)


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# A character for each byte, in the order of CLIP's vocabulary (GPT-2's table: printable bytes stand for themselves)
BYTES = {byte: chr(byte) for byte in _PRINTABLE}
BYTES.update((byte, chr(256 + i)) for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE))


def clip_vocabulary(path):
    """dict token → row from CLIP's merges file: 256 bytes, these at a word's end, a token for each merge, two marks."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        merges = file.read().splitlines()[1 : 1 + CLIP_SHAPE[0] - 512 - 2]  # after a line with the version; CLIP takes the first of many
    tokens = [*BYTES.values(), *(byte + "</w>" for byte in BYTES.values()), *(merge.replace(" ", "") for merge in merges)]
    return {token: row for row, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def folder_tokens(folder, vocabulary):
    """TokenModel of a Hugging Face folder.

    Args:
        folder: with model.safetensors or pytorch_model.bin.
        vocabulary: "vocab.json" (CLIP) or "vocab.txt" (BERT), beside it.
    Raises:
        UserError: naming what is missing.
    """
    folder = Path(folder)
    weights = next((path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).is_file()), None)
    if weights is None or not (folder / vocabulary).is_file():
        missing = "model.safetensors or pytorch_model.bin" if weights is None else vocabulary
        raise UserError(f"'{folder}' holds no {missing}: --weights wants the folder of a published model, {vocabulary} and its weights")
    with explained(f"vocabulary '{folder / vocabulary}' cannot be read", ValueError, TypeError):
        text = (folder / vocabulary).read_text(encoding="utf-8")
        lines = text.removesuffix("\n").split("\n")  # and at no other mark that ends a line, as some are tokens
        ids = dict(json.loads(text)) if vocabulary.endswith(".json") else {token: row for row, token in enumerate(lines)}
    tables = list(read_tensors(weights, TABLE).values())
    if len(tables) != 1:
        raise UserError(f"'{weights}' holds {len(tables)} tables of token embeddings, expected one")
    return TokenModel(ids, tables[0], {"file": weights.name, "sha256": checksum(weights)})


def archive_tokens(path="", sha256=""):
    """TokenModel of CLIP's published TorchScript archive, which is opened only after its checksum is verified.

    Args:
        path: of a local copy, with CLIP's merges file beside it; what is not there is downloaded.
        sha256: of an archive other than ViT-B/32's.
    Raises:
        UserError: if it is another file, or unavailable.
    """
    import torch

    path = Path(path or fetch(CLIP_ARCHIVE, "CLIP ViT-B/32's archive", "pass --weights FILE", CLIP_SHA256))
    if not path.is_file():
        raise UserError(f"'{path}' is no file: CLIP's archive is wanted; get {CLIP_ARCHIVE} and point --weights at it")
    if (found := checksum(path)) != (sha256 or CLIP_SHA256):
        raise UserError(
            f"'{path}' is not the published archive: its sha256 is {found}, not {sha256 or CLIP_SHA256} "
            "(for another archive give --sha256; a Hugging Face model is named by its folder)"
        )
    beside = path.parent / CLIP_MERGES.rsplit("/", 1)[-1]
    merges = beside if beside.is_file() else fetch(CLIP_MERGES, "CLIP's vocabulary", "put it beside the archive", CLIP_MERGES_SHA256)
    foreign = f"'{path}' is not a TorchScript archive with a token_embedding.weight, as CLIP's is"
    with explained(foreign, RuntimeError, KeyError), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch advises against writing new archives; this one is published
        archive = torch.jit.load(path, map_location="cpu").eval()
        table = archive.state_dict()["token_embedding.weight"].float().numpy()
    return TokenModel(clip_vocabulary(merges), table, {"file": path.name, "sha256": found}, archive)


def clip_tokens(weights="", revision="refs/pr/15", sha256=""):
    """CLIP's TokenModel from a folder, an archive or, with neither, the one tensor of the published folder by HTTP range.

    Args:
        revision: of the published folder; where it holds no model.safetensors, the archive is downloaded whole.
    """
    if weights:
        return folder_tokens(weights, "vocab.json") if Path(weights).is_dir() else archive_tokens(weights, sha256)
    host, quoted = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), urllib.parse.quote(revision, safe="")
    url = f"{host}/{CLIP_FOLDER}/{quoted}"
    try:
        return _downloaded_tokens(url, cache_folder() / f"clip-vit-base-patch32-{quoted}-tokens.npz")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 404:
            raise UserError(
                f"CLIP's token table (model.safetensors and vocab.json of {url}) is unavailable: {error or type(error).__name__}; "
                "nothing was kept; point --weights at a local copy of that folder, or of the archive ViT-B-32.pt"
            ) from None
    print(f"{url} holds no model.safetensors; taking the archive of 354 MB")
    return archive_tokens()


def _downloaded_tokens(url, cache):
    """The token table of a published folder, and its vocabulary; kept in `cache` with the table's own sha256."""
    try:
        kept = load_arrays(cache, ("ids", "table", "sha256"), "token table", "another download")  # a zip holds checksums of its members
        return TokenModel(json.loads(str(kept["ids"])), kept["table"], {"file": url, "sha256": str(kept["sha256"])})
    except UserError as error:
        print(f"{error}, now" if cache.exists() else f"no token table of CLIP in {cache.parent} yet; downloading it")
    read = functools.partial(read_range, f"{url}/model.safetensors")
    start, header = safetensors_header(read, url)
    found = [entry for name, entry in header.items() if re.search(TABLE, name)]
    if len(found) != 1 or found[0]["dtype"] not in ("F32", "F16") or tuple(found[0]["shape"]) != CLIP_SHAPE:
        raise UserError(f"{url}: expected one token table of shape {CLIP_SHAPE}, float32 or float16; found {found}")
    table = safetensors_tensor(functools.partial(read, progress=Progress()), start, found[0], url)
    with urllib.request.urlopen(f"{url}/vocab.json", timeout=60) as response:
        ids = json.load(response)
    sha256 = hashlib.sha256(table.tobytes()).hexdigest()
    model = TokenModel(ids, table, {"file": url, "sha256": sha256})
    save_arrays(cache, ids=json.dumps(ids), table=table, sha256=sha256)
    return model


def prompt_vectors(tokens, words, batch_size=256):
    """What the authors' code takes: CLIP's `encode_text` of a prompt for each word that is one token.

    Args:
        tokens: of `archive_tokens`; the archive runs on the CPU in float32.
        words: dict part → words.
    Returns:
        dict part → dict word → (d,) float32: an adjective's and a noun's vectors differ, as their prompts do.
    """
    import torch

    archive, vectors, progress = tokens.archive.float(), {}, Progress()
    _free_of_cuda(archive)
    length = archive.state_dict()["positional_embedding"].shape[0]
    for part in PARTS:
        before, after = (sum((tokens.rows(word) for word in text.split()), []) for text in PROMPTS[part])
        single = [word for word in words[part] if len(tokens.rows(word)) == 1]
        prompts = torch.zeros(len(single), length, dtype=torch.int64)
        for prompt, word in zip(prompts, single):
            ids = [tokens.ids["<|startoftext|>"], *before, *tokens.rows(word), *after, tokens.ids["<|endoftext|>"]]
            prompt[: len(ids)] = torch.tensor(ids)
        vectors[part] = {}
        for start in range(0, len(single), batch_size):
            with torch.no_grad():
                features = archive.encode_text(prompts[start : start + batch_size]).numpy()
            vectors[part].update(zip(single[start:], features))
            progress(f"encoding prompts: {len(vectors[part]):,} of {len(single):,} {part}s")
    return vectors


def _free_of_cuda(archive):
    """Turn the devices and half precision that tracing on a GPU froze into an archive's graphs into CPU and float32."""
    half, single = 5, 6  # torch's numbers of the types
    graphs = [module._c._get_method(name).graph for module in archive.modules() for name in module._c._method_names()]
    for graph in graphs:
        for node in graph.findAllNodes("prim::Constant"):
            if str(node.output().type()) == "Device":
                node.s_("value", "cpu")
        for value in (value for node in graph.findAllNodes("aten::to") for value in node.inputs()):
            if value.node().kind() == "prim::Constant" and str(value.type()) == "int" and value.node().i("value") == half:
                value.node().i_("value", single)


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
        save_arrays(path, provenance=json.dumps(self.provenance), **arrays)

    @classmethod
    def load(cls, path):
        """Read a .npz of `save`. Raises UserError where it is missing or something else."""
        made_by = "python prior.py CORPUS --out prior.npz"
        arrays = load_arrays(path, cls.__dataclass_fields__, "prior", made_by)
        with explained(f"'{path}' is damaged: {{}}; make it anew with: {made_by}", KeyError, TypeError, ValueError):
            prior = cls(**{**arrays, "provenance": json.loads(str(arrays["provenance"]))})
            for name in PARTS:
                words, vectors = prior[f"{name}_words"], prior[f"{name}_vectors"]
                if not len(words) or vectors.shape != (len(words), prior.provenance["dim"]) or not np.isfinite(vectors).all():
                    raise ValueError(f"its {name}s are not words with a vector of finite numbers each")
        return prior


@dataclass
class PriorConfig:
    """What a prior is made of; the flags of prior.py."""

    embeddings: str = option(
        "corpus",
        "language model: GloVe's vectors; CLIP's token table, or as the authors take its features of a prompt for each word; the token "
        "table of a BERT-like model; PPMI + SVD of the corpus itself, no download; random, a control",
        choices=lambda: LANGUAGE_MODELS,
    )
    weights: str = option(
        "",
        "GloVe's text or zip file; clip: a folder with vocab.json and model.safetensors or pytorch_model.bin, or the archive ViT-B-32.pt "
        "(without: the token table is downloaded); clip-text: the archive (or it is downloaded); bert: a folder with vocab.txt and weights likewise",
    )
    revision: str = option("refs/pr/15", "clip: revision of the published folder, whose main branch may lack model.safetensors")
    sha256: str = option("", "clip: checksum of an archive other than the published ViT-B-32.pt")
    multi_token: str = option(
        "drop", "clip, bert: words of several tokens are dropped, as the paper filters tokens, or get their mean", choices=("drop", "mean")
    )
    min_count: int = option(
        10,
        "times a word must occur in its part of speech to become a code (the authors: more than 10); 0 with clip and bert adds each "
        "whole word of their vocabulary that WordNet lists",
    )
    dim: int = option(0, "dimensions of corpus and random vectors, 0: 100; which of GloVe's to take from its zip")
    seed: int = option(0, "seed of random vectors")


def check_prior_config(config, workers=1):
    """Raise UserError for values that cannot be, or do nothing for the language model chosen, before a corpus is read."""
    model = config.embeddings
    for name in sorted({flag for kind in LANGUAGE_MODELS.values() for flag in kind.flags}):
        models = [other for other, kind in LANGUAGE_MODELS.items() if name in kind.flags]
        if getattr(config, name) != getattr(PriorConfig, name) and model not in models:
            raise UserError(f"--{name.replace('_', '-')} does nothing for {model} vectors; it is for --embeddings {', '.join(models)}")
    if config.min_count < (model not in ("clip", "bert")):
        raise UserError(f"--min-count {config.min_count} must be at least 1 (0 is for clip and bert)")
    if config.dim < 0 or workers < 1:
        raise UserError(f"--dim {config.dim} must not be negative, --workers {workers} be at least 1")
    if model == "glove":
        with _open_text(config.weights, config.dim):
            pass
    if model == "bert" and not config.weights:
        raise UserError("--embeddings bert needs --weights DIR, a folder with vocab.txt and model.safetensors or pytorch_model.bin")


class LanguageModel(NamedTuple):
    """Where vectors come from.

    `vectors` takes (dict part → words, Counts, PriorConfig, TokenModel or None) and gives dict part → dict word → (d,) float32,
    in which words may be missing, and a dict for the prior's provenance.
    """

    flags: tuple  # fields of PriorConfig that it heeds
    vectors: Callable
    tokens: Callable = lambda config: None  # PriorConfig → TokenModel, opened before a corpus is read


def _glove(words, counts, config, tokens):
    vectors = glove_vectors(config.weights, set().union(*words.values()), config.dim)
    return dict.fromkeys(PARTS, vectors), {"file": Path(config.weights).name, "sha256": checksum(config.weights)}


def _token_table(words, counts, config, tokens):
    vectors, several = tokens.vectors(set().union(*words.values()), config.multi_token)
    if not several:
        return dict.fromkeys(PARTS, vectors), tokens.source
    treatment = "averaged" if config.multi_token == "mean" else "dropped"
    print(f"{len(several):,} words are several tokens and {treatment}: {', '.join(several[:8])}{' …' if len(several) > 8 else ''}")
    return dict.fromkeys(PARTS, vectors), {**tokens.source, "several_tokens": {treatment: len(several)}}


def _prompts(words, counts, config, tokens):
    return prompt_vectors(tokens, words), _token_table(words, counts, config, tokens)[1]


def _corpus(words, counts, config, tokens):
    return dict.fromkeys(PARTS, corpus_vectors(counts.contexts, config.min_count, config.dim)), {}


def _random(words, counts, config, tokens):
    return dict.fromkeys(PARTS, random_vectors(set().union(*words.values()), config.dim or 100, config.seed)), {}


# fmt: off
LANGUAGE_MODELS = {  # --embeddings: the one place where a new one is added
    "glove": LanguageModel(("weights", "dim"), _glove),
    "clip": LanguageModel(("weights", "revision", "sha256", "multi_token"), _token_table,
                          lambda config: clip_tokens(config.weights, config.revision, config.sha256)),
    "clip-text": LanguageModel(("weights", "sha256"), _prompts, lambda config: archive_tokens(config.weights, config.sha256)),
    "bert": LanguageModel(("weights", "multi_token"), _token_table, lambda config: folder_tokens(config.weights, "vocab.txt")),
    "corpus": LanguageModel(("dim",), _corpus),
    "random": LanguageModel(("dim", "seed"), _random),
}
# fmt: on


def build_prior(counts, config, tokens=None, speech=None, notes=None):
    """Step 1 and the graph of step 2, from counts.

    Args:
        counts: Counts of the corpora, with contexts for `corpus` vectors.
        config: PriorConfig.
        tokens: TokenModel, where the config names a token table.
        speech: WordNetSpeech, which a `min_count` of 0 needs for the vocabulary's words.
        notes: dict kept in the file beside what this function adds.
    Returns:
        Prior; nodes in order of frequency, then alphabet.
    Raises:
        UserError: if no adjective or no noun is left.
    """
    seen = Counter(counts.words)
    if config.min_count == 0:
        listed = [word for word in tokens.words() if word.isalpha() and len(word) > 2]
        seen.update({(word, "adjective"): 0 for word in listed if speech.is_adjective(word)})
        seen.update({(word, "noun"): 0 for word in listed if speech.noun(word) == word})
    ranked = {
        part: sorted((-count, word) for (word, p), count in seen.items() if p == part and count >= config.min_count) for part in PARTS
    }
    ranked = {part: [word for _, word in pairs] for part, pairs in ranked.items()}
    vectors, source = LANGUAGE_MODELS[config.embeddings].vectors(ranked, counts, config, tokens)
    source = {"name": config.embeddings, **source}
    words = {part: [word for word in ranked[part] if word in vectors[part]] for part in PARTS}
    for part in PARTS:
        if not words[part]:
            raise UserError(
                f"no {part} is left of {counts.captions:,} captions: {len(ranked[part])} seen at least {config.min_count} times, none of them "
                f"with a {config.embeddings} vector; give a larger English corpus or a lower --min-count"
            )
    index = {part: {word: i for i, word in enumerate(words[part])} for part in PARTS}
    edges = sorted(
        (index["adjective"][a], index["noun"][n], count)
        for (a, n), count in counts.pairs.items()
        if a in index["adjective"] and n in index["noun"]
    )
    edges = np.array(edges, dtype=np.int64).reshape(-1, 3)
    stack = {part: np.stack([vectors[part][word] for word in words[part]]) for part in PARTS}
    if "sha256" not in source:  # no file to name, so the vectors' own checksum
        source["sha256"] = hashlib.sha256(b"".join(stack[part].tobytes() for part in PARTS)).hexdigest()
    notes = {
        **(notes or {}),
        "corpora": dict(sorted(counts.corpora.items())),
        "captions": counts.captions,
        "vectors": source,
        "dim": int(stack["noun"].shape[1]),
        "seed": config.seed,
        "version": VERSION,
        "min_count": config.min_count,
        "without_vector": {part: len(ranked[part]) - len(words[part]) for part in PARTS},
    }
    return Prior(np.array(words["adjective"]), stack["adjective"], np.array(words["noun"]), stack["noun"], edges[:, :2], edges[:, 2], notes)


def count_corpora(corpora, speech, contexts=False, workers=1):
    """Counts of all (name, captions), and the notes that a prior keeps of how words were read."""
    total = Counts()
    for name, captions in corpora:
        counts = count_corpus(captions, speech, contexts, workers)
        counts.corpora[name] = counts.captions
        total.add(counts)
    if not total.words:
        raise UserError(f"no adjective or noun in {total.captions:,} captions; is it English text, one caption per line?")
    return total, {"part_of_speech": speech.name, "plurals": getattr(speech, "plurals", {})}


def build_from_corpora(corpora, config, workers=1, speech=None, download=False):
    """Everything from caption sources to a Prior.

    Args:
        corpora: list of (name, iterable of captions).
        config: PriorConfig.
        speech: parts of speech; by default WordNetSpeech, which needs NLTK's data.
    """
    check_prior_config(config, workers)
    tokens, speech = LANGUAGE_MODELS[config.embeddings].tokens(config), speech or WordNetSpeech(download)
    counts, notes = count_corpora(corpora, speech, config.embeddings == "corpus", workers)
    return build_prior(counts, config, tokens, speech, notes)


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


def show_prior(args):
    """Print a prior's sizes, most frequent pairs and neighbourhoods, draw them if asked, and take one caption apart."""
    prior = Prior.load(args.prior)
    chosen = chosen_words(prior, args.words)
    adjectives, nouns = prior.adjective_words, prior.noun_words
    possible = len(adjectives) * len(nouns)
    print(
        f"{len(adjectives):,} adjectives, {len(nouns):,} nouns, {prior.provenance['dim']} dimensions; "
        f"{len(prior.edges):,} edges ({100 * len(prior.edges) / possible:.2f} % of all pairs)"
    )
    for key, value in prior.provenance.items():
        print(f"  {key}: {json.dumps(value)}")
    print("\nmost frequent pairs")
    for i in np.argsort(-prior.edge_counts, kind="stable")[: args.pairs]:
        a, n = prior.edges[i]
        print(f"  {prior.edge_counts[i]:8,}  {adjectives[a]} {nouns[n]}")
    for part in PARTS:
        show_neighbours(prior, part, chosen[part])
    if args.figure:
        draw_codebook_space(prior, chosen, args.figure)
        print(f"\nFig. 1: {args.figure}")
    show_caption(prior, args.caption, args.download)


def show_neighbours(prior, part, chosen, count=6):
    """Print chosen words' cosines with each other, their nearest words, and the words that they modify or are modified by."""
    words, vectors = prior[f"{part}_words"], prior[f"{part}_vectors"]
    others = prior[f"{PARTS[1 - PARTS.index(part)]}_words"]
    near = {word: dict(nearest_words(words, vectors, word, len(words))) for word in chosen}
    if len(chosen) > 1:
        print(f"\n{part}s, cosines: " + ", ".join(f"{a}–{b} {near[a][b]:.2f}" for a, b in itertools.combinations(chosen, 2)))
    for word in chosen:
        edges = prior.edges[:, PARTS.index(part)] == list(words).index(word)
        order = np.argsort(-prior.edge_counts * edges, kind="stable")[: min(count, edges.sum())]
        linked = ", ".join(f"{others[prior.edges[i, 1 - PARTS.index(part)]]} {prior.edge_counts[i]:,}" for i in order)
        print(f"  {word}: near {', '.join(f'{name} {cosine:.2f}' for name, cosine in list(near[word].items())[:count])}")
        print(f"  {'':{len(word)}}  {'modifies' if part == 'adjective' else 'is'} {linked or 'nothing'} ({edges.sum():,} edges)")


def show_caption(prior, caption, download=False):
    """Print what a caption turns into: tags, parts of speech, nodes and modifying pairs."""
    words = {part: [str(word) for word in prior[f"{part}_words"]] for part in PARTS}
    of_list = prior.provenance.get("part_of_speech") == WordListSpeech.name
    speech = WordListSpeech(*words.values(), prior.provenance["plurals"]) if of_list else WordNetSpeech(download)
    nodes = {part: {word: i for i, word in enumerate(words[part])} for part in PARTS}
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


CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


TASKS = {
    "count": "Count the words and pairs of a part of a corpus, for prior.py merge.",
    "merge": "Make a prior from counts, the same as from all of their corpora at once.",
}


def parse(argv, task):
    """Flags of `prior.py CORPUS…`, `prior.py count CORPUS…` and `prior.py merge COUNTS…` → (args, PriorConfig)."""
    parser = Parser(
        prog=f"prior.py {task}".strip(),
        description=TASKS.get(task, __doc__),
        epilog="other commands: " + "; ".join(f"python prior.py {name} --help" for name in ("count", "merge", "show") if name != task),
    )
    what = "file of prior.py count" if task == "merge" else "text, COCO JSON or Flickr file (.gz or not), or a folder of .txt files"
    parser.add_argument("inputs", nargs="+", metavar="COUNTS" if task == "merge" else "CORPUS", help=f"{what}; several add up")
    if task != "count":
        add_flags(parser, PriorConfig())
    else:
        parser.add_argument("--no-contexts", action="store_true", help="without what --embeddings corpus needs: smaller, a little faster")
    if task != "merge":
        parser.add_argument("--workers", type=int, default=CORES, help="processes that tag, nearly all of the time (default: every core)")
    parser.add_argument("--download", action="store_true", help="fetch missing NLTK data (tagger, tokenizer, WordNet: 17 MB)")
    out = "counts.npz" if task == "count" else "prior.npz"
    parser.add_argument("--out", default=out, help=f"file to write (default: {out})")
    args = parser.parse_args(argv)
    return args, PriorConfig(**take_flags(PriorConfig, vars(args)))


def parse_show(argv):
    """Flags of `prior.py show`."""
    parser = Parser(prog="prior.py show", description="Print what a prior holds; draw the paper's Fig. 1.")
    parser.add_argument("prior", metavar="PRIOR", help="a .npz of prior.py")
    parser.add_argument("--caption", default=CAPTION, help="caption to take apart (default: one with the paper's words)")
    parser.add_argument("--pairs", type=int, default=20, help="pairs to print (default: 20)")
    parser.add_argument("--figure", metavar="FILE", help="PNG of nearest neighbours in codebook space (Fig. 1)")
    parser.add_argument("--words", nargs="+", help="words whose neighbours to print and draw (default: the paper's, or the most frequent)")
    parser.add_argument("--download", action="store_true", help="fetch missing NLTK data")
    return parser.parse_args(argv)


def merge_counts(paths, contexts):
    """The sum of counts files, and the notes they share. Raises UserError where they do not belong together."""
    total, shared = Counts(), None
    for i, path in enumerate(paths):
        counts, notes = Counts.load(path)
        if checksum(path) in map(checksum, paths[:i]):
            raise UserError(f"'{path}' holds the same counts as another file given")
        if shared not in (None, notes):
            raise UserError(f"'{path}' was counted in another way than '{paths[0]}' (parts of speech, or --no-contexts)")
        shared = notes
        total.add(counts)
    if contexts and not shared["contexts"]:
        raise UserError("these counts were made with --no-contexts, so --embeddings corpus has nothing to go by; choose other embeddings")
    return total, {name: value for name, value in shared.items() if name != "contexts"}


def write_counts(args):
    """`prior.py count`: words, pairs and neighbours of a part of a corpus."""
    counts, notes = count_corpora(named(args.inputs), WordNetSpeech(args.download), not args.no_contexts, args.workers)
    counts.save(args.out, {**notes, "contexts": not args.no_contexts})
    return counts, f"{len(counts.words):,} words, {len(counts.pairs):,} pairs"


def write_prior(args, config, merge=False):
    """`prior.py` and `prior.py merge`: the paper's steps 1 and 2, from corpora or from their counts."""
    model, contexts = LANGUAGE_MODELS[config.embeddings], config.embeddings == "corpus"
    tokens = model.tokens(config)  # a model that is unavailable is known before the tagging starts
    speech = None if merge and config.min_count else WordNetSpeech(args.download)
    counts, notes = merge_counts(args.inputs, contexts) if merge else count_corpora(named(args.inputs), speech, contexts, args.workers)
    prior = build_prior(counts, config, tokens, speech, notes)
    prior.save(args.out)
    nodes = f"{len(prior.adjective_words):,} adjectives, {len(prior.noun_words):,} nouns, {len(prior.edges):,} edges"
    lost = sum(prior.provenance["without_vector"].values())
    without = f" ({lost:,} words without one)" if lost else ""
    return counts, f"{nodes}, {config.embeddings} vectors of {prior.provenance['dim']} dimensions{without}"


def named(paths):
    """Corpora as (name, captions)."""
    return [(str(path), read_captions(path)) for path in paths]


def main(argv=None):
    """Build a prior in one pass or from counts, or show one."""
    argv = list(sys.argv[1:] if argv is None else argv)
    task = argv.pop(0) if argv[:1] and argv[0] in ("count", "merge", "show") else ""
    if task == "show":
        return show_prior(parse_show(argv))
    args, config = parse(argv, task)
    start, paths = time.monotonic(), [Path(path).resolve() for path in args.inputs]
    check_prior_config(config, getattr(args, "workers", 1))
    if Path(args.out).is_dir() or Path(args.out).resolve() in paths or len(set(paths)) < len(paths):
        raise UserError(f"--out {args.out} must be a file and none of the inputs, and no input may be given twice")
    for path in args.inputs if task != "merge" else ():
        next(read_captions(path), None)  # a wrong path is known before the tagging starts
    counts, what = write_counts(args) if task == "count" else write_prior(args, config, merge=task == "merge")
    print(f"{args.out}: {what} from {counts.captions:,} captions in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    command(main)
