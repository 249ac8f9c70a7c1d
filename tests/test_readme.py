"""What the README says: its commands parse, the quick ones run, its pieces work; and each piece of vqct.py works alone."""

import ast
import re
import shlex
import sys
import types

import pytest
import torch

import evaluate
import prior
import synthesize
import train
import vqct
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"prior": prior, "vqct": vqct, "train": train, "evaluate": evaluate, "synthesize": synthesize}

# ---------------------------------------------------------------------------------------------
# Commands


def fenced(language):
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if kind == language]


def commands_in(text):
    """Lines of shell → (words of each command of ours, what a comment says of it)."""
    for line in text.replace("\\\n", " ").splitlines():
        line, _, remark = line.partition("  #")
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line.strip())
        lines = [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else line.split("&&")
        for words in map(shlex.split, lines):
            if words[:1] == ["torchrun"]:
                words = ["python", *words[3:]]
            if words[:1] == ["python"] and words[1].endswith(".py"):
                yield tuple(words[1:]), remark.strip()


LISTED = [command for text in fenced("") for command in commands_in(text)]
INLINE = [command for text in re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```", "", README)) for command in commands_in(text)]
DOCSTRINGS = []
for script in SCRIPTS.values():
    paragraphs = re.sub(r"\\\n\s+", " ", script.__doc__).splitlines()
    texts = [re.split(r" {3,}(?!--)", line.strip())[0] for line in paragraphs if line.startswith("    python ")]
    DOCSTRINGS += [command for text in texts for command in commands_in(text.replace("…", ""))]
ALL = sorted({words for words, _ in LISTED + INLINE + DOCSTRINGS})


def parse(script, *words):
    """What a script's own parser makes of its flags."""
    words = [word.replace("…", "") for word in words]
    if script == "prior":
        task = words[0] if words[0] in ("show", "count", "merge") else ""
        return prior.parse_show(words[1:]) if task == "show" else prior.parse(words[bool(task) :], task)
    return SCRIPTS[script].parse(words)


def test_there_are_commands_of_every_kind():
    assert len(ALL) > 35 and {words[0] for words in ALL} == {*(f"{name}.py" for name in SCRIPTS), "tests/bench.py"}
    shown = {words[words.index("--dataset") + 1] for words in ALL if words[0] == "train.py" and "--dataset" in words}
    assert shown == {"folder", *train.DATASETS}  # the demo needs no flag
    tasks = {name for name in synthesize.COMMANDS if any(name in words for words in ALL if words[0] == "synthesize.py")}
    assert tasks == set(synthesize.COMMANDS) and {"show", "count", "merge"} <= {words[1] for words in ALL if words[0] == "prior.py"}
    assert {words[words.index("--method") + 1] for words in ALL if "--method" in words} <= set(train.METHODS)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_is_one_that_its_script_takes(words, capsys):
    script = words[0].removesuffix(".py")
    if script == "tests/bench":
        assert all(f'"{word}"' in (ROOT / words[0]).read_text() for word in words[1:] if word.startswith("--"))
    elif script == "vqct":
        assert len(words) == 1
    elif "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            parse(script, *words[1:])
        assert stopped.value.code == 0 and "--" in capsys.readouterr().out
    elif "--resume" in words:
        with pytest.raises(prior.UserError, match="no checkpoint 'runs/"):
            parse(script, *words[1:])
    else:
        parse(script, *words[1:])


def test_every_flag_named_exists(capsys):
    helps = []
    for script, *words in (
        ("prior", "--help"),
        ("prior", "count", "--help"),
        ("prior", "merge", "--help"),
        ("prior", "show", "--help"),
        ("train", "--help"),
        ("evaluate", "--help"),
        *(("synthesize", "run", name, "--help") for name in synthesize.COMMANDS),
    ):
        with pytest.raises(SystemExit):
            parse(script, *words)
        helps.append(capsys.readouterr().out)
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(helps)))
    others = {"--nproc-per-node"} | set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests" / "bench.py").read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - others
    assert len(named) > 40 and named <= known, named - known


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder in which `python train.py` and the second stage of the README were run, on few birds and for few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.DemoDataset, "SIZES", {"train": 64, "val": 8})
    monkeypatch.setattr(evaluate, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr(evaluate, "load_perceptual", lambda *files: (None, "no LPIPS weights here"))
    train.main(["--steps", "2", "--eval-every", "2"])
    (words,) = {words for words, _ in LISTED if words[:3] == ("synthesize.py", "runs/demo-vqct", "train")}
    synthesize.main([*words[1:], "--steps", "2", "--batch-size", "8"])
    return tmp_path


def test_the_quick_commands_run(demo, capsys):
    quick = [words for words, remark in LISTED if remark.startswith("quick")]
    assert len(quick) >= 6
    for words in quick:
        if words[1:2] == ("show",):  # the demo's prior knows its parts of speech, so no NLTK data is asked for
            assert (demo / "runs/demo-vqct/prior.npz").is_file()
        main = SCRIPTS[words[0].removesuffix(".py")].main
        main(list(words[1:])) if len(words) > 1 else main()
        assert len(capsys.readouterr().out) > 100, words
    for picture in (
        "figure1.png",
        *(f"runs/demo-vqct/figures/{name}.png" for name in ("fig3_toy", "fig5_usage", "fig6_similarity", "fig7_regions", "fig7_words")),
        *(
            f"runs/demo-vqct/{name}.png"
            for name in ("reconstructions", "synthesis/gpt-segmentation/samples", "synthesis/gpt-segmentation/completions")
        ),
    ):
        assert (demo / picture).stat().st_size > 1000, picture


def test_what_is_named_is_there():
    names = set(re.findall(r"`(prior|vqct|train|evaluate|synthesize)\.([A-Za-z_]\w*)(?:\.(\w+))?`", README))
    assert len(names) > 15
    for module, name, attribute in names:
        if name in ("py", "npz"):
            continue
        found = getattr(SCRIPTS[module], name)
        assert not attribute or hasattr(found, attribute) or attribute in found.__dataclass_fields__, (module, name, attribute)


def test_vqct_has_its_table_of_contents_in_order():
    contents = vqct.__doc__.split("paper's order:")[1].split("`prior.py`")[0]
    names = [name for name in re.findall(r"\b[A-Za-z]\w+\b", contents) if hasattr(vqct, name)]
    lines = [next(i for i, line in enumerate(open(vqct.__file__)) if re.match(rf"(class|def) {name}\b", line)) for name in names]
    assert len(names) > 20 and lines == sorted(lines)


# ---------------------------------------------------------------------------------------------
# Pieces


def test_the_pieces_of_the_readme_work(capsys):
    space = {}
    for block in fenced("python"):
        assert len(block.splitlines()) <= 5
        exec(block, space)
    assert tuple(space["adjective_codes"].shape) == (2, 64) and tuple(space["tokens"].shape) == (2, 2, 8, 8)
    assert abs(space["distance"] - 6.0) < 1e-9 and torch.allclose(space["similarity"], torch.ones(2))
    pairs = [("small", "bird"), ("orange", "breast"), ("white", "belly")]
    assert capsys.readouterr().out.splitlines() == [str(pairs)]


PACKAGES = {"torch", "torchvision", "numpy", "nltk", "PIL", "scipy"}


def definitions(module):
    """Top-level names of a script → (node, source); imported names → (root package, statement)."""
    source = open(module.__file__, encoding="utf-8").read()
    own, imported = {}, {}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own[node.name] = node, text
        elif isinstance(node, ast.Assign):
            own.update({target.id: (node, text) for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                root = (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
                start = f"from {node.module} import" if isinstance(node, ast.ImportFrom) else "import"
                bound = alias.asname or alias.name.split(".")[0]
                imported[bound] = root, f"{start} {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
    return own, imported


OWN, IMPORTED = definitions(vqct)
SHARED_OWN, SHARED_IMPORTED = definitions(prior)


def lifted(name):
    """A module of a piece's source, of what that names in turn, and of their imports alone."""
    wanted, found, header = [name], {}, set()
    while wanted:
        piece = wanted.pop()
        own, imported = (OWN, IMPORTED) if piece in OWN else (SHARED_OWN, SHARED_IMPORTED)
        found[piece] = own[piece]
        for named in {node.id for node in ast.walk(own[piece][0]) if isinstance(node, ast.Name)} - set(found):
            if named in own or imported.get(named, ("", ""))[0] == "prior":
                wanted.append(named)
            elif named in imported:
                root, statement = imported[named]
                assert root in PACKAGES | sys.stdlib_module_names, f"{piece} needs {root}"
                header.add(statement)
    ordered = [piece for piece in (*SHARED_OWN, *OWN) if piece in found]
    module = types.ModuleType(f"lifted_{name}")
    exec("\n".join([*sorted(header), *dict.fromkeys(found[piece][1] for piece in ordered)]), module.__dict__)
    return module


SMALL = "small = dict(channels=8, multipliers=(1, 2), blocks=1, z_channels=8)\n"
CONFIG = "config = ModelConfig(resolution=16, channels=8, multipliers=(1, 2), blocks=1, z_channels=8, code_dim=8, transfer_width=16)\n"
PRIOR = "prior = {'adjective_vectors': torch.randn(5, 6), 'noun_vectors': torch.randn(7, 6), 'edges': [(0, 0), (4, 6)]}\n"
NOTHING = "Condition('none', 0, (2, 2), 16)"
GPT = "TokenTransformer((5, 7), (2, 2), Condition('none', 0, (2, 2), 16), width=16, depth=1, heads=2)"
DENOISER = "Denoiser(4, (2, 2), Condition('none', 0, (2, 2), 16), width=16, depth=1, heads=2)"
COMPANIONS = (
    "Condition",
    "ModelConfig",
    "VQModel",
    "TokenTransformer",
    "Denoiser",
)  # what a piece is used with, though it does not name it
USES = {  # of every public name: lines that set `well`
    "nearest_code": "well = nearest_code(torch.eye(3), torch.eye(3)).tolist() == [0, 1, 2]",
    "look_up": "well = look_up(torch.zeros(2, 1, 3, 3, dtype=torch.int64), torch.ones(4, 5)).shape == (2, 5, 3, 3)",
    "VectorQuantizer": "well = VectorQuantizer()(torch.randn(2, 4, 3, 3), torch.randn(9, 4))[0].shape == (2, 4, 3, 3)",
    "NormalizedAdjacency": "well = NormalizedAdjacency([(0, 1)], 2)(torch.eye(2)).allclose(torch.full((2, 2), 0.5))",
    "GraphConvolution": "well = GraphConvolution(3, 4)(torch.randn(2, 3), lambda nodes: nodes).shape == (2, 4)",
    "CodebookTransfer": "well = (CodebookTransfer((3, 8, 8, 4), torch.nn.Identity())(torch.randn(2, 3)) >= 0).all()",
    "Codebook": "well = [len(codes) for codes in Codebook(torch.randn(5, 3), (2, 3))()] == [2, 3]",
    "Output": "well = Output(1, 2, 3).indices == 2",
    "VQModel": CONFIG + PRIOR + "model, x = VQModel(config, prior).eval(), torch.randn(1, 3, 16, 16)\n"
    "well = torch.equal(model.decode(model.encode(x)), model(x).x_hat)",
    "group_norm": "well = group_norm(64)(torch.randn(1, 64, 2, 2)).shape == (1, 64, 2, 2)",
    "ResidualBlock": "well = ResidualBlock(8, 12)(torch.randn(1, 8, 4, 4)).shape == (1, 12, 4, 4)",
    "AttentionBlock": "well = AttentionBlock(8)(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)",
    "Downsample": "well = Downsample(8)(torch.randn(1, 8, 4, 4)).shape == (1, 8, 2, 2)",
    "Upsample": "well = Upsample(8)(torch.randn(1, 8, 4, 4)).shape == (1, 8, 8, 8)",
    "keep_variance": "network = torch.nn.Conv2d(8, 8, 3)\nkeep_variance(network)\nwell = (network.bias == 0).all()",
    "Encoder": SMALL + "well = Encoder(**small)(torch.randn(1, 3, 16, 16)).shape == (1, 8, 8, 8)",
    "Decoder": SMALL + "well = Decoder(**small)(torch.randn(1, 8, 8, 8)).shape == (1, 3, 16, 16)",
    "Discriminator": "well = Discriminator(8)(torch.randn(1, 3, 64, 64)).shape == (1, 1, 6, 6)",
    "hinge_loss": "well = hinge_loss(torch.tensor(2.0), torch.tensor(-2.0)) == 0",
    "across": "well = across(torch.ones(2), 'mean').tolist() == [1, 1]",
    "adaptive_weight": "w, one = torch.ones(3, requires_grad=True), torch.ones(3)\nwell = adaptive_weight(w * 2, w, one, 4 * one) < 0.2501",
    "LPIPS": "well = LPIPS('squeeze')(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)) == 0",
    "draw": "well = draw(torch.tensor([[0.0, 99.0]])) == 1",
    "GumbelQuantizer": "well = GumbelQuantizer(4, 9)(torch.randn(2, 4, 3, 3), torch.randn(9, 4))[2] > 0",
    "ClusteredQuantizer": "codes = torch.randn(9, 4)\nkept = codes.clone()\nClusteredQuantizer(9)(torch.randn(2, 4, 3, 3), codes)\nwell = (codes != kept).any()",
    "RegularizedQuantizer": "well = RegularizedQuantizer()(torch.randn(2, 4, 3, 3), torch.randn(9, 4))[2] > 0",
    "ModelConfig": "well = ModelConfig(codebooks=1).codebooks == 1",
    "make_quantizer": "well = type(make_quantizer(ModelConfig(quantizer='regvq'), 4, 9, 1)).__name__ == 'RegularizedQuantizer'",
    "needs_prior": "well = needs_prior(ModelConfig())",
    "make_codebook": CONFIG + PRIOR + "well = make_codebook(config, prior).sizes == (5, 7)",
    "rescale": "well = rescale(torch.full((2, 2), 7.0), 'rms').allclose(torch.ones(2, 2))",
    "Block": "well = Block(16, 2)(torch.randn(2, 5, 16), causal=True).shape == (2, 5, 16)",
    "Positions": "well = Positions((2, 3), 4)().shape == (6, 4)",
    "Condition": "well = Condition('class', 3, (2, 2), 16)(torch.tensor([1, 2]), 2).shape == (2, 1, 16)",
    "CodeEmbedding": "well = CodeEmbedding(5, 8)(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 8)",
    "TokenTransformer": f"well = [part.shape[-1] for part in {GPT}(torch.zeros(1, 2, 2, 2, dtype=torch.int64))] == [5, 7]",
    "draw_tokens": "well = draw_tokens(torch.tensor([[0.0, 9.0]]), temperature=0) == 1",
    "sample_tokens": f"well = sample_tokens({GPT}, 3).shape == (3, 2, 2, 2)",
    "Denoiser": f"well = {DENOISER}.loss(torch.randn(2, 4, 2, 2))[0] > 0",
    "sample_features": f"well = sample_features({DENOISER}, 3, steps=2).shape == (3, 4, 2, 2)",
    "taming_names": "well = taming_names(ModelConfig())('to_codes.weight') == ('quant_conv.weight',)",
    "load_taming": CONFIG + PRIOR + "model = VQModel(config, prior)\n"
    "try:\n    load_taming(model, None, {})\nexcept ValueError as error:\n    well = 'encoder.conv_in.weight is missing' in str(error)",
    "show_network": "import torch\nwell = show_network('tiny') is None",
    "show_equations": "well = show_equations() is None",
}


def test_every_public_piece_has_a_use():
    public = {name for name, (node, _) in OWN.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not name.startswith("_")}
    public -= {"main"}
    assert set(USES) == public, set(USES) ^ public


@pytest.mark.parametrize("name", USES)
def test_a_piece_lifted_out_works(name):
    module = lifted(name)
    companions = {other: getattr(vqct, other) for other in COMPANIONS} | {"torch": torch}
    exec(USES[name], {**companions, **module.__dict__}, module.__dict__)
    assert module.well
