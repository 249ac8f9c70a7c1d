"""Timings against plain forms, in one process: medians of rounds in which both take turns.

    python tests/bench.py                     sampling of tokens with and without a cache
    python tests/bench.py CORPUS              … and the prior's builder against the straightforward algorithm

CORPUS is what prior.py reads: text, COCO captions JSON, a Flickr file or a folder. NLTK's data must be there.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import nltk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from prior import CORES, WordNetSpeech, command, count_corpus, read_captions  # noqa: E402
from vqct import Condition, TokenTransformer, sample_tokens  # noqa: E402


def straightforward_prior(captions):
    """The builder as one writes it first: tokenise and tag every sentence, look words up in lists."""
    adjectives, nouns, edges, lemmatize = [], [], [], nltk.WordNetLemmatizer().lemmatize
    for caption in captions:
        tagged = nltk.pos_tag(nltk.word_tokenize(caption.lower()))
        for (word, tag), (after, after_tag) in zip(tagged, [*tagged[1:], ("", "")]):
            if tag == "JJ" and word not in adjectives:
                adjectives.append(word)
            if tag.startswith("NN") and lemmatize(word, "n") not in nouns:
                nouns.append(lemmatize(word, "n"))
            if tag == "JJ" and after_tag.startswith("NN"):
                pair = word, lemmatize(after, "n")
                if pair not in edges:
                    edges.append(pair)
    return adjectives, nouns, edges


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def bench_prior(corpus, size=20_000, rounds=3):
    """Seconds of counting `size` captions against the straightforward algorithm, and how the time grows with the corpus."""
    speech = WordNetSpeech()
    captions = list(itertools.islice(read_captions(corpus), size))
    straightforward_prior(captions[:100]), count_corpus(captions[:100], speech)  # loads NLTK's data
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(count_corpus, captions, speech, False, CORES))
        theirs.append(seconds(straightforward_prior, captions))
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"prior of {len(captions):,} captions, {CORES} cores: {statistics.median(ours):.2f} s ({min(ours):.2f} … {max(ours):.2f})")
    print(
        f"  straightforward {statistics.median(theirs):.2f} s: {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} … {max(ratios):.2f})"
    )
    alone = statistics.median(seconds(count_corpus, captions, speech, False, 1) for _ in range(rounds))
    print(
        f"  on one core {alone:.2f} s, with the neighbours that corpus vectors need {seconds(count_corpus, captions, speech, True, CORES):.2f} s"
    )
    whole = list(itertools.islice(read_captions(corpus), 10 * size // 2))
    for contexts in (False, True):
        small, large = (
            statistics.median(seconds(count_corpus, whole[:count], speech, contexts, CORES) for _ in range(rounds))
            for count in (len(whole) // 10, len(whole))
        )
        growth = f"{len(whole) // 10:,} captions {small:.2f} s, {len(whole):,} captions {large:.2f} s: 10 × the text takes {large / small:.1f} × the time"
        print(f"  {growth}{' (with neighbours)' if contexts else ''}")


def bench_sampling(batch=8, rounds=3):
    """Seconds of drawing 256 positions of two tokens, with keys and values kept and without."""
    model = TokenTransformer((903, 2888), (16, 16), Condition("none", 0, (16, 16), 256)).eval()
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(sample_tokens, model, batch))
        theirs.append(seconds(lambda: sample_tokens(model, batch, cached=False)))
    ratios = [b / a for a, b in zip(ours, theirs)]
    print(f"{batch} images of 256 positions, 6 blocks of width 256: {statistics.median(ours):.2f} s with a cache")
    print(
        f"  without {statistics.median(theirs):.2f} s: {statistics.median(ratios):.1f} times as long ({min(ratios):.1f} … {max(ratios):.1f})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", metavar="CORPUS", nargs="?", help="captions")
    corpus = parser.parse_args().corpus
    bench_sampling()
    if corpus:
        bench_prior(corpus)


if __name__ == "__main__":
    command(main)
