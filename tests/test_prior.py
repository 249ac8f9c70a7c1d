"""Corpora, parts of speech, the graph and word vectors, on text whose answer is known by hand."""

import gzip
import hashlib
import itertools
import json
import math
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

import prior as prior_module
from conftest import ROOT, SHARED, Foreign, safetensors_bytes
from prior import (
    BYTES,
    Counts,
    Prior,
    PriorConfig,
    TokenModel,
    UserError,
    WordListSpeech,
    build_from_corpora,
    build_prior,
    clip_tokens,
    clip_vocabulary,
    corpus_vectors,
    count_captions,
    count_corpus,
    draw_codebook_space,
    glove_vectors,
    LANGUAGE_MODELS,
    modifying_pairs,
    nearest_words,
    random_vectors,
    read_captions,
    read_tensors,
    resolve_parts,
    rewired,
    shuffled,
    whole_file,
)

# ---------------------------------------------------------------------------------------------
# Corpora

CAPTIONS = ["a small brown bird", "its belly is white"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("plain.txt", "a small brown bird\n\n its belly is white \n"),
        ("plain.txt.gz", "a small brown bird\nits belly is white"),
        ("flickr.token", "1000.jpg#0\ta small brown bird\n1000.jpg#1\tits belly is white\n"),
        (
            "coco.json",
            json.dumps({"info": {}, "images": [{"id": 1}] * 50, "annotations": [{"id": i, "caption": c} for i, c in enumerate(CAPTIONS)]}),
        ),
        (
            "coco.json.gz",
            json.dumps({"annotations": [{"caption": "a small  brown\nbird"}, {"caption": CAPTIONS[1]}], "licenses": []}, indent=1),
        ),
    ],
)
def test_corpus_formats(tmp_path, name, text):
    path = tmp_path / name
    with gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w") as file:
        file.write(text)
    assert list(read_captions(path)) == CAPTIONS


def test_json_captions_across_blocks(tmp_path):
    captions = [f'bird {i} says "hé" }} ],' for i in range(200)]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"annotations": [{"caption": c} for c in captions]}, ensure_ascii=False))
    for block in (1, 7, 64):
        with open(path) as stream:
            assert list(prior_module._json_captions(stream, "c", block)) == captions


def test_folder_of_captions(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("its belly is white\n")
    (tmp_path / "a.txt").write_text("a small brown bird\n")
    assert list(read_captions(tmp_path)) == CAPTIONS


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.txt", None, "does not exist"),
        ("latin.txt", "é".encode("latin-1") * 9, "not UTF-8"),
        ("broken.txt.gz", b"\x1f\x8bnothing", "not a whole gzip"),
        ("x.json", b"{}", "annotations"),
        ("x.json", b'{"annotations": [{"bbox": 1}]}', 'no "caption"'),
        ("x.json", b'{"annotations": [{"caption": "a', "ends in the middle"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_captions(tmp_path / name))
    assert name in str(error.value)


# ---------------------------------------------------------------------------------------------
# Parts of speech: the rules on tagged text, then NLTK's own tagger on the paper's words


class Excerpt:
    """The entries of WordNet that the sentences below need."""

    name = "excerpt"
    adjectives = set(
        "pointed covered bright orange small brown white striped spotted short sharp standing stone back yellow blue black round ripe long".split()
    )
    nouns = set("orange breast bird beak belly wing stone wall back table yellow blue black white brown round crown man hat".split())

    def is_adjective(self, word):
        return word in self.adjectives

    def noun(self, word):
        return next((w for w in (word, word.removesuffix("s")) if w in self.nouns), None)

    def verb(self, word):
        return {"striped": "stripe", "spotted": "spot", "pointed": "point", "covered": "cover", "standing": "stand"}.get(word)

    def lists(self, word, tag):
        return tag.startswith("VB") or tag.startswith("JJ") and word in self.adjectives or word in ("back", "long")

    def mostly_adjective(self, word):
        return word == "long"


def pairs_of(text):
    tagged = [tuple(token.rsplit("/", 1)) for token in text.split()]
    return list(modifying_pairs(resolve_parts(tagged, Excerpt()), Excerpt()))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a/DT small/JJ brown/JJ bird/NN", [("small", "bird"), ("brown", "bird")]),
        ("a/DT bright/JJ orange/NN breast/NN", [("bright", "breast"), ("orange", "breast")]),  # the tagger's slip
        ("a/DT ripe/JJ orange/NN on/IN a/DT table/NN", [("ripe", "orange")]),  # the fruit
        ("an/DT orange/NN and/CC black/JJ bird/NN", [("orange", "bird"), ("black", "bird")]),
        ("its/PRP$ back/NN and/CC white/JJ belly/NN", [("white", "belly")]),
        ("striped/VBD wings/NNS and/CC a/DT spotted/VBN breast/NN", [("striped", "wing"), ("spotted", "breast")]),
        ("a/DT bird/NN standing/VBG on/IN a/DT stone/NN wall/NN", [("stone", "wall")]),
        ("a/DT man/NN standing/VBG bird/NN", []),
        ("a/DT bright/JJ yellow/NN belly/RB", [("bright", "belly"), ("yellow", "belly")]),
        ("a/DT small/JJ ,/, round/JJ and/CC brown/JJ bird/NN", [("small", "bird"), ("round", "bird"), ("brown", "bird")]),
        ("white/JJ belly/NN ,/, black/JJ crown/NN", [("white", "belly"), ("black", "crown")]),
        ("its/PRP$ belly/NN is/VBZ white/JJ", [("white", "belly")]),
        ("its/PRP$ belly/NN is/VBZ mostly/RB white/JJ and/CC brown/NN ./.", [("white", "belly"), ("brown", "belly")]),
        ("its/PRP$ belly/NN and/CC breast/NN are/VBP white/JJ", [("white", "breast"), ("white", "belly")]),
        ("this/DT bird/NN has/VBZ a/DT white/JJ belly/NN and/CC is/VBZ brown/JJ", [("white", "belly"), ("brown", "bird")]),
        ("the/DT belly/NN of/IN the/DT bird/NN is/VBZ white/JJ", [("white", "belly")]),
        ("a/DT bird/NN with/IN wings/NNS that/WDT are/VBP brown/JJ", [("brown", "wing")]),
        ("this/DT is/VBZ a/DT small/JJ bird/NN", [("small", "bird")]),
        ("the/DT small/JJ bird/NN 's/POS belly/NN", [("small", "bird")]),
        ("a/DT small/JJ eyering/NN", []),  # a head without a node
        ("a/DT long-billed/JJ brown/JJ bird/NN", [("brown", "bird")]),
        ("the/DT man/NN is/VBZ standing/VBG", []),
        ("the/DT table/NN is/VBZ covered/VBN with/IN stone/NN", []),
        ("it/PRP has/VBZ brown/VBN wings/NNS", [("brown", "wing")]),
        ("it/PRP has/VBZ striped/VBN wings/NNS", [("striped", "wing")]),
        ("its/PRP$ beak/NN is/VBZ very/RB long/RB and/CC pointed/VBN ./.", [("long", "beak"), ("pointed", "beak")]),
        ("a/DT black/JJ back/RB and/CC a/DT white/JJ belly/NN", [("black", "back"), ("white", "belly")]),
        ("Brown/NN and/CC white/JJ bird/NN", [("brown", "bird"), ("white", "bird")]),
        ("a/DT short/JJ ,/, pointed/VBD ,/, black/JJ beak/NN", [("short", "beak"), ("pointed", "beak"), ("black", "beak")]),
        ("the/DT crown/NN ,/, back/NN and/CC breast/NN are/VBP white/JJ", [("white", "breast"), ("white", "back"), ("white", "crown")]),
    ],
)
def test_modifying_pairs_of_tagged_text(text, expected):
    assert pairs_of(text) == expected


