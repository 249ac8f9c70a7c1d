"""prior.py from top to bottom, on text whose answer is known by hand."""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from nltk.tag.perceptron import PerceptronTagger


import prior as prior_module
from conftest import ROOT, SHARED, Foreign

from prior import (
    LANGUAGE_MODELS,
    PARTS,
    Counts,
    Prior,
    UserError,
    WordListSpeech,
    WordNetSpeech,
    atomic_write,
    build_prior,
    command,
    count_captions,
    count_corpus,
    download,
    list_files,
    modifying_pairs,
    nearest_words,
    parts_of_speech,
    read_captions,
    read_corpora,
    read_tensors,
    rewired,
    shuffled,
    user_error,
)


CAPTIONS = ["a small brown bird", "its belly is white"]


IMAGES = [
    {"split": "val", "filename": "1.jpg", "sentences": [{"tokens": ["a"], "raw": c}]}
    for c in CAPTIONS
]
COCO = [
    {"image_id": 1, "id": i, "caption": c} for i, c in enumerate([CAPTIONS[0], None, CAPTIONS[1]])
]


@pytest.mark.parametrize(
    "files",
    [
        {"plain.txt": "\ufeffa small brown bird\n\n its belly is white \n"},
        {
            "captions": gzip.compress(b"a small brown bird\nits belly is white")
        },  # as a program names what it downloads
        {"utf-16.txt": "a small brown bird\r\nits belly is white\r\n".encode("utf-16")},
        {"flickr.token": "1000.jpg#0\ta small brown bird\n1000.jpg#1\tits belly is white\n"},
        {"flickr.token": "1000.jpg#0\ta small brown bird\n1000.jpg#1   its belly is white\n"},
        {
            "coco.json": json.dumps(
                {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": COCO}
            )
        },
        {
            "coco.JSON": gzip.compress(
                json.dumps({"annotations": COCO}, indent=1).replace("is wh", "is\\n wh").encode()
            )
        },
        {"dataset.json": json.dumps({"images": IMAGES, "dataset": "flickr30k"})},
        {"strings.txt": json.dumps(CAPTIONS, indent=1)},
        {"blip.json": json.dumps([{"image": "val/1.jpg", "caption": CAPTIONS}])},
        {
            "metadata.jsonl": "".join(
                f"{json.dumps({'file_name': '1.png', 'text': c})}\n\n" for c in CAPTIONS
            )
        },
        {
            "flickr8k.txt": 'image,caption\n1_a.jpg,a small brown bird\n1_a.jpg,"its belly is white"\n'
        },
        {
            "results.csv": "image_name| comment_number| comment\n"
            "1.jpg| 0| a small brown bird\n1.jpg| 1| its belly is white"
        },
        {
            "cc3m.tsv": "a small brown bird\thttp://a.b/c?d=1,2\nits belly is white\thttps://a.b/e.jpg\n"
        },
        {
            "a.txt": "a small brown bird\n",
            "b/1.TXT.gz": gzip.compress(b"its belly is white\n"),
            "b/1.csv": "a red bird",
            "b/._1.txt": "a mac's",
            "b/.ipynb_checkpoints/1-checkpoint.txt": "a copy",
            "__MACOSX/a.txt": "a mac's",
        },
    ],
    ids="+".join,
)
def test_corpus_formats(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert list(read_captions(tmp_path if len(files) > 1 else tmp_path / name)) == CAPTIONS


@pytest.mark.parametrize(
    "text",
    [
        "small, brown bird",
        "birds, wings\nsmall, brown bird\nthe bird, which is red",
        "[a] small brown bird | its belly",
    ],
)
def test_prose_is_no_table_and_no_json(tmp_path, text):
    (tmp_path / "prose.csv").write_text(text)
    assert list(read_captions(tmp_path / "prose.csv")) == text.split("\n")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "x.json",
            b'{"annotations": [{"caption": "a',
            "cannot be read: Unterminated.*; a corpus is text with a caption per",
        ),
        ("missing.txt", None, "cannot be read: .*No such file"),
        ("latin.txt", b"\xe9 bird", "cannot be read: 'utf-8'"),
        ("x.json", b"{}", "holds no caption; a corpus is text"),
        ("broken.txt", b"\x1f\x8bnothing", "cannot be read: "),
        ("x.json", b'{"annotations": [{"bbox": [1, 2]}]}', "holds no caption"),
        ("x.txt", b"\n \n", "holds no caption"),
        ("x.jsonl", b'{"caption": "a red bird"}\n{"caption": ', "cannot be read: Expecting value"),
        ("x", lambda path: path.mkdir(), "holds no caption"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, content, message):
    if content is not None:
        content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("a red bird")
    with pytest.raises(UserError, match=f"^corpus '{tmp_path / name}' {message}"):
        list(read_corpora([tmp_path / "good.txt", tmp_path / name]))


EXCERPT = WordListSpeech(
    *map(
        str.split,
        (  # the entries of WordNet that the tagged sentences need
            "bright orange small brown white striped flying round",
            "orange bird breast belly wing walk wall water",
        ),
    )
)
EXCERPT.verb = dict(striped="stripe").get
EXCERPT.lists = lambda word, tag: tag[:2] == "VB" or word in EXCERPT.adjectives or word == "mostly"
EXCERPT.mostly_verb = lambda word: word == "walks"


def pairs(text):
    """From "small bird, brown bird" to [("small", "bird"), ("brown", "bird")]."""
    return [tuple(pair.split()) for pair in text.split(", ") if pair]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a/DT small/JJ brown/JJ bird/NN", "small bird, brown bird"),
        ("its/PRP$ belly/NN is/VBZ white/JJ", "white belly"),
        ("a/DT bright/JJ orange/NN breast/NN", "bright breast, orange breast"),  # the tagger's slip
        ("a/DT small/JJ orange/NN on/IN a/DT wall/NN", "small orange"),  # the fruit
        ("an/DT orange/NN and/CC white/JJ bird/NN", "orange bird, white bird"),
        (
            "its/PRP$ orange/NN and/CC white/JJ belly/NN",
            "white belly",
        ),  # "its back and white belly"
        ("striped/VBD wings/NNS", "striped wing"),
        ("birds/NNS flying/VBG over/IN water/NN", ""),
        ("a/DT bird/NN striped/VBN by/IN a/DT wall/NN", ""),
        ("a/DT flying/VBG bird/NN", "flying bird"),
        ("a/DT bright/JJ orange/NN belly/RB", "bright belly, orange belly"),
        (
            "a/DT small/JJ ,/, round/JJ ,/, and/CC brown/JJ bird/NN",
            "small bird, round bird, brown bird",
        ),
        ("white/JJ belly/NN ,/, orange/JJ wings/NNS", "white belly, orange wing"),
        ("a/DT brown/JJ eyering/NN", ""),
        (
            "the/DT belly/NN of/IN the/DT bird/NN is/VBZ mostly/RB white/JJ and/CC orange/NN",
            "white belly, orange belly",
        ),
        ("a/DT bird/NN with/IN wings/NNS that/WDT are/VBP brown/JJ", "brown wing"),
        ("a/DT brown/JJ bird/NN walks/NNS on/IN a/DT wall/NN", "brown bird"),
        ("white/JJ walks/NNS ./.", "white walk"),
        (
            "a/DT brown/JJ bird/NN ▲/NN a/DT white/JJ |/NN wall/NN",
            "brown bird",
        ),  # what has no letter is no word
    ],
)
def test_modifying_pairs_of_tagged_text(text, expected):
    tagged = [tuple(token.rsplit("/", 1)) for token in text.split()]
    assert list(modifying_pairs(parts_of_speech(tagged, EXCERPT))) == pairs(expected)


