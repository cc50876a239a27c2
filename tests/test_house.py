"""The house: how large it is, what crosses its files, and what belongs to the repository and what does not.

Which way imports run, and types, are checked by lint-imports and pyright: see the Makefile.
"""

import ast
import json
import re
import subprocess

import pytest

from sts.errors import ROOT

FILES = sorted((ROOT / "sts").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Text that people read, and code: everything under git but data, pictures and pinned versions.
TEXTS = [ROOT / name for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                                                check=True).stdout.split("\n")
         if name.endswith((".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", "Makefile", "run"))]
#: So many words in a row may say something of a result.
WORDS = re.compile(r"\w+(?: [^\s]+){5,}")
#: Texts of so many words in the code, which say what a page holds, or why there is no result.
NOTICES = ("training taught the model too little", "before training the model is right no more", "too few domains",
           "one training set given", "left out: no solution", "<p><strong>The texts are not here.", "fires on",
           "Where the numbers come from", "Tokens by strength", '<div class="sts-run">', "<input ", "1 - cosine,",
           "Maria bakes")
#: A name that a function composing English would have.
SAYS = re.compile(r"(?:^|_)(?:sentences?|prose|paragraphs?|in_words|spelled|discussion|said_of|conclusion)(?:_|$)")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_house_is_small():
    lines = {str(path.relative_to(ROOT)): lines_of(path) for path in FILES}
    assert len(lines) <= 75
    assert {name: count for name, count in lines.items() if count > 300} == {}
    assert sum(lines.values()) <= 10_000  # with everything that is planned; 7,500 were the redesign's


def private(name):
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_private_name_crosses_a_file(path):
    tree, modules, found = ast.parse(path.read_text(encoding="utf-8")), set(), []
    names = {module_of(other) for other in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sts":
            found += [one.name for one in node.names if private(one.name)]
            modules |= {one.asname or one.name for one in node.names if f"{node.module}.{one.name}" in names}
        elif isinstance(node, ast.Import):
            modules |= {one.asname for one in node.names if one.asname and one.name in names}
    found += [f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and private(node.attr) and isinstance(node.value, ast.Name) and node.value.id in modules]
    assert found == []


def literals(node):
    """The string literals below a node, without docstrings and what errors and notes say."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")).endswith(
            ("Error", "MissingData", "note")):
        return []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return []
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "1" for part in node.values)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [text for child in ast.iter_child_nodes(node) for text in literals(child)]


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("stages", "measure", "book")],
                         ids=module_of)
def test_no_code_says_a_result_in_english(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and SAYS.search(node.name)] == []
    assert [text for text in literals(tree) if WORDS.search(text) and not text.startswith(NOTICES)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_a_parameters_cell_and_no_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is code[0] and "run: str" in "".join(tagged[0]["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_the_readme_is_short_and_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    named = set(re.findall(r"`((?:sts|runs|notebooks|book|tests|data|benchmarks)/[\w./-]*)`", text)) | set(
        re.findall(r"\]\((?!\w+:)([^)#]+)", text))
    made = {"book/_build/"}
    assert {name for name in named - made if not (ROOT / name).exists()} == set() and len(named) >= 10


def test_no_place_of_one_machine_is_named():
    place = re.compile(r"(?<![\w./])/(?:home|root|work|Users|mnt|scratch)/\w|\b[\w-]+\.(?:internal|lan)\b"
                       r"|\b(?:10|192\.168)(?:\.\d{1,3}){2,3}\b")
    found = {str(path.relative_to(ROOT)): sorted(set(place.findall(text))) for path in TEXTS if path.exists()
             and path.name != "test_house.py" and place.search(text := path.read_text(encoding="utf-8"))}
    assert found == {}
