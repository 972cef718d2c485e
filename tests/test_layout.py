"""The house's rules that no tool knows: which way imports point, who owns our package names, what the packages hold."""

import ast
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available

ROOT = Path(__file__).parent.parent
PACKAGES = ("adapters", "kernels", "server")

ALLOWED = {
    "adapters": set(),
    "kernels": set(),
    "server": {"adapters", "kernels"},
}
OUTSIDE = {"adapters": {"torch", "safetensors"}, "kernels": {"numpy", "torch", "triton"}}

# Inside server, a part may import the parts listed for it; the loose modules are parts of their own.
INSIDE = {
    "errors": set(),
    "version": set(),
    "other_flags": set(),
    "container": set(),
    "heap": set(),
    "kernel_choice": {"config", "model"},
    "memory_plan": {"config", "config_values", "container", "model"},
    "start_modules": {"config"},
    "config_values": set(),
    "config": {"config_values"},
    "config_sources": {"config", "other_flags"},
    "text": {"config", "errors"},
    "model": {"config", "errors"},
    "engine": {"model", "config", "errors"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    forbidden = set(PACKAGES) - ALLOWED[package] - {package} | {"tests", "loadtests", "demo"}
    for path in sources(package):
        wrong = sorted(name for name in imported(path) if name.split(".")[0] in forbidden)
        assert not wrong, (
            f"{path.relative_to(ROOT)} imports {wrong}: imports point server -> adapters, kernels"
        )


@pytest.mark.parametrize("package", OUTSIDE)
def test_lower_packages_import_little(package):
    import sys

    for path in sources(package):
        heads = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {package}
        assert heads <= OUTSIDE[package], (
            f"{path.relative_to(ROOT)} imports {sorted(heads - OUTSIDE[package])}"
        )


@pytest.mark.parametrize("part", INSIDE)
def test_imports_inside_the_server(part):
    for path in sources("server"):
        if path.relative_to(ROOT / "server").parts[0].removesuffix(".py") != part:
            continue
        others = {name.split(".")[1] for name in imported(path) if name.startswith("server.")} - {part}
        assert others <= INSIDE[part], (
            f"{path.relative_to(ROOT)} imports server.{sorted(others - INSIDE[part])}"
        )


def test_the_load_tests_and_the_show_speak_http_only():
    for path in [*sources("loadtests"), ROOT / "demo" / "show.py"]:
        wrong = [name for name in imported(path) if name.split(".")[0] in PACKAGES]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_roots_hold_a_docstring_and_nothing_else(package):
    """transformers and bitsandbytes look for a module called `kernels`, peft for `adapters`: give them nothing."""
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


@pytest.mark.parametrize("package", PACKAGES)
def test_our_names_are_ours(package):
    """Hugging Face `kernels` and AdapterHub `adapters` install the same names and would shadow, or be shadowed."""
    owners = set(packages_distributions().get(package, []))
    assert owners <= {"loraplex"}, (
        f"`{package}` also belongs to {owners - {'loraplex'}}: uninstall it, or use a fresh venv"
    )


def test_transformers_does_not_take_our_kernels_for_its_own():
    assert not is_kernels_available()


def test_the_distribution_lists_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == found
    (native,) = project["tool"]["setuptools"]["ext-modules"]
    # an unlisted header is not looked at for a rebuild
    for kind, suffix in (("sources", "c"), ("depends", "h")):
        there = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels" / "cpu").glob(f"*.{suffix}")}
        assert set(native[kind]) == there
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def test_no_drawers():
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    others = {".venv", "build"}  # what is installed here is not ours
    assert not [p for p in ROOT.rglob("*.py") if p.name in drawers and not others & set(p.parts)]