READ = [  # by hand
    ("a small brown dog sleeps on a red couch", "small dog, brown dog, red couch"),
    (
        "a bright orange breast and a short black beak",
        "bright breast, orange breast, short beak, black beak",
    ),
    ("a blond woman reads a green book", "blond woman, green book"),
    ("a ripe orange lies on a wooden table", "ripe orange, wooden table"),
    ("a wild duck with a bright yellow belly", "wild duck, bright belly, yellow belly"),
    (
        "an orange and black butterfly on a white flower",
        "orange butterfly, black butterfly, white flower",
    ),
    ("two children in pink and white dresses", "pink dress, white dress"),
    ("a bird with its back and white belly in the sun", "white belly"),
    ("the player wears a blue and white shirt", "blue shirt, white shirt"),
    ("small, brown and grey birds", "small bird, brown bird, grey bird"),
    ("a long, thin, and curved bill", "long bill, thin bill, curved bill"),
    ("a large brown water bird", "large bird, brown bird"),
    ("a wooden picnic table under an old oak tree", "wooden table, old tree"),
    ("a zebra has striped legs", "striped leg"),
    ("a bird with webbed feet and a spotted breast", "webbed foot, spotted breast"),
    ("the tall man 's dog wears a red hat", "tall man, red hat"),
    ("a man in a blue striped shirt", "blue shirt, striped shirt"),
    ("a medium sized bird with a hooked bill", "medium bird, sized bird, hooked bill"),
    ("a short, pointed, black beak", "short beak, pointed beak, black beak"),
    ("a man dressed in warm clothes", "warm clothes"),
    ("a smiling girl holds a sleeping cat", "smiling girl, sleeping cat"),
    ("birds flying over a calm lake", "calm lake"),
    ("a boy throwing red balls", "red ball"),
    ("a brown dog walks through deep snow", "brown dog, deep snow"),
    ("a young boy plays with a yellow truck", "young boy, yellow truck"),
    ("a woman in a red coat walks a white dog", "red coat, white dog"),
    ("this bird has black eye rings and a dark crown", "black ring, dark crown"),
    ("its belly is white", "white belly"),
    ("the bird is small, round and brown", "small bird, round bird, brown bird"),
    ("the bird is not red", ""),
    ("the wings are mostly grey", "grey wing"),
    ("its bill is very small and curved", "small bill, curved bill"),
    ("the street is covered with dry leaves", "dry leaf"),
    ("the sky was very dark and the sea was calm", "dark sky, calm sea"),
    ("a bird with wings that are brown", "brown wing"),
    ("a hat which is blue and a scarf that is red", "blue hat, red scarf"),
    ("the feathers of the large bird are brown", "large bird, brown feather"),
    ("the man in the black hat is tall", "black hat, tall man"),
    ("several people in black shorts and red glasses", "black shorts, red glasses"),
    ("men with tall wives and small feet", "tall wife, small foot"),
    ("the boss wears a black dress with a mountain pass", "black dress"),
    ("the bird is a small owl", "small owl"),
    ("there are many other green trees behind three tall men", "green tree, tall man"),
    ('a long-billed brown bird and its "white" tail', "brown bird, white tail"),
]


def pairs_of(speech, caption):
    return {pair for tokens in speech(caption) for pair in modifying_pairs(tokens)}


@pytest.mark.parametrize("caption, expected", READ)
def test_captions_are_read_as_by_hand(speech, caption, expected):
    assert pairs_of(speech, caption) == set(pairs(expected))


