"""What the README says: its commands parse, the quick ones run, its pieces and all docstrings' examples work; and each
piece of vqct.py works alone."""

import ast
import builtins
import dis
import doctest
import itertools
import json
import math
import re
import shlex
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import evaluate
import prior
import synthesize
import train
import vqct
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"prior": prior, "vqct": vqct, "train": train, "evaluate": evaluate, "synthesize": synthesize}

# ======== Commands

def fenced(language):
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if kind == language]


def commands_in(text):
    """Lines of shell → (words of each command of ours, what a comment says of it)."""
    for line in text.splitlines():
        line, _, remark = line.partition("  #")
        loop = re.fullmatch(r"for (\w+) in (.*?); do (.*); done", line.strip())
        lines = [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()] if loop else line.split("&&")
        for words in map(shlex.split, lines):
            if words[:1] == ["torchrun"]:
                words = ["python", *words[3:]]
            if words[:1] == ["python"] and words[1].endswith(".py"):
                yield tuple(words[1:]), remark.strip()


LISTED = [command for text in fenced("") for command in commands_in(text)]
PROSE = re.sub(r"(?ms)^```.*?^```", "", README)
INLINE = [command for text in re.findall(r"`([^`]+)`", PROSE) for command in commands_in(text.replace("…", ""))]
DOCSTRINGS = []
for script in SCRIPTS.values():
    lines = [line.strip() for line in script.__doc__.splitlines() if re.match(r" {4}(python|torchrun) ", line)]
    texts = [re.split(r" {3,}(?!--)", line)[0] for line in lines]
    DOCSTRINGS += [command for text in texts for command in commands_in(text)]
ALL = sorted({words for words, _ in LISTED + INLINE + DOCSTRINGS})