def pairs_in(speech, caption):
    return {pair for tokens in speech(caption) for pair in modifying_pairs(tokens, speech)}


@pytest.mark.parametrize(
    "caption, expected",
    [
        (
            "This small brown bird has a bright orange breast and a short sharp beak.",
            {("small", "bird"), ("brown", "bird"), ("bright", "breast"), ("orange", "breast"), ("short", "beak"), ("sharp", "beak")},
        ),
        ("a bright yellow belly and a blue crown", {("bright", "belly"), ("yellow", "belly"), ("blue", "crown")}),
        ("its belly is white", {("white", "belly")}),
        ("The beak is sharp. Its wings are brown and white.", {("sharp", "beak"), ("brown", "wing"), ("white", "wing")}),
        ("a ripe orange on a wooden table", {("ripe", "orange"), ("wooden", "table")}),
        ("an orange and black bird", {("orange", "bird"), ("black", "bird")}),
        ("This bird has brown wings and a black back.", {("brown", "wing"), ("black", "back")}),
        ("The bird has webbed feet, and its beak is very long.", {("webbed", "foot"), ("long", "beak")}),
        ("A Red Bus Is Parked In A Field", {("red", "bus")}),
        ("the bird is small, round and brown", {("small", "bird"), ("round", "bird"), ("brown", "bird")}),
    ],
)
def test_wordnet_speech_on_the_papers_words(speech, caption, expected):
    assert pairs_in(speech, caption) == expected


def test_wordnet_speech_lemmatises_nouns(speech):
    nouns = [t.lemma for s in speech("two wings, feet and feathers") for t in s if t.part == "noun"]
    assert nouns == ["wing", "foot", "feather"]


def test_homographs_are_two_nodes():
    counts = Counts()
    for text in ("a/DT bright/JJ orange/NN breast/NN", "a/DT ripe/JJ orange/NN", "a/DT ripe/JJ orange/NN on/IN a/DT table/NN"):
        tokens = resolve_parts([tuple(token.rsplit("/", 1)) for token in text.split()], Excerpt())
        counts.add(Counts(1, Counter((t.lemma, t.part) for t in tokens if t.part), Counter(modifying_pairs(tokens, Excerpt()))))
    prior = build_prior(counts, PriorConfig("random", dim=4, min_count=1))
    adjectives, nouns = prior.adjective_words.tolist(), prior.noun_words.tolist()
    assert "orange" in adjectives and "orange" in nouns
    edges = {(adjectives[a], nouns[n]): c for (a, n), c in zip(prior.edges.tolist(), prior.edge_counts.tolist())}
    assert edges == {("bright", "breast"): 1, ("orange", "breast"): 1, ("ripe", "orange"): 2}