@pytest.mark.parametrize(
    "table, i", [*(("RULES", i) for i in range(7)), *(("EDGES", i) for i in range(3))]
)
def test_every_rule_reads_its_example_and_some_caption(speech, monkeypatch, table, i):
    *_, example = rule = getattr(prior_module, table)[i]
    marked = re.findall("[A-Z]+", example)

    def reading():
        (tokens,) = speech(example.lower())
        found = {word for pair in modifying_pairs(tokens) for word in pair}
        kinds = [token.kind for token in tokens if token.word.upper() in marked]
        return kinds if table == "RULES" else sorted(word.upper() for word in found)

    assert reading() == ([rule[0]] * len(marked) if table == "RULES" else sorted(marked))
    others = tuple(other for other in getattr(prior_module, table) if other is not rule)
    monkeypatch.setattr(prior_module, table, others)
    assert reading() != [rule[0]] * len(marked) and reading() != sorted(marked)
    assert any(pairs_of(speech, caption) != set(pairs(expected)) for caption, expected in READ)
    assert len(others) == (6 if table == "RULES" else 2)


@pytest.mark.parametrize(
    "form",
    [
        "{} 🐦",
        "❤️ {}",
        "“{}”",
        "‘{}’",
        "«{}»",
        "{}…",
        "Photo — {}",
        "{}.It flies",
        "{} | 2019",
        "<p>{}<br/></p>",
        "• {}",
        "&quot;{}&quot;",
        "{}‼",
        "CAPITALS",
    ],
)
def test_typography_around_a_caption_costs_no_pair(speech, form):
    for caption, expected in READ:
        caption = caption.upper() if form == "CAPITALS" else form.format(caption)
        assert set(pairs(expected)) <= pairs_of(speech, caption)


@pytest.mark.parametrize(
    "plain, spelt",
    [
        (" ", "\u00a0"),
        (" ", "\ufffd\ufffd"),
        (" ", "&nbsp;"),
        ("i", "i\u200b"),
        ("r", "\u00adr"),
        ("o", "\u2060o"),
        ("fl", "ﬂ"),
        ("b", "ｂ"),
        ("-", "\u2011"),
        (" and ", " &amp; "),
        (" and ", "/"),
        (", ", "—"),
        ('"', "”"),
    ],
)
def test_typography_within_a_caption_costs_no_pair(speech, plain, spelt):
    for caption, expected in READ:
        caption = caption.replace(", and", " and").replace(plain, spelt)
        assert pairs_of(speech, caption) == set(pairs(expected))


@pytest.mark.parametrize(
    "word, lemma",
    [
        *(
            (word, word)
            for word in "pass boss cutlass ingress shorts glasses bus grass species stairs people".split()
        ),
        ("doses", "dose"),
        ("men", "man"),
        ("wings", "wing"),
        ("feet", "foot"),
        ("leaves", "leaf"),
        ("buses", "bus"),
    ],
)
def test_a_noun_that_ends_in_s_is_not_a_plural(speech, word, lemma):
    assert speech.noun(word) == lemma


def test_wordnet_speech_takes_nltks_tags_lemmatises_and_travels_to_workers(speech):
    captions, theirs = (
        ["a bright orange breast, its wings", "Two dogs ran into zqxv 4 times!", ""],
        PerceptronTagger(),
    )
    if (SHARED / "captions").is_dir():
        captions += itertools.islice(read_captions(SHARED / "captions" / "flickr30k.txt.gz"), 300)
    for words in map(speech.tokenizer.tokenize, captions):
        assert speech.tagger.tag(words) == theirs.tag(words)
    for copy in (
        speech,
        pickle.loads(pickle.dumps(speech)),
    ):  # as multiprocessing does where it cannot fork
        nouns = [
            t.lemma
            for s in copy("two men, wings, feet and feathers")
            for t in s
            if t.part == "noun"
        ]
        assert nouns == ["man", "wing", "foot", "feather"]


def test_missing_nltk_data_is_one_line_naming_all(tmp_path, monkeypatch):
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(
        UserError,
        match="^missing: NLTK.* wordnet averaged_perceptron_tagger_eng punkt_tab, "
        "or use a local copy: NLTK_DATA=DIR; to download: python prior.py --embeddings corpus --download$",
    ):
        WordNetSpeech()


def test_damaged_nltk_data_are_missing(speech, tmp_path, monkeypatch):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wordnet.zip").write_bytes(b"cut")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(UserError, match="^missing: NLTK's tagger, tokenizer and WordNet"):
        WordNetSpeech()


def test_nltk_data_that_cannot_be_read_are_a_line(monkeypatch):
    monkeypatch.setattr(prior_module.NLTKData, "present", lambda need: True)
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(UserError, match="^NLTK's data cannot be read: .*; download it again"):
        WordNetSpeech()


SPEECH = WordListSpeech("small red orange white".split(), "bird wing belly titmouse beak".split())
BIRDS = [
    "a small bird with red beaks",
    "its wings are white",
    "a white bird with a red wing and an orange belly",
]


def test_counts_do_not_depend_on_workers(monkeypatch):
    monkeypatch.setattr(prior_module, "CHUNK", 3)
    whole = count_captions(BIRDS * 7, SPEECH, True)
    found = pairs("small bird, red beak, white wing, white bird, red wing, orange belly")
    assert (
        whole.captions == 21
        and whole.pairs == dict.fromkeys(found, 7)
        and whole.words["bird", "noun"] == 14
    )
    assert (
        count_corpus(BIRDS * 7, SPEECH, True, 1)
        == count_corpus(BIRDS * 7, SPEECH, True, 2)
        == whole
    )
    with pytest.raises(UserError, match="no adjective or noun in 2 captions"):
        count_corpus(["ein Vogel", "zwei Vögel"], SPEECH, workers=2)
    monkeypatch.setattr(prior_module, "WINDOW", 2)
    near = pairs(
        "bird small, red small, bird red, bird wing, red wing, "
        "red white, white wing, belly wing, belly white"
    )
    caption = "a small bird , it sings in a red wing and has a white belly"
    assert count_captions([caption], SPEECH, True).contexts == dict.fromkeys(near, 1)
    assert not count_captions([caption], SPEECH).contexts  # which `corpus` vectors alone ask for