def test_there_are_commands_of_every_kind():
    assert len(ALL) > 30 and {words[0] for words in ALL} == {*(f"{name}.py" for name in SCRIPTS), "tests/bench.py"}
    shown = {words[words.index("--dataset") + 1] for words in ALL if words[0] == "train.py" and "--dataset" in words}
    assert shown == {"folder", *train.DATASETS}  # the demo needs no flag
    of_synthesize = {word for words in ALL if words[0] == "synthesize.py" for word in words}
    assert set(synthesize.COMMANDS) <= of_synthesize


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_is_one_that_its_script_takes(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = words[0].removesuffix(".py")
    for flag, word in zip(words, words[1:]):
        named = "." in word and "/" not in word or script == "prior" and "/" in word
        if named and flag != "--out" and not word.startswith("-"):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    if script == "tests/bench":
        assert all(f'"{word}"' in (ROOT / words[0]).read_text() for word in words[1:] if word.startswith("--"))
    elif script == "vqct":
        assert len(words) == 1
    elif "--resume" in words:
        with pytest.raises(prior.UserError, match="no run here: 'runs/demo-vqct/last.pt'"):
            train.parse(words[1:])
    elif script == "evaluate":
        with pytest.raises(prior.UserError, match="is not a run of train.py"):  # the flags are understood
            evaluate.main(list(words[1:]))
    else:
        SCRIPTS[script].parse(list(words[1:]))


def test_every_flag_named_exists(capsys):
    for script, *words in (
        (prior, "--help"),
        (prior, "show", "--help"),
        (train, "--help"),
        (evaluate, "--help"),
        *((synthesize, "run", name, "--help") for name in synthesize.COMMANDS),
    ):
        with pytest.raises(SystemExit) as stopped:
            script.main(words)
        assert stopped.value.code == 0
    known = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    known |= {"--nproc-per-node"} | set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests" / "bench.py").read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert len(named) > 40 and named <= known, named - known


# ======== Results

REFERENCE = ROOT / "tests" / "reference"
RESULTS_PAGE = (REFERENCE / "README.md").read_text(encoding="utf-8")


def evaluations(folder, ending=r"-\d$"):
    """The stored evaluations of a folder: row → its results; `ending` of names is not the row's."""
    results = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        results[re.sub(ending, "", path.stem)].append(json.loads(path.read_text(encoding="utf-8")))
    return results


SHORT, LONG = evaluations(REFERENCE / "cub64"), evaluations(REFERENCE / "cub64" / "long")
FIVE = sorted(row for row, seeds in LONG.items() if len(seeds) == 5)


def mean_and_deviation(results, column, form):
    return evaluate.spread([result[column] for result in results], form).replace(" ± ", "±")


def p_values(results):
    """Welch's p of every comparison with `vqct`, and after Holm's correction over the table: (row, column) → both."""
    compared = [(row, column) for row in results if row != "vqct" for column in ("psnr", "lpips")]
    samples = lambda row, column: [result[column] for result in results[row]]
    p = [scipy.stats.ttest_ind(samples(*pair), samples("vqct", pair[1]), equal_var=False).pvalue for pair in compared]
    return dict(zip(compared, zip(p, evaluate.holm(p))))


def cells_of(results):
    """Every row of a table, as its page prints it: row → list of cells."""
    tested, rows = p_values(results), {}
    for row, seeds in results.items():
        cells = [str(len(seeds))]
        for column, form in (("psnr", "{:.2f}"), ("lpips", "{:.3f}")):
            p = " ({:.2g}, {:.2g})".format(*tested[row, column]) if row != "vqct" else ""
            cells.append(mean_and_deviation(seeds, column, form) + p)
        codes = ([result["codes_used"][part] for result in seeds] for part in seeds[0]["codes"])
        cells.append(" + ".join(evaluate.spread(used, "{:,.0f}").replace(" ± ", "±") for used in codes))
        rows[row] = [*cells, mean_and_deviation(seeds, "bits_entropy", "{:,.0f}")]
    return rows


def table_in(text):
    """The rows of a page's table: name of the evaluations → list of cells."""
    found = re.findall(r"(?m)^\| `(.*?)` \| (\d \|.*) \|$", text)
    return {re.sub("^vqct --(.*) ", r"\1-", name): cells.split(" | ") for name, cells in found}


def found_in(readme):
    return " ".join(readme.split("\n## What was found")[1].split("\n## ")[0].split())


def interval_in(results, row):
    """The uncorrected 95 % interval of a row's PSNR minus that of `vqct`, as the pages print it."""
    samples = [[result["psnr"] for result in results[name]] for name in (row, "vqct")]
    interval = scipy.stats.ttest_ind(*samples, equal_var=False).confidence_interval()
    return f"{interval.low:.2f} to {interval.high:.2f} dB".replace("-", "−")


def test_the_tables_of_results_are_those_of_their_evaluations():
    short, long = RESULTS_PAGE.split("\n## 9,000 steps")
    assert table_in(short) == cells_of(SHORT) and table_in(long) == cells_of(LONG)
    for results in (SHORT, LONG):
        for row, seeds in results.items():
            assert [result["config"]["seed"] for result in seeds] == list(range(len(seeds))), row
            assert len(evaluate.rows_of(seeds)) == 1, row
    assert {result["step"] for seeds in LONG.values() for result in seeds} == {9000}
    six = table_in(README.split("\n## What was found")[1].split("\n## ")[0])
    assert len(six) == 6 and six.items() <= cells_of(SHORT).items()


def test_the_sentences_of_results_are_those_of_their_evaluations():
    page, found = " ".join(RESULTS_PAGE.split("\n## 9,000 steps")[0].split()), found_in(README)
    differ = {(row, column) for (row, column), (_, corrected) in p_values(SHORT).items()
              if corrected < 0.01 and len(SHORT[row]) == 5}
    assert differ == {("matched", "psnr"), ("matched", "lpips"), ("matched-l2", "psnr")}
    mean_psnr = {row: np.mean([result["psnr"] for result in seeds]) for row, seeds in SHORT.items()}
    for row in ("codes-random", "shuffle-vectors", "shuffle-edges"):
        lower, (_, corrected) = mean_psnr["vqct"] - mean_psnr[row], p_values(SHORT)[row, "psnr"]
        said = rf"`--{row.replace('-', ' ', 1)}` by {lower:.2f} dB \((corrected p )?{corrected:.2g}\)"
        assert re.search(said, page) and re.search(said, found), said
    mean = lambda column: [np.mean([result[column] for result in seeds]) for seeds in SHORT.values()]
    assert f"ρ={scipy.stats.spearmanr(mean('bits_entropy'), mean('psnr')).statistic:.2f}" in page
    ratios = {row: [[result["alignment"][part]["ratio"] for part in prior.PARTS] for result in SHORT[row]]
              for row in ("vqct", "shuffle-vectors", "matched-cvq")}
    for row, seeds in ratios.items():
        words = [evaluate.spread(list(column), "{:.2f}").replace(" ± ", "±") for column in zip(*seeds)]
        assert " and ".join(words) in page, row
    tests = (scipy.stats.ttest_ind(ratios["vqct"], ratios[row], equal_var=False) for row in list(ratios)[1:])
    assert f"is seen: p ≥ {min(test.pvalue.min() for test in tests):.3f} before" in page
    assert all(len(seeds) == 5 for seeds in ratios.values())
    near = ("multi-mlp", "random-mlp", "simvq", "matched-cvq", "words-linear")
    apart = max(abs(mean_psnr[row] - mean_psnr["vqct"]) for row in near)
    assert f"within {math.ceil(100 * apart) / 100:.2f} dB" in page
    lower = {row: mean_psnr["vqct"] - mean_psnr[row] for row in ("matched", "matched-l2")}
    assert f"{lower['matched']:.1f} dB better than `matched`" in found
    assert f"They are {lower['matched']:.2f} and {lower['matched-l2']:.2f} dB lower" in page
    assert interval_in(SHORT, "simvq") in page
    used = {row: np.mean([sum(result["codes_used"].values()) for result in seeds]) for row, seeds in SHORT.items()}
    assert (f"`matched` uses {used['matched']:.0f} of its 3,791 codes on average, `vqgan` {used['vqgan']:.0f} of 1,024, "
            f"`frozen` {used['frozen']:.0f} and `finetune` {used['finetune']:.0f} of 3,791. "
            f"`vqct` uses {used['vqct']:,.0f}") in page
    assert f"uses {used['vqct']:,.0f} of its 3,791 codes on average, and `matched` uses {used['matched']:.0f}" in found
    counts = [[sum(result["codes_used"].values()) for result in SHORT[row]] for row in ("vqct", "matched")]
    p = scipy.stats.ttest_ind(*counts, equal_var=False).pvalue
    assert f"Welch's p of `vqct` against `matched` is {p:.2g}" in page
    least = min(result["codes_used"]["noun"] for result in SHORT["vqct"])
    assert f"uses only {least} of 2,888 nouns" in page
    high = [row for row in SHORT if mean_psnr[row] > 22]
    bits = [np.mean([result["bits_entropy"] for result in SHORT[row]]) for row in high]
    assert len(high) == 8
    assert f"ρ is {scipy.stats.spearmanr(bits, [mean_psnr[row] for row in high]).statistic:.2f}" in page
    chance = min(result["alignment"][part]["p"] for result in SHORT["vqct"] for part in prior.PARTS)
    assert f"the least p is {chance:.2f}" in page and f"the least p of ten tests of VQCT is {chance:.2f}" in found
    assert {result["alignment"]["noun"]["images"] for result in SHORT["vqct"]} == {243}
    for row in FIVE:
        assert mean_and_deviation(LONG[row], "psnr", "{:.2f}") in found, row


def test_the_sentences_of_the_long_runs_are_those_of_their_evaluations():
    page = " ".join(RESULTS_PAGE.split("\n## 9,000 steps")[1].split())
    found = found_in(README)
    least = min(corrected for _, corrected in p_values(LONG).values())
    assert least >= 0.01 and f"The least corrected p is {least:.2g}" in page
    assert f"(corrected p ≥ {least:.2g})" in found
    psnr = {row: [result["psnr"] for result in seeds] for row, seeds in LONG.items()}
    gap = {row: np.mean(x) - np.mean(psnr["vqct"]) for row, x in psnr.items()}
    assert f"it is {gap['matched-cvq']:.2f} and {gap['simvq']:.2f} dB" in page
    of_seeds = [f"{x:.2f}" for x in psnr["vqct"]]
    assert f"Seeds 0 and 1 have {of_seeds[0]} and {of_seeds[1]} dB, " in page
    assert f"seeds 2 to 4 have {min(of_seeds[2:])} to {max(of_seeds[2:])} dB" in page
    for text in (page, found):
        assert f"`matched-cvq` minus {'`vqct`' if text is page else 'VQCT'} is {interval_in(LONG, 'matched-cvq')}" in text
    assert f"that of `simvq` {interval_in(LONG, 'simvq')}" in page
    assert f"differ by {max(psnr['vqct']) - min(psnr['vqct']):.2f} dB" in page
    first = {row: np.mean(x[:2]) - np.mean(psnr["vqct"][:2]) for row, x in psnr.items()}
    assert f"{first['matched-cvq']:.2f} and {first['simvq']:.2f} dB above `vqct`" in page
    assert len(LONG["words-linear"]) == 2 and "but only two seeds" in page and "has only two seeds" in found


def test_what_is_said_of_all_pairs_of_the_long_runs_is_in_their_evaluations():
    page = " ".join(RESULTS_PAGE.split("\n## 9,000 steps")[1].split())
    found = found_in(README)
    assert FIVE == ["matched-cvq", "multi-mlp", "simvq", "vqct"]
    compared = [(*pair, column) for pair in itertools.combinations(FIVE, 2) for column in ("psnr", "lpips")]
    values = {(row, column): [result[column] for result in LONG[row]]
              for row in FIVE for column in ("psnr", "lpips", "bits_entropy")}
    p = [scipy.stats.ttest_ind(values[a, column], values[b, column], equal_var=False).pvalue
         for a, b, column in compared]
    corrected = dict(zip(compared, evaluate.holm(p)))
    differ = {pair for pair, value in corrected.items() if value < 0.01}
    others = ("matched-cvq", "simvq")
    assert differ == {pair for pair in compared if "multi-mlp" in pair and {*others} & {*pair}}
    assert f"Holm over {len(compared)} tests" in page
    mean = {key: np.mean(x) for key, x in values.items()}
    for text in (page, found):
        above = [f"{mean[row, 'psnr'] - mean['multi-mlp', 'psnr']:.2f}" for row in others]
        assert f"{' and '.join(above)} dB above" in text
        assert f"(corrected p ≤ {max(corrected[pair] for pair in differ):.2g}" in text
    lower = [f"{mean['multi-mlp', 'lpips'] - mean[row, 'lpips']:.3f}" for row in others]
    assert f"their LPIPS is {' and '.join(lower)} lower" in page
    bits = [f"{mean[row, 'bits_entropy']:,.0f}" for row in ("multi-mlp", *others)]
    assert f"and {bits[0]} bits per image where the other two have {bits[1]} and {bits[2]}" in page


def test_what_is_said_of_the_steps_is_in_their_evaluations():
    page = RESULTS_PAGE.split("**By steps.**")[1]
    results = {row: {result["step"]: result for result in seeds}
               for row, seeds in evaluations(REFERENCE / "cub64" / "steps", r"-2-\d+$").items()}
    for row, by_step in results.items():
        by_step[9000] = LONG[row][2]
        assert all(result["config"]["seed"] == 2 for result in by_step.values())
        cells = (f"{result['psnr']:.2f}, {result['bits_entropy']:,.0f}, "
                 f"{sum(result['codes_used'].values()):,}" for _, result in sorted(by_step.items()))
        assert f"| `{row}` | {' | '.join(cells)} |" in page
    value = lambda column, step: {row: of[step][column] for row, of in results.items()}
    early, late = value("psnr", 600), value("psnr", 9000)
    assert f"within {max(abs(x - early['vqct']) for x in early.values()):.2f} dB" in page
    assert f"{late['matched-cvq'] - late['vqct']:.2f} dB below `matched-cvq`" in " ".join(page.split())
    for step in (600, 6000, 9000):
        assert value("psnr", step)["vqct"] > value("psnr", step)["multi-mlp"]
    for step in (1500, 3000):
        assert min(value("psnr", step), key=value("psnr", step).get) == "vqct"
    for step in results["vqct"]:
        assert min(value("bits_entropy", step), key=value("bits_entropy", step).get) == "multi-mlp"
    for step in (600, 1500, 3000):
        assert max(value("bits_entropy", step), key=value("bits_entropy", step).get) == "simvq"
    assert max(value("psnr", 3000), key=value("psnr", 3000).get) != "simvq"


def test_the_figure_of_the_steps_is_drawn_by_the_pages_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cub64").symlink_to(REFERENCE / "cub64")
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", RESULTS_PAGE)
    exec(code, {})
    sizes = {Image.open(path / "steps.png").size for path in (tmp_path, REFERENCE)}
    assert len(sizes) == 1


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A folder where `python train.py` and the README's second stage were run, on few birds and for few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.DemoDataset, "SIZES", {"train": 64, "val": 8})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    train.main(["--steps", "2", "--eval-every", "2"])
    (words,) = {words for words, _ in LISTED if words[:3] == ("synthesize.py", "runs/demo-vqct", "train")}
    synthesize.main([*words[1:], "--steps", "2", "--batch-size", "8"])
    return tmp_path


def test_the_quick_commands_run(demo, capsys):
    quick = [words for words, remark in LISTED if remark.startswith("quick")]
    assert len(quick) >= 6
    for words in quick:
        if words == ("vqct.py",):
            vqct.show_equations()
        else:
            SCRIPTS[words[0].removesuffix(".py")].main(list(words[1:]))
        assert len(capsys.readouterr().out) > 100, words
    run = demo / "runs/demo-vqct"
    drawn = ["fig1_space", "fig3_toy", "fig5_usage", "fig6_similarity", "fig7_regions", "curves", "reconstructions"]
    drawn += ["synthesis/gpt-segmentation/samples", "synthesis/gpt-segmentation/completions"]
    for picture in (run / f"{name}.png" for name in drawn):
        assert picture.stat().st_size > 1000, picture


def test_a_run_reads_a_photograph(demo, capsys):
    Image.effect_noise((90, 70), 80).convert("RGB").save("photograph.jpg")
    (block,) = [text for text in fenced("python") if "photograph.jpg" in text]
    assert len(block.splitlines()) <= 6
    exec(block, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "  " in line and not line.startswith("step")]
    assert len(lines) == 16 and (demo / "reconstruction.png").stat().st_size > 1000


def test_what_is_named_is_there():
    names = set(re.findall(r"`(prior|vqct|train|evaluate|synthesize)\.([A-Za-z_]\w*)(?:\.(\w+))?`", README))
    assert len(names) > 15
    for module, name, attribute in names:
        if name not in ("py", "npz"):
            found = getattr(SCRIPTS[module], name)
            assert not attribute or hasattr(found, attribute), (module, name, attribute)


def test_vqct_has_its_table_of_contents_in_order():
    contents = vqct.__doc__.split("paper's order:")[1].split("`prior.py`")[0]
    names = [name for name in re.findall(r"\b[A-Za-z]\w+\b", contents) if hasattr(vqct, name)]
    source = open(vqct.__file__, encoding="utf-8").read().splitlines()
    lines = [next(i for i, line in enumerate(source) if re.match(rf"(class|def) {name}\b", line)) for name in names]
    assert len(names) > 20 and lines == sorted(lines)


# ======== Pieces

def test_the_pieces_of_the_readme_work():
    space = {}
    blocks = [text for text in fenced("python") if "photograph" not in text]
    assert len(blocks) == 3
    for block in blocks:
        exec(block, space)
    assert tuple(space["adjective_codes"].shape) == (2, 64) and space["indices"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("module, least", [(vqct, 6), (prior, 1), (evaluate, 2)], ids=lambda x: getattr(x, "__name__", x))
def test_the_docstrings_examples_work(module, least):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted >= least


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
PIECES = [name for name, (node, _) in OWN.items() if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def globals_of(code):
    """Names that a code object, and those inside it, look up in their module."""
    yield from (found.argval for found in dis.get_instructions(code) if found.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_of(constant)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_lifted_out_has_all_it_names(name):
    wanted, found, header = [name], {}, set()
    while wanted:
        piece = wanted.pop()
        found[piece] = OWN[piece]
        for named in {node.id for node in ast.walk(OWN[piece][0]) if isinstance(node, ast.Name)} - set(found):
            if named in OWN:
                wanted.append(named)
            elif named in IMPORTED:
                root, statement = IMPORTED[named]
                assert root in {"torch", "torchvision"} | sys.stdlib_module_names, f"{name} needs {root}"
                header.add(statement)
    source = "\n".join([*sorted(header), *dict.fromkeys(OWN[piece][1] for piece in OWN if piece in found)])
    module = types.ModuleType(f"lifted_{name}")
    exec(source, module.__dict__)
    missing = set(globals_of(compile(source, name, "exec"))) - set(vars(module)) - set(dir(builtins))
    assert not missing
    if ">>>" in OWN[name][1]:  # its own example, on it and what it is used with
        space = {**vars(vqct), "torch": torch, **vars(module)}
        examples = doctest.DocTestFinder().find(getattr(module, name), name, module=False, globs=space)
        assert doctest.DocTestRunner().run(examples[0]).failed == 0