def test_homographs_are_two_nodes_to_the_real_tagger(speech):
    captions = ["a bright orange breast", "an orange breast", "a ripe orange", "a ripe orange on a table"]
    prior = build_from_corpora([("hand", captions)], PriorConfig("random", dim=4, min_count=1), speech=speech)
    adjectives, nouns = prior.adjective_words.tolist(), prior.noun_words.tolist()
    assert "orange" in adjectives and "orange" in nouns
    edges = {(adjectives[a], nouns[n]): c for (a, n), c in zip(prior.edges.tolist(), prior.edge_counts.tolist())}
    assert edges == {("bright", "breast"): 1, ("orange", "breast"): 2, ("ripe", "orange"): 2}


def test_missing_nltk_data_is_one_line_naming_all(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError) as error:
        prior_module.WordNetSpeech()
    message = str(error.value)
    assert "\n" not in message and "python -m nltk.downloader wordnet averaged_perceptron_tagger_eng punkt_tab" in message


def test_wordnet_speech_travels_to_workers(speech):
    import pickle

    copy = pickle.loads(pickle.dumps(speech))  # as multiprocessing does where it cannot fork
    assert pairs_in(copy, "a bright orange breast") == {("bright", "breast"), ("orange", "breast")}


def test_word_list_speech_knows_plurals():
    speech = WordListSpeech(["white", "small"], ["wing", "foot", "bird"], {"feet": "foot"})
    assert pairs_in(speech, "a small bird whose wings are white, with small feet") == {
        ("small", "bird"),
        ("white", "wing"),
        ("small", "foot"),
    }


# ---------------------------------------------------------------------------------------------
# Counting


def test_counts_do_not_depend_on_workers_or_splits(monkeypatch):
    monkeypatch.setattr(prior_module, "CHUNK", 3)
    speech = WordListSpeech(["small", "white"], ["bird", "wing"])
    captions = ["a small bird", "the wing is white", "a white bird with small wings"] * 7
    whole = count_captions(captions, speech, True)
    assert whole.captions == 21 and whole.pairs[("white", "wing")] == 7 and whole.words[("bird", "noun")] == 14
    assert count_corpus(captions, speech, True, workers=1) == count_corpus(captions, speech, True, workers=2) == whole
    first, second = count_captions(captions[:5], speech, True), count_captions(captions[5:], speech, True)
    first.add(second)
    assert first == whole


# ---------------------------------------------------------------------------------------------
# Word vectors


