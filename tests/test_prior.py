"""Corpora, parts of speech, the graph and word vectors, on text whose answer is known by hand."""

import gzip
import json
import math
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest

import prior as prior_module
from conftest import ROOT, SHARED
from prior import (
    Counts,
    Prior,
    UserError,
    WordListSpeech,
    build_from_corpora,
    build_prior,
    corpus_vectors,
    count_captions,
    count_corpus,
    draw_codebook_space,
    glove_vectors,
    modifying_pairs,
    nearest_words,
    random_vectors,
    read_captions,
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
    prior = build_prior(counts, "random", dim=4)
    adjectives, nouns = prior.adjective_words.tolist(), prior.noun_words.tolist()
    assert "orange" in adjectives and "orange" in nouns
    edges = {(adjectives[a], nouns[n]): c for (a, n), c in zip(prior.edges.tolist(), prior.edge_counts.tolist())}
    assert edges == {("bright", "breast"): 1, ("orange", "breast"): 1, ("ripe", "orange"): 2}


def test_homographs_are_two_nodes_to_the_real_tagger(speech):
    captions = ["a bright orange breast", "an orange breast", "a ripe orange", "a ripe orange on a table"]
    prior = build_from_corpora([("hand", captions)], "random", min_count=1, dim=4, speech=speech)
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
    prior = build_prior(counts(), "random", min_count=2, dim=3)
    assert prior.adjective_words.tolist() == ["white", "orange"] and prior.noun_words.tolist() == ["wing", "orange"]
    assert prior.edges.tolist() == [[0, 0], [0, 1], [1, 0]] and prior.edge_counts.tolist() == [3, 1, 1]
    assert np.array_equal(prior.adjective_vectors[1], prior.noun_vectors[1])  # one word, one vector, two nodes


def test_prior_without_a_part_of_speech_is_an_error():
    with pytest.raises(UserError, match="no adjective is left"):
        build_prior(counts(), "random", min_count=6)


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
    assert built.returncode == 0 and "6 adjectives, 4 nouns, 6 edges from 36 captions" in built.stdout, built.stderr
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
