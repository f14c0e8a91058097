"""The image: versions are those of requirements-gpu.txt, and any user can work in it.

No image is built here. The rules of hadolint are not repeated: it finds nothing to say.
"""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from source_tree import ROOT

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
PIN = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?==([\w.]+)")


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line)]
    return {canonicalize_name(each.name): each for each in found}


PINNED = requirements("requirements-gpu.txt")
BUILDS = requirements("requirements-gpu-builds.txt")


def version(name: str) -> str:
    (pin,) = PINNED[name].specifier
    return pin.version


def instructions() -> dict[str, list[str]]:
    """The arguments of each kind of instruction, in order; lines that go on are joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for kind, words in re.findall(r"^([A-Z]+) +(.+)$", text, re.MULTILINE):
        found.setdefault(kind, []).append(re.sub(r" +", " ", words))
    return found


@pytest.mark.parametrize("name", ["requirements-gpu.txt", "requirements-gpu-builds.txt"])
def test_everything_is_pinned(name: str) -> None:
    for each in requirements(name).values():
        (pin,) = each.specifier
        assert pin.operator == "==" and "*" not in pin.version, each


def test_the_pins_lie_in_the_ranges_of_requirements_txt() -> None:
    ranges = requirements("requirements.txt")
    assert set(ranges) <= set(PINNED)
    for name, each in ranges.items():
        assert each.specifier.contains(version(name)), each
        assert each.extras <= PINNED[name].extras


def test_the_image_has_the_versions_of_the_requirements() -> None:
    installs = [words for words in instructions()["RUN"] if "pip install" in words]
    assert "-r /opt/requirements/requirements-gpu.txt" in installs[0]
    for words in installs:
        for install in re.findall(r"pip install ([^;&]+)", words):
            for word in install.replace(" -r ", " -r").split():
                assert word.startswith("-") or PIN.fullmatch(word), f"{word} is not pinned"
    copied = instructions()["COPY"][0].split()[:-1]
    assert {f"/opt/requirements/{name}" for name in copied} == set(
        re.findall(r"-r ([^\s;]+)", " ".join(installs))
    )


def test_what_builds_need_is_the_same_in_both_places() -> None:
    told = (ROOT / "requirements-gpu-builds.txt").read_text(encoding="utf-8")
    comments = " ".join(re.findall(r"^# .*", told, re.MULTILINE))
    assert set(PIN.findall(comments)) == set(PIN.findall(" ".join(instructions()["RUN"])))
    assert not set(BUILDS) & set(PINNED)


def test_python_and_cuda_are_those_that_the_pins_are_for() -> None:
    (base,) = [words for words in instructions()["ARG"] if words.startswith("BASE=")]
    python = re.fullmatch(r"BASE=python:(\d+\.\d+)\.\d+-slim-\w+", base)
    header = (ROOT / "requirements-gpu.txt").read_text(encoding="utf-8")
    assert python is not None and f"Python {python[1]}," in header
    cuda = re.search(r"nvidia/cuda:([\d.]+)-devel", DOCKERFILE)
    assert cuda is not None and cuda[1] == version("cuda-toolkit")


def test_any_user_can_work_in_it() -> None:
    found = instructions()
    assert found["WORKDIR"] == ["/workspace"] and "USER" not in found
    settings = dict(pair.split("=", 1) for pair in found["ENV"][0].split())
    caches = settings["HOME"]
    assert settings["NUMBA_CACHE_DIR"].startswith(f"{caches}/")
    assert settings["USER"]  # torch asks for the user's name, which an unknown id has not
    assert any(f"chmod 1777 /workspace {caches}" in words for words in found["RUN"])


def test_the_folder_is_mounted_not_copied() -> None:
    copied = [word for words in instructions()["COPY"] for word in words.split()[:-1]]
    assert all(word.startswith("requirements") for word in copied)
    ignored = (ROOT / "docker/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1:] == ["*", "!requirements*.txt"]