class Befallen(WordListSpeech):
    """What befalls a worker before it tags a caption: a function and its argument."""

    def __call__(self, caption):
        if multiprocessing.parent_process():
            self.deed[0](self.deed[1])
        return super().__call__(caption)


@pytest.mark.parametrize(
    "deed, corpora, message",
    [
        (
            (signal.raise_signal, signal.SIGKILL),
            [],
            "^a process that tagged captions was killed, perhaps for its memory; give fewer",
        ),
        ((time.sleep, 0.2), ["absent.txt"], "^corpus 'absent.txt'"),
    ],
)
def test_a_fault_ends_the_counting_at_once(monkeypatch, deed, corpora, message):
    monkeypatch.setattr(prior_module, "CHUNK", 1)
    speech = Befallen(["small"], ["bird"])
    speech.deed = deed
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(5)  # to tag them takes two workers 10 s
    try:
        with pytest.raises(UserError, match=message):
            count_corpus(
                itertools.chain(["a bird"] * 100, *map(read_captions, corpora)), speech, workers=2
            )
    finally:
        signal.alarm(0)


WHOLE = (
    "a photo of object red wing bird orange small belly".split()
)  # words of one token; "titmouse" is two
TOKENS = {
    "a": 64,
    "tit": 400,
    "mouse</w>": 401,
    **{f"{word}</w>": row for row, word in enumerate(WHOLE, 320)},
}
NAMES, DRAW = (
    ["small red orange white", "bird wing belly titmouse"] * 2,
    np.random.default_rng(0).choice,
)
SCENES = [
    "a {} {} with a {} {}".format(*(DRAW(names.split()) for names in NAMES)) for _ in range(150)
]


def corpus_factors(folder, monkeypatch):
    """SVD of the PPMI matrix except its last column, with |entries|, as signs are arbitrary."""
    counts = count_captions(SCENES, SPEECH, True)
    words = sorted(word for word, _ in counts.words)
    matrix = np.zeros((len(words), len(words)))
    for (x, y), count in counts.contexts.items():
        matrix[words.index(x), words.index(y)] = count
    frequency = (matrix := matrix + matrix.T).sum(0)
    with np.errstate(divide="ignore"):
        pmi = np.log(matrix / frequency[:, None] / frequency**0.75 * (frequency**0.75).sum())
    u, s, _ = np.linalg.svd(np.maximum(pmi, 0))
    return "", lambda part, word: np.abs(u[:, :-1] * np.sqrt(s[:-1]))[words.index(word)]


def glove_file(folder, monkeypatch, name="g.txt"):
    table = dict(
        bird="1 2 3 4",
        wing="4 5 6 7",
        belly="6 5 4 3",
        small="-1 .5 1e-3 0",
        red="0 0 1 2",
        orange="0 1 1 2",
    )
    text = "".join(f"{word} {row}\n" for word, row in {**table, "new york": "7 7 7 7"}.items())
    if name.endswith(".zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:  # from which 100 dimensions are taken
            archive.writestr("g.4d.txt", text)
            table = {word: " ".join([row] * 25) for word, row in table.items()}
            archive.writestr(
                "g.100d.txt", "".join(f"{word} {row}\n" for word, row in table.items())
            )
    else:
        (folder / name).write_text(text)
    return folder / name, lambda part, word: np.array(table[word].split(), np.float32)


def huggingface_folder(
    folder, monkeypatch, dtype=torch.float32, key="text_model.embeddings.token_embedding.weight"
):
    """Published layouts: CLIP's vocabulary and BERT's, and the token table among other tensors."""
    words = {
        row: token.removesuffix("</w>") for token, row in TOKENS.items() if token.endswith("</w>")
    }
    (folder / "vocab.json").write_text(json.dumps(TOKENS))
    (folder / "vocab.txt").write_text(
        "\n".join(words.get(row, f"[unused{row}]") for row in range(600)) + "\n"
    )
    table = torch.randn(600, 4).to(dtype)
    torch.save({"logit_scale": torch.ones(()), key: table}, folder / "pytorch_model.bin")
    return folder, lambda part, word: table[TOKENS[f"{word}</w>"]].float().numpy()


def clip_text_folder(folder, monkeypatch):
    """CLIP's text tower in Hugging Face's names, two blocks as torch's own encoder computes them."""
    huggingface_folder(folder, monkeypatch)
    layer = torch.nn.TransformerEncoderLayer(
        128, 2, 512, 0.0, lambda x: x * (1.702 * x).sigmoid(), batch_first=True, norm_first=True
    )
    tower = torch.nn.TransformerEncoder(
        layer, 2, torch.nn.LayerNorm(128), enable_nested_tensor=False
    ).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    table, positions, projection = (
        torch.randn(49408, 128),
        torch.randn(77, 128),
        torch.randn(4, 128),
    )
    state = {
        "embeddings.token_embedding.weight": table,
        "embeddings.position_embedding.weight": positions,
        "embeddings.position_ids": torch.arange(77)[None],
    }
    names = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "self_attn.out_proj": "self_attn.out_proj",
        "norm": "final_layer_norm",
    }
    for name, value in tower.state_dict().items():
        name, _, kind = name.replace("layers.", "encoder.layers.").rpartition(".")
        if kind.startswith("in_proj"):
            for part, share in zip("qkv", value.chunk(3)):
                state[f"{name}.{part}_proj.{kind.removeprefix('in_proj_')}"] = share
            continue
        for ours, theirs in names.items():
            if name == ours or name.endswith(f".{ours}"):
                state[f"{name.removesuffix(ours)}{theirs}.{kind}"] = value
    state = {f"text_model.{name}": value for name, value in state.items()}
    torch.save(
        {**state, "text_projection.weight": projection, "logit_scale": torch.ones(())},
        folder / "pytorch_model.bin",
    )

    @torch.no_grad()
    def expected(part, word):  # the authors' prompt, "a photo of red object" or "a photo of bird"
        words = f"a photo of {word}{' object' * (part == 'adjective')}".split()
        ids = [49406, *(TOKENS[f"{word}</w>"] for word in words), 49407]
        x = (table[ids] + positions[: len(ids)])[None]
        causal = torch.nn.Transformer.generate_square_subsequent_mask(len(ids))
        return (tower(x, mask=causal)[0, -1] @ projection.T).numpy()

    return folder, expected