@pytest.mark.parametrize("name", ["g.txt", "g.zip", "g.txt.gz"])
def test_glove_formats(tmp_path, name):
    text = "2 3\nbird 1 2 3\nnew york 4 5 6\nunused 7 8 9\n"
    path = tmp_path / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner.txt", text)
    else:
        with gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w") as file:
            file.write(text)
    vectors = glove_vectors(path, {"bird", "new york", "absent"})
    assert {word: vector.tolist() for word, vector in vectors.items()} == {"bird": [1, 2, 3], "new york": [4, 5, 6]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"bird 1 2 3\nwing 1 2\n", "line 2 has 2 numbers"),
        (b"bird 1 2 nan\n", "line 1 .*not finite"),
        (b"bird 1 x 3\n", "line 1 is not a word"),
        (b"bird 1 2\nb\xff 1 2\n", "not UTF-8"),
    ],
)
def test_bad_vectors_are_named(tmp_path, content, message):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        glove_vectors(path, {"bird", "wing"})
    with pytest.raises(UserError, match="--weights"):
        glove_vectors(tmp_path / "absent.txt", set())
    (tmp_path / "v.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="not a whole archive"):
        glove_vectors(tmp_path / "v.zip", set())


def test_corpus_vectors_factor_the_ppmi_matrix():
    """At full rank but one, inner products of U Σ^½ with V Σ^½ are PPMI; symmetric, so |U| = |V| column by column."""
    contexts = Counter({("a", "b"): 8, ("a", "c"): 1, ("b", "c"): 2, ("c", "d"): 9, ("b", "d"): 1, ("d", "e"): 4, ("a", "e"): 3})
    vectors = corpus_vectors(contexts, dim=4)
    words = sorted(vectors)
    matrix = np.zeros((5, 5))
    for (x, y), count in contexts.items():
        matrix[words.index(x), words.index(y)] += count
        matrix[words.index(y), words.index(x)] += count
    frequency = matrix.sum(0)
    smooth = frequency**0.75 / (frequency**0.75).sum()
    with np.errstate(divide="ignore"):
        ppmi = np.maximum(np.log(matrix / frequency[:, None] / smooth[None]), 0)
    u, s, _ = np.linalg.svd(ppmi)
    mine = np.stack([vectors[word] for word in words])
    np.testing.assert_allclose(np.abs(mine), np.abs(u[:, :4] * np.sqrt(s[:4])), atol=1e-5)
    again = corpus_vectors(contexts, dim=4)
    assert all(np.array_equal(vectors[word], again[word]) for word in words)


def test_words_of_like_contexts_are_near():
    rng = np.random.default_rng(0)
    contexts = Counter()
    for colour in ("red", "orange", "yellow"):
        for noun in ("breast", "belly", "wing"):
            contexts[tuple(sorted((colour, noun)))] = int(rng.integers(20, 30))
    for metal in ("steel", "iron", "tin"):
        for noun in ("wheel", "rod", "plate"):
            contexts[tuple(sorted((metal, noun)))] = int(rng.integers(20, 30))
    vectors = corpus_vectors(contexts, dim=4)
    words = np.array(sorted(vectors))
    table = np.stack([vectors[w] for w in words])
    assert {w for w, _ in nearest_words(words, table, "orange", 2)} == {"red", "yellow"}
    assert {w for w, _ in nearest_words(words, table, "breast", 2)} == {"belly", "wing"}


def test_random_vectors_depend_on_word_and_seed_alone():
    a, b = random_vectors(["bird", "wing"], 8), random_vectors(["wing"], 8)
    assert np.array_equal(a["wing"], b["wing"]) and not np.array_equal(a["wing"], a["bird"])
    assert not np.array_equal(a["wing"], random_vectors(["wing"], 8, seed=1)["wing"])


# ---------------------------------------------------------------------------------------------
# The file


def counts():
    return Counts(
        6,
        Counter(
            {("white", "adjective"): 5, ("rare", "adjective"): 1, ("orange", "adjective"): 3, ("orange", "noun"): 2, ("wing", "noun"): 4}
        ),
        Counter({("white", "wing"): 3, ("orange", "wing"): 1, ("white", "orange"): 1, ("rare", "wing"): 1}),
        Counter(),
    )


def test_prior_keeps_frequent_words_with_vectors():
    prior = build_prior(counts(), PriorConfig("random", min_count=2, dim=3))
    assert prior.adjective_words.tolist() == ["white", "orange"] and prior.noun_words.tolist() == ["wing", "orange"]
    assert prior.edges.tolist() == [[0, 0], [0, 1], [1, 0]] and prior.edge_counts.tolist() == [3, 1, 1]
    assert np.array_equal(prior.adjective_vectors[1], prior.noun_vectors[1])  # one word, one vector, two nodes


def test_prior_without_a_part_of_speech_is_an_error():
    with pytest.raises(UserError, match="no adjective is left"):
        build_prior(counts(), PriorConfig("random", min_count=6))


def test_prior_file_round_trip(tmp_path, prior):
    prior.save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        assert {"adjective_words", "adjective_vectors", "noun_words", "noun_vectors", "edges", "edge_counts"} < set(file.files)
    loaded = Prior.load(tmp_path / "p.npz")
    for name in Prior.__dataclass_fields__:
        assert np.array_equal(loaded[name], prior[name])
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    for path in ("bad.npz", "absent.npz"):
        with pytest.raises(UserError, match="python prior.py CORPUS"):
            Prior.load(tmp_path / path)


def test_zip_of_several_dimensions_is_chosen_from(tmp_path):
    with zipfile.ZipFile(tmp_path / "glove.6B.zip", "w") as archive:
        for dim in (2, 3):
            archive.writestr(f"glove.6B.{dim}d.txt", "bird" + " 1" * dim + "\n")
    assert [len(glove_vectors(tmp_path / "glove.6B.zip", {"bird"}, dim)["bird"]) for dim in (2, 3)] == [2, 3]
    with pytest.raises(UserError, match="choose with --dim"):
        glove_vectors(tmp_path / "glove.6B.zip", {"bird"}, 50)


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError):
        with whole_file(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_figure_is_drawn(tmp_path, prior):
    draw_codebook_space(prior, {"adjective": ["a", "b"], "noun": []}, tmp_path / "f.png")
    draw_codebook_space(prior, {"adjective": ["a", "b"], "noun": ["A"]}, tmp_path / "f.png")
    from PIL import Image

    with Image.open(tmp_path / "f.png") as image:
        assert image.width == 1120 and len(set(image.convert("L").resize((200, 100)).tobytes())) > 10


# ---------------------------------------------------------------------------------------------
# Commands


def command(*args):
    return subprocess.run([sys.executable, ROOT / "prior.py", *map(str, args)], capture_output=True, text=True)


def test_command_builds_and_shows(tmp_path, speech):
    corpus = tmp_path / "c.txt"
    corpus.write_text("this small brown bird has a bright orange breast.\nits belly is white\na ripe orange\n" * 12)
    built = command(corpus, "--out", tmp_path / "p.npz", "--dim", "3")
    assert built.returncode == 0 and "6 adjectives, 4 nouns, 6 edges, corpus vectors of 3 dimensions from 36 captions" in built.stdout, (
        built.stderr
    )
    shown = command("show", tmp_path / "p.npz", "--figure", tmp_path / "f.png", "--caption", "a bright orange wheel")
    assert shown.returncode == 0 and "orange           NN     adjective" in shown.stdout and (tmp_path / "f.png").exists()


@pytest.mark.parametrize(
    "args, message",
    [(("absent.txt",), "corpus 'absent.txt' does not exist"), (("show", "absent.npz"), "prior 'absent.npz' does not exist")],
)
def test_command_errors_are_one_line(args, message):
    result = command(*args)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


@pytest.mark.skipif(not (SHARED / "vectors").is_dir(), reason="no real vectors on this machine")
def test_real_vectors_have_the_papers_neighbours():
    """Fig. 1: orange is nearer to yellow than yellow to blue is not asked of GloVe; breast–belly against belly–wheel is."""
    vectors = glove_vectors(SHARED / "vectors" / "glove.6B.100d.zip", {"orange", "yellow", "blue", "breast", "belly", "wheel"})
    cosine = lambda a, b: float(vectors[a] @ vectors[b] / math.sqrt((vectors[a] @ vectors[a]) * (vectors[b] @ vectors[b])))
    assert len(vectors) == 6 and cosine("breast", "belly") > cosine("belly", "wheel")


# ---------------------------------------------------------------------------------------------
# Controls


def test_rewired_edges_keep_every_degree():
    rng = np.random.default_rng(0)
    edges = np.unique(rng.integers(0, (40, 60), (500, 2)), axis=0)
    swapped = rewired(edges, rng)
    assert len(np.unique(swapped, axis=0)) == len(edges)  # no edge twice
    for column, size in enumerate((40, 60)):
        assert np.array_equal(np.bincount(swapped[:, column], minlength=size), np.bincount(edges[:, column], minlength=size))
    shared = len({tuple(edge) for edge in edges.tolist()} & {tuple(edge) for edge in swapped.tolist()})
    assert shared < 0.4 * len(edges)  # of 2,400 possible edges 500 are there, so a fifth would stay by chance
    for few in (edges[:0], edges[:1]):
        assert np.array_equal(rewired(few, rng), few)


def test_shuffling_destroys_one_thing_and_keeps_the_rest(prior):
    vectors, edges = shuffled(prior, "vectors"), shuffled(prior, "edges")
    assert shuffled(prior, "none") is prior
    for part in ("adjective", "noun"):
        before, after = prior[f"{part}_vectors"], vectors[f"{part}_vectors"]
        assert not np.array_equal(before, after) and sorted(map(tuple, before)) == sorted(map(tuple, after))
        assert np.array_equal(edges[f"{part}_vectors"], before) and np.array_equal(vectors[f"{part}_words"], prior[f"{part}_words"])
    assert np.array_equal(vectors.edges, prior.edges) and not np.array_equal(edges.edges, prior.edges)
    assert vectors.provenance["shuffled"] == "vectors" and "shuffled" not in prior.provenance
    assert np.array_equal(shuffled(prior, "vectors", seed=3).noun_vectors, shuffled(prior, "vectors", seed=3).noun_vectors)


# ---------------------------------------------------------------------------------------------
# Counting in parts


def test_the_tagger_gives_nltks_own_tags(speech):
    from nltk.tag.perceptron import PerceptronTagger

    captions = ["this small bird has a bright orange breast, striped wings and a short sharp beak", "Two dogs ran into zqxv 4 times!", ""]
    if (SHARED / "captions").is_dir():
        captions += list(itertools.islice(read_captions(SHARED / "captions" / "flickr30k.txt.gz"), 300))
    theirs = PerceptronTagger()
    for caption in captions:
        words = speech.tokenizer.tokenize(caption)
        assert speech.tagger.tag(words) == theirs.tag(words)


def test_merging_any_split_of_a_corpus_gives_the_same_bytes(tmp_path, speech):
    text = [f"a {a} {n} with a {b} beak" for a in ("small", "red", "white") for b in ("sharp", "long") for n in ("bird", "gull", "wing")]
    for i, part in enumerate((text[:5], text[5:6], text[6:])):
        (tmp_path / f"{i}.txt").write_text("\n".join(part) + "\n")
    corpora, counted = [tmp_path / f"{i}.txt" for i in range(3)], [tmp_path / f"c{i}.npz" for i in range(4)]
    prior_module.main([*map(str, corpora), "--min-count", "2", "--dim", "4", "--out", str(tmp_path / "whole.npz")])
    for corpus, counts in zip(corpora, counted):
        prior_module.main(["count", str(corpus), "--workers", "1", "--out", str(counts)])
    prior_module.main(["count", str(corpora[2]), str(corpora[0]), "--out", str(counted[3])])
    for order in ((0, 1, 2), (2, 0, 1), (1, 3), (3, 1)):
        merged = tmp_path / "merged.npz"
        prior_module.main(["merge", *(str(counted[i]) for i in order), "--min-count", "2", "--dim", "4", "--out", str(merged)])
        assert merged.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_counts_that_do_not_belong_together_are_refused(tmp_path, speech):
    (tmp_path / "c.txt").write_text("a small bird\n" * 12)
    prior_module.main(["count", str(tmp_path / "c.txt"), "--no-contexts", "--out", str(tmp_path / "a.npz")])
    counts, notes = Counts.load(tmp_path / "a.npz")
    counts.save(tmp_path / "b.npz", {**notes, "part_of_speech": "another"})
    (tmp_path / "junk.npz").write_bytes(b"PK nothing")
    (tmp_path / "same.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    for paths, message in (
        (["a.npz"], "--no-contexts"),
        (["a.npz", "a.npz"], "given twice"),
        (["a.npz", "same.npz"], "same counts as another"),
        (["a.npz", "b.npz"], "another way"),
        (["junk.npz"], "not a counts file"),
        (["absent.npz"], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            prior_module.main(["merge", *(str(tmp_path / path) for path in paths), "--out", str(tmp_path / "p.npz")])
    assert not (tmp_path / "p.npz").exists()
    prior_module.main(["merge", str(tmp_path / "a.npz"), "--embeddings", "random", "--out", str(tmp_path / "p.npz")])
    assert Prior.load(tmp_path / "p.npz").adjective_words.tolist() == ["small"]


def test_the_vocabulary_of_contexts_is_bounded(speech):
    counted = count_captions(["a small bird near a zqxvism and a krtlblp"], speech, contexts=True)
    words = {word for pair in counted.contexts for word in pair}
    assert {"small", "bird", "near"} <= words and not {"zqxvism", "krtlblp"} & words


# ---------------------------------------------------------------------------------------------
# Language models, on files written in the published formats

# Byte-pair merges after CLIP's first line: "red", "wing" and "bird" become whole words, "titmouse" "tit" + "mouse"
MERGES = [
    "r e",
    "re d</w>",
    "w i",
    "n g</w>",
    "wi ng</w>",
    "b i",
    "r d</w>",
    "bi rd</w>",
    "t i",
    "ti t",
    "m o",
    "u s",
    "mo us",
    "mous e</w>",
]
MERGES += ["a</w> x", "p h", "ph o", "pho t", "phot o</w>", "o f</w>", "o b", "ob j", "e c", "obj ec", "objec t</w>", "re d"]


def merges_file(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("#version: 0.2\n" + "\n".join(MERGES) + "\n").encode()))
    return path


@pytest.fixture
def vocabulary(tmp_path):
    return clip_vocabulary(merges_file(tmp_path / "merges"))


def clip_folder(folder, ids, table, weights="model.safetensors"):
    """Hugging Face's layout, with the text model's table among others."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    key = "text_model.embeddings.token_embedding.weight"
    if weights.endswith(".bin"):
        torch.save({"logit_scale": torch.ones(()), key: torch.from_numpy(table)}, folder / weights)
    else:
        other = np.ones((3, 2), np.float16)
        tensors = {
            "a.weight": ("F16", (3, 2), other.tobytes()),
            key: ("F32", table.shape, table.tobytes()),
            "z": ("F16", (3, 2), other.tobytes()),
        }
        (folder / weights).write_bytes(safetensors_bytes(tensors))
    return folder


def test_clips_vocabulary_has_bytes_words_merges_and_marks(vocabulary):
    assert len(vocabulary) == 512 + len(MERGES) + 2 and list(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["re"] == 512 and vocabulary["red</w>"] == 513
    assert vocabulary["<|endoftext|>"] == len(vocabulary) - 1
    assert len(set(BYTES.values())) == 256 and BYTES[ord(" ")] == "Ġ"  # the table that GPT-2 made common


def test_byte_pairs_join_as_the_merges_say(vocabulary):
    model = TokenModel(vocabulary, np.zeros((len(vocabulary), 2)), {"file": "test"})
    spelled = lambda word: [list(vocabulary)[row] for row in model.rows(word)]
    assert spelled("red") == ["red</w>"] and spelled("bird") == ["bird</w>"] and spelled("titmouse") == ["tit", "mouse</w>"]
    assert spelled("redwing") == ["red", "wing</w>"] and spelled("red-wing") == ["red</w>", "-</w>", "wing</w>"]
    assert spelled("é") == ["Ã", "©</w>"] and "redwing" not in model.words() and {"red", "wing"} <= set(model.words())
    ranks = {tuple(merge.split()): rank for rank, merge in enumerate(MERGES)}
    rng = np.random.default_rng(0)
    for word in ("".join(rng.choice(list("redwingbtmousph"), rng.integers(1, 12))) for _ in range(300)):
        parts = [*word[:-1], word[-1] + "</w>"]  # the merges one by one, each over the whole word, as published
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in ranks]:
            best, joined, i = min(pairs, key=ranks.get), [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            parts = joined
        assert spelled(word) == parts


def test_word_pieces_take_the_longest_from_the_left():
    ids = {token: row for row, token in enumerate(["[UNK]", "tit", "##mouse", "##mo", "red", "##ding", "bird", "-"])}
    model = TokenModel(ids, np.eye(8), {"file": "test"})
    assert (
        model.rows("titmouse") == [1, 2]
        and model.rows("redding") == [4, 5]
        and model.rows("red-bird") == [4, 7, 6]
        and model.rows("xyz") == []
    )
    kept, several = model.vectors(["bird", "titmouse", "xyz"])
    assert list(kept) == ["bird"] and several == ["titmouse"]
    kept, _ = model.vectors(["bird", "titmouse", "xyz"], "mean")
    assert set(kept) == {"bird", "titmouse"} and kept["titmouse"].tolist() == [0, 0.5, 0.5, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="no row for each"):
        TokenModel(ids, np.eye(7), {"file": "test"})


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_clip_from_a_folder(tmp_path, vocabulary, weights):
    table = np.random.default_rng(0).standard_normal((len(vocabulary), 6), dtype=np.float32)
    folder = clip_folder(tmp_path / "clip", vocabulary, table, weights)
    model = clip_tokens(folder)
    assert np.array_equal(model.vectors(["red"])[0]["red"], table[513]) and model.source["file"] == weights
    (folder / "vocab.json").unlink()
    with pytest.raises(UserError, match="holds no vocab.json"):
        clip_tokens(folder)


def test_bert_from_a_folder_makes_a_prior(tmp_path, speech):
    tokens = ["[PAD]", "small", "red", "bird", "wing", "tit", "##mouse", "green", "elbow", "the"]
    table = np.random.default_rng(0).standard_normal((len(tokens), 5), dtype=np.float32)
    bfloat = (table.view("<u4") >> 16).astype("<u2")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(tokens) + "\n")
    key = "bert.embeddings.word_embeddings.weight"
    (tmp_path / "bert" / "model.safetensors").write_bytes(safetensors_bytes({key: ("BF16", table.shape, bfloat.tobytes())}))
    captions = ["a small red bird", "the titmouse has a red wing"] * 5
    build = lambda **more: build_from_corpora([("c", captions)], PriorConfig("bert", str(tmp_path / "bert"), **more), speech=speech)
    prior = build(min_count=2)
    assert prior.noun_words.tolist() == ["bird", "wing"] and set(prior.adjective_words) == {"red", "small"}
    row = tokens.index("bird")
    assert np.array_equal(prior.noun_vectors[0].view("<u4"), table[row].view("<u4") & 0xFFFF0000)
    assert prior.provenance["vectors"]["several_tokens"] == {"dropped": 1}
    assert "titmouse" in build(min_count=2, multi_token="mean").noun_words
    everything = build(min_count=0)  # also what the vocabulary holds and the captions do not say
    assert "green" in everything.adjective_words and "elbow" in everything.noun_words and "the" not in everything.noun_words


def text_archive(path, ids, width=4, length=12):
    """A scripted TorchScript archive with the published key and method, its device and half precision frozen as by tracing on a GPU."""

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = torch.nn.Embedding(len(ids), width)
            self.positional_embedding = torch.nn.Parameter(torch.randn(length, width))

        def forward(self, x: torch.Tensor):
            return x

        @torch.jit.export
        def encode_text(self, text: torch.Tensor):
            x = self.token_embedding(text).to(torch.float16) + self.positional_embedding.to(torch.float16)
            rows = torch.arange(text.shape[0], device=torch.device("cuda:0"))
            return x.cumsum(1)[rows, text.argmax(dim=-1)]

    torch.manual_seed(0)
    module = Text().half().eval()
    torch.jit.script(module).save(str(path))
    return module.float(), prior_module.checksum(path)


def test_clip_from_the_archive_and_its_prompts(tmp_path, monkeypatch):
    ids = clip_vocabulary(merges_file(tmp_path))
    module, sha256 = text_archive(tmp_path / "ViT-B-32.pt", ids)
    with pytest.raises(UserError, match="not the published archive"):  # before anything in it runs
        clip_tokens(tmp_path / "ViT-B-32.pt")
    model = clip_tokens(tmp_path / "ViT-B-32.pt", sha256=sha256)
    assert np.allclose(model.vectors(["red"])[0]["red"], module.token_embedding.weight[ids["red</w>"]].detach())
    words, config = (
        {"adjective": ["red", "titmouse"], "noun": ["red", "bird"]},
        PriorConfig("clip-text", str(tmp_path / "ViT-B-32.pt"), sha256=sha256),
    )
    model = LANGUAGE_MODELS["clip-text"]
    vectors, notes = model.vectors(words, Counts(), config, model.tokens(config))
    assert {part: sorted(found) for part, found in vectors.items()} == {"adjective": ["red"], "noun": ["bird", "red"]}
    for part, prompt in (("adjective", "a photo of red object"), ("noun", "a photo of red")):
        text = [ids["<|startoftext|>"], *(ids[f"{word}</w>"] for word in prompt.split()), ids["<|endoftext|>"]]
        expected = (module.token_embedding.weight[text] + module.positional_embedding[: len(text)]).sum(0)
        assert np.allclose(vectors[part]["red"], expected.detach(), atol=1e-5) and vectors[part]["red"].dtype == np.float32
    assert notes["several_tokens"] == {"dropped": 1} and notes["sha256"] == sha256
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    monkeypatch.setattr(prior_module, "CLIP_MERGES", "http://127.0.0.1:9/merges.gz")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="merges.gz .CLIP's vocabulary. is unavailable.*put it beside the archive"):
        clip_tokens(tmp_path / "ViT-B-32.pt", sha256=sha256)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:5], "not a safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "not a safetensors file"),
        (lambda data: data[:-40], "does not fit its bytes"),
        (lambda data: data.replace(b'"F32"', b'"F16"'), "does not fit its bytes"),
        (lambda data: data.replace(b'"F32"', b'"X32"'), "does not fit its bytes"),
    ],
)
def test_damaged_safetensors_are_a_line(tmp_path, change, message):
    whole = safetensors_bytes({"embeddings.word_embeddings.weight": ("F32", (4, 3), np.arange(12, dtype="<f4").tobytes())})
    (tmp_path / "x.safetensors").write_bytes(whole)
    assert read_tensors(tmp_path / "x.safetensors")["embeddings.word_embeddings.weight"].tolist() == np.arange(12).reshape(4, 3).tolist()
    (tmp_path / "x.safetensors").write_bytes(change(whole))
    with pytest.raises(UserError, match=message):
        read_tensors(tmp_path / "x.safetensors")


def test_foreign_objects_are_refused_with_the_lines_that_strip_them(tmp_path):
    torch.save({"state_dict": {"w": torch.nn.Parameter(torch.ones(2))}, "callbacks": {"checkpoint": Foreign()}}, tmp_path / "last.ckpt")
    data = (tmp_path / "last.ckpt").read_bytes().replace(b"conftest\nForeign", b"lightnin\nForeign")  # of a package that is not here
    assert b"lightnin\nForeign" in data
    (tmp_path / "last.ckpt").write_bytes(data)
    with pytest.raises(UserError, match="lightnin.Foreign") as error:
        read_tensors(tmp_path / "last.ckpt")
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3 and all(line.startswith("  ") for line in lines)  # and so printed as they are
    exec(textwrap.dedent("\n".join(lines)).replace('"stripped.pt"', repr(str(tmp_path / "stripped.pt"))), {})
    assert read_tensors(tmp_path / "stripped.pt")["w"].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


@pytest.fixture
def published(server, vocabulary, tmp_path, monkeypatch):
    """The server holds CLIP's folder at one revision; returns the table."""
    table = np.random.default_rng(1).standard_normal((len(vocabulary), 6), dtype=np.float32)
    folder = clip_folder(tmp_path / "published", vocabulary, table)
    for name in ("model.safetensors", "vocab.json"):
        server.files[f"/{prior_module.CLIP_FOLDER}/refs%2Fpr%2F15/{name}"] = (folder / name).read_bytes()
    monkeypatch.setattr(prior_module, "CLIP_SHAPE", table.shape)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return table


@pytest.mark.parametrize("ignores", [False, True])
def test_one_tensor_of_a_published_file_is_downloaded_and_kept(server, published, ignores):
    server.ignores_ranges = ignores
    model = clip_tokens()
    assert np.array_equal(model.table, published)
    assert model.source["sha256"] == hashlib.sha256(published.tobytes()).hexdigest()
    asked = [range_ for path, range_ in server.requests if path.endswith("safetensors")]
    assert len(asked) == 3 and asked[0] == "bytes=0-7"
    first, last = map(int, asked[2].removeprefix("bytes=").split("-"))
    assert last + 1 - first == published.nbytes  # the other tensors were not asked for
    server.requests.clear()
    assert np.array_equal(clip_tokens().table, published) and not server.requests  # from the cache
    (cached,) = prior_module.cache_folder().iterdir()
    cached.write_bytes(cached.read_bytes()[:-200])
    assert np.array_equal(clip_tokens().table, published) and server.requests  # a damaged one is had again


@pytest.mark.parametrize("cut", [4, 200])
def test_a_cut_connection_leaves_an_error_and_no_file(server, published, cut):
    server.cuts_after = cut
    with pytest.raises(UserError, match="connection was cut|not a safetensors"):
        clip_tokens()
    assert not prior_module.cache_folder().exists() or not list(prior_module.cache_folder().iterdir())


def test_a_table_of_another_shape_or_an_absent_server_is_a_line(server, published, monkeypatch):
    monkeypatch.setattr(prior_module, "CLIP_SHAPE", (49408, 512))
    with pytest.raises(UserError, match="expected one token table of shape"):
        clip_tokens()
    for endpoint, revision in (("http://127.0.0.1:9", "main"), ("mirror.without.scheme", "main"), (server.url + "/", "my branch")):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        with pytest.raises(UserError, match="is unavailable.*--weights|has no whole"):
            clip_tokens(revision=revision)


def test_where_the_revision_lacks_safetensors_the_archive_comes_whole(server, published, tmp_path, monkeypatch):
    ids = clip_vocabulary(merges_file(tmp_path / "a"))
    module, sha256 = text_archive(tmp_path / "a" / "ViT-B-32.pt", ids)
    merges = (tmp_path / "a" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    server.files["/ViT-B-32.pt"], server.files["/bpe_simple_vocab_16e6.txt.gz"] = (tmp_path / "a" / "ViT-B-32.pt").read_bytes(), merges
    for name, value in {
        "CLIP_ARCHIVE": f"{server.url}/ViT-B-32.pt",
        "CLIP_SHA256": sha256,
        "CLIP_MERGES": f"{server.url}/bpe_simple_vocab_16e6.txt.gz",
        "CLIP_MERGES_SHA256": hashlib.sha256(merges).hexdigest(),
    }.items():
        monkeypatch.setattr(prior_module, name, value)
    model = clip_tokens(revision="main")
    assert np.allclose(model.table, module.token_embedding.weight.detach())
    kept = prior_module.cache_folder() / "ViT-B-32.pt"
    kept.write_bytes(b"another file")  # is not trusted for its name
    server.files["/ViT-B-32.pt"] = b"what the server sends now"
    with pytest.raises(UserError, match="ViT-B-32.pt .*is unavailable.*--weights FILE"):
        clip_tokens(revision="main")
    assert kept.read_bytes() == b"another file" and len(list(kept.parent.iterdir())) == 2
    server.files["/ViT-B-32.pt"] = (tmp_path / "a" / "ViT-B-32.pt").read_bytes()
    server.cuts_after = 100
    with pytest.raises(UserError, match="is unavailable"):
        clip_tokens(revision="main")


@pytest.mark.parametrize(
    "args, message",
    [
        (("--embeddings", "bert"), "needs --weights DIR"),
        (("--embeddings", "clip", "--weights", "absent"), "'absent' is no file"),
        (("--embeddings", "bert", "--weights", "absent"), "'absent' holds no model.safetensors"),
        (("--multi-token", "mean"), "--multi-token does nothing for corpus"),
        (("--weights", "x"), "--weights does nothing for corpus"),
        (("--embeddings", "clip", "--dim", "300"), "--dim does nothing for clip"),
        (("--min-count", "0"), "must be at least 1"),
    ],
)
def test_choices_that_cannot_be_are_a_line_before_the_corpus_is_read(tmp_path, args, message):
    (tmp_path / "c.txt").write_text("a small bird\n")
    result = command(tmp_path / "c.txt", *args)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.skipif(not (SHARED / "vectors").is_dir(), reason="no real vectors on this machine")
def test_glove_says_when_its_file_has_another_dimension():
    with pytest.raises(UserError, match="have 100 dimensions, --dim asks for 50"):
        glove_vectors(SHARED / "vectors" / "glove.6B.100d.zip", {"bird"}, 50)
