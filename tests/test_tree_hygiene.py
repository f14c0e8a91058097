"""What must not be in the sources: one machine's paths, registries, secrets, unsafe reading, and
files too long to hold in the head without a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from source_tree import ROOT, product_files, source_files, text_files

MAX_LINES = 300
OLDEST_PYTHON = (3, 11)  # requires-python of pyproject.toml

# A path below one person's home or one machine's mounts; `/workspace` of the container is none.
MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(?:work|home|root|Users|mnt)(?=[/\s\"'`),:;\]]|$)")
SHARED_MEMORY = re.compile(r"/dev/shm\b")
PUBLISHED_DATA_PATH = Path("config/data/hlm.yaml")  # /dev/shm/sampled is its published value

REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|npmjs\.|anaconda\.org|nvcr\.io|ghcr\.io"
    r"|quay\.io|index-url[= ]+\S*//",
)
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?i:\b(?:api_?key|passw(?:or)?d|secret)[\"']?\s*[:=]\s*[\"'][^\"'\s]{8,}[\"'])",
)

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads"}
UNSAFE_CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# (file, what) -> why it is safe there
ALLOWED_UNSAFE = {
    ("training/safe_metadata.py", "pickle"): (
        "the .metadata of torch.distributed.checkpoint is a pickle; it is read through an "
        "Unpickler that admits only the classes it needs"
    ),
}


def lines_matching(pattern: re.Pattern[str], texts: dict[Path, str]) -> list[str]:
    """`path:line: text` of every line that the pattern finds; this file spells the patterns."""
    return [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in texts.items()
        if path.name != Path(__file__).name
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def unsafe_reading(source: str) -> list[str]:
    """What a source text uses that can run code found in data, as `name` of each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS and not loads_tensors_alone(node):
                found.append(name)
            found += ["allow_pickle" for keyword in node.keywords if is_pickle_allowed(keyword)]
    return found


def loads_tensors_alone(call: ast.Call) -> bool:
    return any(ast.unparse(keyword) == "weights_only=True" for keyword in call.keywords)


def is_pickle_allowed(keyword: ast.keyword) -> bool:
    return keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"


def is_too_long_without_reason(source: str) -> bool:
    """Whether a file has over 300 lines and its docstring does not say why ("300 lines: ...")."""
    if len(source.splitlines()) <= MAX_LINES:
        return False
    return f"{MAX_LINES} lines" not in (ast.get_docstring(ast.parse(source)) or "")


def test_no_path_of_one_machine() -> None:
    found = lines_matching(MACHINE_PATH, text_files())
    assert not found, "\n".join(found)


def test_shared_memory_is_the_default_of_the_published_data_alone() -> None:
    # documents may tell of it, and tests may expect it
    code = {
        path: text
        for path, text in text_files().items()
        if path.suffix != ".md" and path.parts[0] != "tests" and path != PUBLISHED_DATA_PATH
    }
    found = lines_matching(SHARED_MEMORY, code)
    assert not found, "\n".join(found)


def test_no_registry_is_named() -> None:
    found = lines_matching(REGISTRY, text_files())
    assert not found, "\n".join(found)


def test_no_secret_is_written_down() -> None:
    found = lines_matching(SECRET, text_files())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path", [path for path in source_files() if path.suffix in (".yaml", ".yml")], ids=str
)
def test_every_yaml_file_parses(path: Path) -> None:
    yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [path for path in source_files() if path.suffix == ".py"], ids=str)
def test_every_python_file_parses_on_the_oldest_python(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    ast.parse(text, str(path), feature_version=OLDEST_PYTHON)


def test_a_long_file_says_why() -> None:
    texts = text_files()
    too_long = [
        f"{path}: {len(text.splitlines())} lines"
        for path, text in texts.items()
        if path.suffix == ".py" and is_too_long_without_reason(text)
    ]
    assert not too_long, (
        f"split these, or say in the module's docstring why they exceed {MAX_LINES} lines: "
        f"{too_long}"
    )


def test_product_code_runs_nothing_that_it_reads() -> None:
    found = [
        f"{path}: {what}"
        for path in product_files()
        for what in unsafe_reading((ROOT / path).read_text(encoding="utf-8"))
        if (path.as_posix(), what) not in ALLOWED_UNSAFE
    ]
    assert not found, "\n".join(found)


def test_no_exception_is_left_over() -> None:
    stale = [
        f"{path}: {what}"
        for path, what in ALLOWED_UNSAFE
        if (ROOT / path).exists()
        and what not in unsafe_reading((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not stale, f"take these out of ALLOWED_UNSAFE: {stale}"


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATH, "path = '/home/someone/data'"),
        (MACHINE_PATH, "cd /work/main"),
        (MACHINE_PATH, "cp x /root"),
        (REGISTRY, "pip install --index-url https://mirror.example/simple torch"),
        (REGISTRY, "FROM nvcr.io/nvidia/pytorch"),
        (SECRET, "api_key = 'abcdefgh12345678'"),
        (SECRET, "HF_TOKEN=hf_" + "a" * 34),
    ],
)
def test_a_made_up_offence_is_found(pattern: re.Pattern[str], line: str) -> None:
    assert lines_matching(pattern, {Path("made_up.py"): line})


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (MACHINE_PATH, "WORKDIR /workspace"),
        (MACHINE_PATH, "see https://example.org/home/page and data/work/x"),
        (SECRET, 'eoa = "<|box_end|>"; token = "<|object_ref_start|>"'),
    ],
)
def test_what_only_looks_like_an_offence_is_left_alone(pattern: re.Pattern[str], line: str) -> None:
    assert not lines_matching(pattern, {Path("made_up.py"): line})


def test_unsafe_reading_is_recognised() -> None:
    source = (
        "import pickle\nfrom dill import loads\nmodel.eval()\neval('1')\ntorch.load('x')\n"
        "np.load('x', allow_pickle=True)\nnp.load('x', allow_pickle=False)\nyaml.safe_load('x')\n"
        "torch.load('x', weights_only=True)\n"
    )
    expected = ["pickle", "dill", "eval", "torch.load", "allow_pickle"]
    assert sorted(unsafe_reading(source)) == sorted(expected)


def test_a_long_file_needs_its_reason_in_the_docstring() -> None:
    body = "x = 1\n" * MAX_LINES
    assert not is_too_long_without_reason(body)
    assert is_too_long_without_reason(f'"""One kernel."""\n{body}')
    assert not is_too_long_without_reason(f'"""Over 300 lines: one kernel."""\n{body}')