FILES = {
    "corpus": corpus_factors,
    "clip-text": clip_text_folder,
    "clip": huggingface_folder,
    "glove": glove_file,
    "bert": lambda *where: huggingface_folder(
        *where, torch.bfloat16, "bert.embeddings.word_embeddings.weight"
    ),
    "glove zip": lambda *where: glove_file(*where, "g.zip"),
}


@pytest.mark.parametrize("name", sorted({*FILES, *LANGUAGE_MODELS}))
def test_a_prior_holds_the_vectors_of_its_language_model(tmp_path, monkeypatch, name):
    (weights, expected), model = FILES[name](tmp_path, monkeypatch), name.split()[0]
    prior, again = (build_prior(SCENES, SPEECH, model, str(weights), workers=1) for _ in range(2))
    lost = model != "corpus"  # "white" and "titmouse", which is two tokens, or not there
    for part, other in zip(PARTS, ("white", "titmouse")):
        words, vectors = prior[f"{part}_words"].tolist(), prior[f"{part}_vectors"]
        assert len(words) == 4 - lost and (other in words) != lost and vectors.dtype == np.float32
        theirs = np.stack([expected(part, word) for word in words])
        np.testing.assert_allclose(
            np.abs(vectors) if model == "corpus" else vectors, theirs, atol=1e-5
        )
        assert np.array_equal(again[f"{part}_vectors"], vectors)  # the sign of corpus vectors too
    assert prior.provenance["weights"] == str(weights)
    assert prior.provenance["without_vector"] == dict.fromkeys(PARTS, lost)


def vectors_of(model, words, weights="", dim=0, **counted):
    return LANGUAGE_MODELS[model](
        dict(adjective=[], noun=words.split()), str(weights), dim, Counts(**counted)
    )["noun"]


