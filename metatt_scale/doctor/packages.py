"""Versions: this toolkit, Python, and the packages it needs or can use."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import metatt_scale
from metatt_scale.doctor.ask import Answer, no_facts
from metatt_scale.doctor.line import Line
from metatt_scale.versions import git_commit, package_version

_OURSELVES = "metatt-scale"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that commands use."""

    name: str
    """As pip has it."""
    module: str | None
    """What is imported to see whether it works; None where its version says enough."""
    used_for: str = ""
    """What cannot be done without it; empty where every command needs it."""
    extra: str = ""
    """The extra of this toolkit that installs it."""


PACKAGES = (
    Package(name="torch", module="torch"),
    Package(name="transformers", module="transformers"),
    Package(name="accelerate", module="accelerate"),
    Package(name="datasets", module="datasets"),
    Package(name="bitsandbytes", module="bitsandbytes"),
    Package(name="deepspeed", module="deepspeed"),
    Package(name="lm-eval", module="lm_eval"),
    Package(name="scikit-learn", module="sklearn"),
    Package(name="scipy", module="scipy"),
    Package(name="safetensors", module="safetensors"),
    # Without these four no command starts, this one included.
    Package(name="pydantic", module=None),
    Package(name="rich", module=None),
    Package(name="pyyaml", module=None),
    Package(name="filelock", module=None),
    Package(name="peft", module="peft", used_for="adapters of PEFT and their comparison", extra="peft"),
    Package(name="flash-attn", module="flash_attn", used_for="its attention kernels on GPUs", extra="flash"),
    Package(name="triton", module="triton", used_for="torch.compile on GPUs; comes with PyTorch for CUDA"),
    Package(name="gguf", module=None, used_for="weights in GGUF files", extra="quickstart"),
    Package(name="matplotlib", module=None, used_for="metatt-scale report", extra="report"),
    Package(name="tensorboard", module=None, used_for="this tracker", extra="trackers"),
    Package(name="wandb", module=None, used_for="this tracker", extra="trackers"),
    Package(name="mlflow", module=None, used_for="this tracker", extra="trackers"),
    Package(name="trackio", module=None, used_for="this tracker", extra="trackers"),
)


def question_of(package: Package) -> str:
    """Return what `answers` is asked to see whether a package can be imported."""
    return "torch" if package.name == "torch" else f"import {package.module}"


def is_tried(package: Package) -> bool:
    """Return whether importing a package is tried: where it is installed, or where every command needs it."""
    return package.module is not None and (not package.used_for or package_version(package.name) is not None)


def requirements() -> dict[str, str]:
    """Return which versions this toolkit allows, by package; "" where it allows all.

    Raises:
        PackageNotFoundError: this toolkit was not installed with pip, so nothing is on record.
    """
    allowed = {}
    for text in distribution(_OURSELVES).requires or ():
        name_and_range = text.partition(";")[0].strip()
        end = next((i for i, letter in enumerate(name_and_range) if letter in "<>=!~ ("), len(name_and_range))
        allowed.setdefault(name_and_range[:end].lower(), name_and_range[end:].strip())
    return allowed


def is_allowed(version: str, allowed: str) -> bool | None:
    """Return whether a version lies in a range; None where that cannot be told."""
    try:
        from packaging.specifiers import SpecifierSet
        from packaging.version import Version

        # 2.11.0a0+git is NVIDIA's name for a build of 2.11 in its containers.
        return SpecifierSet(allowed).contains(Version(version).base_version)
    except (ImportError, ValueError):
        return None


def check_package(package: Package, version: str | None, allowed: str | None, answer: Answer | None) -> Line:
    """Return the line of one package.

    Args:
        package: which one.
        version: the installed one; None where there is none.
        allowed: range of versions that this toolkit asks for; None where that is not known.
        answer: to importing it; None where that was not tried.
    """
    wanted = f'"{package.name}{allowed or ""}"'
    install = f'pip install "{_OURSELVES}[{package.extra}]"' if package.extra else f"pip install {wanted}"
    if version is None:
        if package.used_for:
            how = f" ({install})" if package.extra else ""
            return Line(name=package.name, found=f"not installed; only for {package.used_for}{how}", verdict="note")
        return Line(name=package.name, found="not installed", verdict="problem", remedy=install)
    found = version + (f" (asked for: {allowed})" if allowed else "")
    if answer is not None and answer.error:
        # That torch is broken is told in its own line; nobody should reinstall everything else for it.
        told = answer if not answer.tried else Answer(error=f"cannot be imported: {answer.error}")
        # Reinstalling torch's dependencies brings CUDA's libraries; those of others might bring another torch.
        alone = "" if package.name == "torch" else "--no-deps "
        line = no_facts(package.name, told, f"pip install --force-reinstall {alone}{wanted}")
        return replace(line, found=f"{found}; {line.found}")
    if allowed and is_allowed(version, allowed) is False:
        verdict = "warning" if package.used_for else "problem"
        return Line(name=package.name, found=found, verdict=verdict, remedy=f"pip install {wanted}")
    return Line(name=package.name, found=found)


def check_packages(answers: Mapping[str, Answer]) -> Iterator[Line]:
    """Yield one line for each package."""
    try:
        allowed = requirements()
    except PackageNotFoundError:
        allowed = {}
        yield Line(
            name="requirements",
            found="unknown: this copy of metatt_scale was not installed with pip, so versions are not judged",
            verdict="note",
        )
    for package in PACKAGES:
        answer = answers.get(question_of(package))
        version = package_version(package.name)
        if package.name == "torch" and answer is not None and answer.facts:
            version = answer.facts["version"]  # with its build, which the package's own record leaves out
        if version is None and answer is not None and not answer.error:
            version = "of unknown version (imported, but not on pip's record)"
        yield check_package(package, version, allowed.get(package.name), answer if version else None)


def check_toolkit() -> Line:
    """Return the line of this toolkit's own version."""
    folder = Path(metatt_scale.__file__).resolve().parent
    commit = git_commit()
    recorded = package_version(_OURSELVES)
    found = f"{metatt_scale.__version__}, {f'commit {commit}' if commit else 'no git checkout'}, in {folder}"
    if recorded not in (None, metatt_scale.__version__):
        remedy = "run `pip install -e .` in the checkout, or unset PYTHONPATH"
        return Line(name="metatt_scale", found=f"{found}; pip has {recorded}", verdict="warning", remedy=remedy)
    return Line(name="metatt_scale", found=found)


def check_python() -> Line:
    """Return the line of the interpreter."""
    name, build = platform.python_implementation(), " ".join(platform.python_build())
    return Line(name="Python", found=f"{name} {platform.python_version()} ({build}), {sys.executable or 'no path'}")


def check_system() -> Line:
    """Return the line of the operating system."""
    known = [platform.platform()]
    try:
        known.append(platform.freedesktop_os_release().get("PRETTY_NAME", ""))
    except OSError:
        pass
    verdict = "ok" if sys.platform == "linux" else "warning"
    remedy = "" if verdict == "ok" else "use Linux; nothing else is tested"
    return Line(name="system", found=", ".join(filter(None, known)), verdict=verdict, remedy=remedy)