@pytest.mark.parametrize(
    "model, name, content, message",
    [
        ("glove", "v.txt", b"bird 1 2 3\nwing 1 2\n", "line 2 is not a word and 3 numbers"),
        ("glove", "v.txt", b"bird 1 2 nan\n", "line 1 .*not finite"),
        ("glove", "v.txt", b"bird x\n", "could not convert"),
        ("glove", "v.txt", b"bird 1 2\nb\xff 1 2\n", "utf-8"),
        ("glove", "v.zip", b"PK nothing", "not a zip"),
        ("glove", "v.txt", b"bird 1 2 3\n", "it has 3 dimensions, --dim asks for 50"),
        ("glove", "v.zip", b"PK\5\6" + bytes(18), "0 files of 50 dimensions inside; give --dim"),
        ("glove", "absent", None, "No such file"),
        ("clip", "", None, "vocab.json"),
        ("bert", "", None, "vocab.txt"),
        ("clip", "vocab.json", b"{}", "pytorch_model.bin"),
        ("clip-text", "vocab.json", b"{}", "pytorch_model.bin"),
    ],
)
def test_bad_weights_are_named(tmp_path, model, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    weights = tmp_path / name if model == "glove" else tmp_path
    with pytest.raises(UserError, match=f"'{weights}.*{message}"):
        vectors_of(model, "bird wing", weights, 50 if "--dim" in message else 0)


def test_words_of_like_contexts_are_near():
    groups = [("red orange yellow", "breast belly wing"), ("steel iron tin", "wheel rod plate")]
    links = [
        tuple(sorted(pair)) for a, b in groups for pair in itertools.product(a.split(), b.split())
    ]
    words, contexts = (
        sorted({word for pair in links for word in pair}),
        dict(zip(links, itertools.count(20))),
    )
    vectors = vectors_of("corpus", " ".join([*words, "alone"]), dim=4, contexts=contexts)
    near = lambda of: [
        name for name, _ in nearest_words(list(vectors), np.stack(list(vectors.values())), of, 2)
    ]
    assert list(vectors) == words  # a word without neighbours has no vector
    assert (
        np.max([*vectors.values()], 0) > -np.min([*vectors.values()], 0)
    ).all()  # the largest entry is positive
    assert {*near("orange")} == {"red", "yellow"} and {*near("breast")} == {"belly", "wing"}
    with pytest.raises(UserError, match="12 words have neighbours, too few"):
        vectors_of("corpus", " ".join(words), dim=12, contexts=contexts)
    if (SHARED / "vectors").is_dir():  # Fig. 1, as far as GloVe has it
        vectors = vectors_of(
            "glove", "breast belly wheel", SHARED / "vectors" / "glove.6B.100d.zip"
        )
        assert near("belly") == ["breast", "wheel"]


@pytest.mark.parametrize(
    "sent, cut, digest",
    [
        (None, None, "1234"),
        (b"another", None, "1234"),
        (b"weights", 3, hashlib.sha256(b"weights").hexdigest()),
        (b"weights", 3, hashlib.md5(b"weights").hexdigest()),
        (b"another", None, hashlib.md5(b"weights").hexdigest()),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(server, tmp_path, sent, cut, digest):
    server.files["/w.pt"], server.cuts_after = sent, cut
    with pytest.raises(
        UserError, match="^http://.*/w.pt is unavailable: .*; run the command again$"
    ):
        download(f"{server.url}/w.pt", tmp_path / "folder" / "w.pt", digest)
    assert not list((tmp_path / "folder").iterdir())


def test_published_tensors_are_read_and_what_is_damaged_or_foreign_is_a_line(tmp_path, monkeypatch):
    state = {
        str(dtype): torch.arange(12).reshape(4, 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    }
    checkpoint = tmp_path / "last.ckpt"
    torch.save(state, checkpoint)
    torch.testing.assert_close(read_tensors(checkpoint), state, rtol=0, atol=0)
    torch.save({"state_dict": {**state, "step": 3}, "epoch": 1}, checkpoint)
    torch.testing.assert_close(read_tensors(checkpoint), state, rtol=0, atol=0)
    callback = type(
        "ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"}
    )
    with (
        monkeypatch.context() as published
    ):  # as by the Lightning of 2020, which whoever reads it lacks
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", callback.__module__):
            published.setitem(sys.modules, name, types.SimpleNamespace(ModelCheckpoint=callback))
        torch.save(
            {"state_dict": state, "callbacks": {callback: {"best_model_path": "x"}}}, checkpoint
        )
    torch.testing.assert_close(read_tensors(checkpoint), state, rtol=0, atol=0)
    whole = checkpoint.read_bytes()
    torch.save({"state_dict": state, "callbacks": Foreign()}, checkpoint)
    for data in (None, b"", whole[:5], whole[:-40]):
        if data is not None:
            checkpoint.write_bytes(data)
        with pytest.raises(UserError, match="^weights '.*' cannot be read: .+$"):
            read_tensors(checkpoint)


def edges_of(prior):
    adjectives, nouns = prior.adjective_words.tolist(), prior.noun_words.tolist()
    return {
        (adjectives[a], nouns[n]): c
        for (a, n), c in zip(prior.edges.tolist(), prior.edge_counts.tolist())
    }


def test_prior_keeps_frequent_words_in_their_order(tmp_path):
    captions = ["a white wing"] * 3 + [
        "an orange wing",
        "an orange bird",
        "a red bird",
        "a small bird",
        "a red wing",
    ]
    prior = build_prior(captions, SPEECH, "corpus", min_count=2, dim=3, workers=1, name="by hand")
    assert [*prior.adjective_words] == ["white", "orange", "red"] and [*prior.noun_words] == [
        "wing",
        "bird",
    ]
    assert prior.edges.dtype == np.int64 and prior.edges.tolist() == sorted(prior.edges.tolist())
    edges = pairs("white wing, orange wing, orange bird, red wing, red bird")
    assert edges_of(prior) == {**dict.fromkeys(edges, 1), ("white", "wing"): 3}
    assert (
        dict(corpus="by hand", captions=8).items() <= prior.provenance.items()
    )
    weights, _ = glove_file(tmp_path, None)
    with pytest.raises(UserError, match="no adjective is left: 0 are seen at least 4 times"):
        build_prior(captions, SPEECH, "glove", str(weights), min_count=4, workers=1)


def test_homographs_are_two_nodes(speech):
    captions = [
        "a bright orange breast",
        "an orange breast",
        "a ripe orange",
        "a ripe orange on a table",
    ]
    prior = build_prior(captions, speech, "corpus", min_count=1, dim=4, workers=1)
    assert edges_of(prior) == dict(
        zip(pairs("bright breast, orange breast, ripe orange"), (1, 2, 2))
    )


def test_prior_file_round_trip(tmp_path, prior):
    prior.save(tmp_path / "new" / "p.npz")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.npz"]
    loaded = Prior.load(tmp_path / "new" / "p.npz")
    assert all(np.array_equal(loaded[name], value) for name, value in vars(prior).items())
    torch.save(loaded.tensors(), tmp_path / "last.pt")
    held = torch.load(tmp_path / "last.pt", weights_only=True)  # what a checkpoint may hold
    assert set(held) == set(vars(prior)) - {"provenance"} and held["noun_words"] == list(
        "ABCDEFGHI"
    )
    assert (
        np.array_equal(held["adjective_vectors"], prior.adjective_vectors)
        and held["edges"].dtype == torch.int64
    )


def at(array, index, value):
    """A copy with one value changed."""
    array = array.astype(np.result_type(array.dtype, np.min_scalar_type(value)))
    array[index] = value
    return array


DEFECTS = [
    ("noun_vectors", lambda x: x[1:], "nouns do not have a vector each"),
    ("noun_vectors", lambda x: x[:, 1:], "adjectives do not have a vector each, of one length"),
    ("noun_vectors", lambda x: x[0], "do not have a vector each"),
    ("noun_vectors", lambda x: at(x, (2, 3), np.nan), "a vector of its nouns is not finite"),
    ("adjective_vectors", lambda x: at(x, (2, 3), np.inf), "adjectives is not finite"),
    ("noun_words", lambda x: x[:0], "nouns do not have a vector each"),
    ("edges", None, "edges is not a file in the archive"),
    ("edges", lambda x: at(x, (0, 1), 9), "names no adjective or no noun"),
    ("edges", lambda x: at(x, (0, 0), -1), "names no adjective or no noun"),
    ("edges", lambda x: x.T, "edges are not pairs"),
    ("edge_counts", None, "edge_counts is not a file in the archive"),
    ("edge_counts", lambda x: x[1:], "not pairs with a count each"),
    ("provenance", lambda _: "x", "Expecting value"),
]


@pytest.mark.parametrize("name, change, fault", DEFECTS)
def test_what_is_no_prior_is_refused(tmp_path, prior, name, change, fault):
    arrays = {**vars(prior), "provenance": "{}"}
    np.savez(tmp_path / "p.npz", **arrays)
    Prior.load(tmp_path / "p.npz")
    value = arrays.pop(name)
    np.savez(tmp_path / "p.npz", **arrays, **({name: change(value)} if change else {}))
    with pytest.raises(
        UserError, match=f"p.npz' is no prior: .*{fault}.*; make one with: python prior.py CORPUS"
    ):
        Prior.load(tmp_path / "p.npz")


def test_a_word_whose_vector_is_zero_has_none(tmp_path):
    (tmp_path / "v.txt").write_text("red 0 1\nsmall 1 1\nbird 1 1\nwing 0 0\n")
    prior = build_prior(BIRDS, SPEECH, "glove", str(tmp_path / "v.txt"), min_count=1, workers=1)
    assert prior.noun_words.tolist() == ["bird"]
    prior.check()


def test_shuffling_destroys_one_thing_and_keeps_the_rest(prior):
    before = np.unique(np.random.default_rng(0).integers(0, (40, 60), (500, 2)), axis=0)
    prior = replace(prior, edges=before)
    vectors, edges, other = (
        shuffled(prior, "vectors"),
        shuffled(prior, "edges"),
        shuffled(prior, "vectors", seed=1),
    )
    changed = lambda a, b: {name for name in vars(prior) if not np.array_equal(a[name], b[name])}
    assert shuffled(prior, "none") is prior and not changed(vectors, shuffled(prior, "vectors"))
    assert changed(vectors, other) == {"adjective_vectors", "noun_vectors"}
    assert changed(prior, vectors) == {"adjective_vectors", "noun_vectors", "provenance"}
    for name in ("adjective_vectors", "noun_vectors"):
        assert sorted(map(tuple, prior[name])) == sorted(map(tuple, vectors[name]))
    assert (
        changed(prior, edges) == {"edges", "provenance"} and edges.provenance["shuffled"] == "edges"
    )
    assert len(np.unique(edges.edges, axis=0)) == len(before)  # no edge twice
    for column in range(2):  # every word keeps its number
        assert np.array_equal(np.bincount(edges.edges[:, column]), np.bincount(before[:, column]))
    shared = set(map(tuple, before.tolist())) & set(map(tuple, edges.edges.tolist()))
    assert len(shared) < 0.4 * len(
        before
    )  # of 2,400 possible edges 500 are there, so a fifth would stay by chance
    assert all(
        np.array_equal(rewired(few, np.random.default_rng(0)), few)
        for few in (before[:0], before[:1])
    )


@pytest.fixture
def show(tmp_path, monkeypatch):
    """The start of a command that shows a prior of BIRDS."""
    (tmp_path / "c.txt").write_text("\n".join(BIRDS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prior_module, "WordNetSpeech", lambda: SPEECH)
    monkeypatch.setattr(prior_module.NLTKData, "present", lambda need: True)
    prior_module.main(
        "c.txt --embeddings corpus --min-count 1 --dim 3 --workers 1 --out birds.npz".split()
    )
    return ["show", "birds.npz", "--caption", "a red bird"]


def test_command_builds_and_shows(capsys, show):
    built = capsys.readouterr().out
    assert "birds.npz: 4 adjectives + 4 nouns, 4.0 bits per position" in built
    assert "6 edges; 0 words have no vector of corpus" in built
    prior_module.main(show)
    shown = capsys.readouterr().out
    assert "4 adjectives + 4 nouns, 4.0 bits per position" in shown and "\n6 edges\n" in shown
    assert "  red → bird\n" in shown and "  red: near " in shown and "  bird: near " in shown


def test_a_prior_is_shown_without_nltk(capsys, show, monkeypatch):
    def missing():
        raise UserError("NLTK data missing")

    monkeypatch.setattr(prior_module, "WordNetSpeech", missing)
    monkeypatch.setattr(prior_module.WordListSpeech, "name", "another")
    with pytest.raises(UserError, match="NLTK data missing"):
        prior_module.main(show)
    assert "  bird: near " in capsys.readouterr().out


MISTAKES = [
    ("", "name a CORPUS"),
    ("absent.txt", "'absent.txt' does not exist"),
    ("c.txt --embeddings bert", "bert needs --weights"),
    ("c.txt --embeddings glove", "glove needs --weights"),
    ("c.txt --embeddings clip --weights absent", "'absent' does not exist"),
    ("c.txt --embeddings bert --weights x --dim 3", "--dim has no effect on --embeddings bert"),
    ("c.txt --embeddings clip --dim 3", "--dim has no effect"),
    ("c.txt --embeddings corpus --weights x", "--weights has no effect"),
    ("c.txt --wieghts x", "unrecognized arguments: --wieghts x; see "),
    ("c.txt --dim few", "invalid int"),
    ("c.txt --min-count 0", "0 does not lie between 1"),
    ("c.txt --min 3", "unrecognized arguments: --min 3"),
    ("c.txt --embeddings corpus --min-count 2 --dim 4", "4 words have neighbours, too few"),
    ("c.txt --embeddings corpus --out birds.npz", "birds.npz exists; delete it, or name another"),
    ("c.txt --embeddings corpus --min-count 1 --out folder.npz", "folder.npz exists; "),
    ("show absent.npz", "'absent.npz' is no prior: [Errno 2]"),
    ("show birds.npz --dim 3", "unrecognized"),
]


@pytest.mark.parametrize("args, message", MISTAKES)
def test_a_users_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, show, args, message):
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        command(lambda: prior_module.main(args.split()))
    printed = capsys.readouterr().err
    assert (
        end.value.code == 2
        and message in printed
        and printed.startswith("error: ")
        and printed.count("\n") == 1
    )


@pytest.mark.parametrize("help", [False, True])
def test_a_reader_that_leaves_is_no_error(show, help):
    # -E: with print's buffer, whatever PYTHONUNBUFFERED says
    script = [sys.executable, "-E", ROOT / "prior.py", *(["--help"] if help else show)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_script_and_its_workers(tmp_path, number):
    (tmp_path / "waits.py").write_text("""import time, prior
class Waits(prior.WordListSpeech):
    def __call__(self, caption):
        time.sleep(print("tagging", flush=True) or 60)
if __name__ == "__main__":
    prior.command(lambda: prior.count_corpus(["a bird"], Waits([], ["bird"]), workers=2))""")
    pipes = dict(
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    process = subprocess.Popen([sys.executable, tmp_path / "waits.py"], **pipes)
    assert process.stdout.readline() == b"tagging\n"
    process.send_signal(number)
    printed = process.communicate(
        timeout=20
    )  # to the end of both, which the workers hold open as long as they live
    assert printed == (b"", b"") and process.returncode == (
        -number if number == signal.SIGKILL else 128 + number
    )


class Hungry(WordListSpeech):
    def __call__(self, caption):
        raise MemoryError


def test_lack_of_memory_is_one_line_that_blames_no_file(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("nltk.data.find", lambda path: bytes(1 << 60))
    deeds = [
        WordNetSpeech,
        lambda: count_corpus(["a bird"] * 3, Hungry([], ["bird"]), workers=2),
        lambda: count_corpus(["a bird"], Hungry([], ["bird"]), workers=1),
    ]
    for deed in deeds:
        with pytest.raises(SystemExit) as end:
            command(deed)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.startswith("error: out of memory") and printed.count("\n") == 1


@pytest.mark.parametrize("link", [False, True])
def test_a_write_replaces_a_file_whole_or_not_at_all(tmp_path, link):
    kept = path = tmp_path / "new" / "x"
    if link:
        os.symlink(kept, path := tmp_path / "link")
    for text in ("first", "second"):
        with atomic_write(path) as part:
            assert part == tmp_path / "new" / "x.part"
            part.write_text(text)
        assert kept.read_text() == text
    with pytest.raises(UserError, match="is a folder or a device; name a file"):
        with atomic_write(tmp_path):
            pass
    part.write_text("of a process that was killed")
    with pytest.raises(RuntimeError), atomic_write(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert (
        kept.read_text() == "second"
        and list(kept.parent.iterdir()) == [kept]
        and path.is_symlink() == link
    )


def test_hidden_files_are_not_listed_and_linked_folders_are_followed(tmp_path):
    shown = ["a/1.JPG", "a/b/2.jpg", "a.jpg", "birds/3.jpg", "birds/again/3.jpg", "z.jpg"]
    hidden = [
        ".x.jpg",
        "a/._1.JPG",
        ".thumbnails/1.jpg",
        "a/.ipynb_checkpoints/1.jpg",
        "__MACOSX/a/1.jpg",
        "a/1.txt",
    ]
    root, elsewhere = (
        tmp_path / ".cache" / "root",
        tmp_path / "elsewhere",
    )  # a hidden folder above is no matter
    for path in [*(root / name for name in (*shown[:3], "z.jpg", *hidden)), elsewhere / "3.jpg"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.symlink(elsewhere, root / "birds")
    os.symlink(elsewhere.parent / "more", elsewhere / "again")
    (elsewhere.parent / "more").mkdir()
    (elsewhere.parent / "more" / "3.jpg").touch()
    os.symlink(root / "absent.jpg", root / "broken.jpg")
    os.symlink(root, root / "a" / "loop")
    os.symlink(elsewhere, elsewhere.parent / "more" / "loop")
    assert [str(path.relative_to(root)) for path in list_files(root, (".jpg", ".png"))] == shown
    with pytest.raises(UserError, match="no such folder: '.*absent'"):
        list(list_files(tmp_path / "absent", (".jpg",)))


@pytest.mark.parametrize(
    "kinds, error, message",
    [
        ((), ValueError("two\nlines"), "cannot: two!"),
        ((), AssertionError(), "cannot: AssertionError!"),
        ((), UserError("as it is"), "as it is"),
        ((ValueError, OSError), ValueError("{}"), "cannot: {}!"),
        ((ValueError,), KeyError("other"), "'other'"),
    ],
)
def test_an_error_becomes_the_users(kinds, error, message):
    with (
        pytest.raises(KeyError if "other" in message else UserError) as raised,
        user_error("cannot: {}!", *kinds),
    ):
        raise error
    assert str(raised.value) == message


def test_what_decides_a_prior_is_noted(monkeypatch):
    captions = ["a red bird", "a white wing"]
    made_from = build_prior(captions, SPEECH, "corpus", min_count=1, workers=1).provenance["made_from"]
    assert made_from == prior_module.made_from(captions, "corpus", 1)
    assert made_from != prior_module.made_from(captions, "clip", 1)
    assert made_from != prior_module.made_from(captions, "corpus", 2)
    assert made_from != prior_module.made_from(captions[:1], "corpus", 1)
    monkeypatch.setattr(prior_module, "RULES", prior_module.RULES[1:])
    assert made_from != prior_module.made_from(captions, "corpus", 1)


def test_what_a_killed_download_left_goes(server, tmp_path):
    server.files["/w.pt"] = b"weights"
    (tmp_path / "w.pt.0123456789abcdef.partial").write_bytes(b"half")
    download(f"{server.url}/w.pt", tmp_path / "w.pt", hashlib.sha256(b"weights").hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
