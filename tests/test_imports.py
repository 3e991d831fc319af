"""The direction of imports, as one table; and what is nowhere called. Arrows point down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

OURS = ("deployments", "workers", "parallel", "kernels")
MAY_IMPORT = {
    "deployments": {
        "deployments",
        "workers.protocol",
        "workers.config",
        "workers.spec",
        "workers.bundled",
        "workers.architectures",
        "workers.model_split",
        "parallel.layout",
        "parallel.padding",
        "parallel.padding_cost",
        "parallel.plan",
    },
    "deployments/fleet.py": {"workers.worker"},
    "workers": {"workers", "parallel", "kernels"},
    "parallel": {"parallel", "kernels"},
    "kernels": {"kernels"},
}
MUST_NOT_IMPORT = {
    "deployments": {"torch", "triton"},
    "deployments/fleet.py": {"ray"},
    "deployments/engine.py": {"ray"},
    "deployments/llm.py": {"ray"},
    "deployments/scheduler.py": {"ray", "asyncio"},
    "deployments/pages.py": {"ray", "asyncio"},
    "deployments/placement.py": {"ray"},
    "workers": {"ray", "fastapi", "pydantic", "transformers"},
    "workers/protocol.py": {"torch"},
    "workers/config.py": {"torch"},
    "workers/spec.py": {"torch"},
    "parallel": {"ray"},
    "workers/architectures.py": {"torch"},
    "workers/config_checks.py": {"torch"},
    "workers/config_json.py": {"torch"},
    "workers/config_rope.py": {"torch"},
    "workers/model_config.py": {"torch"},
    "workers/model_folder.py": {"torch"},
    "workers/model_split.py": {"torch"},
    "parallel/layout.py": {"torch"},
    "parallel/padding.py": {"torch"},
    "parallel/padding_cost.py": {"torch"},
    "parallel/plan.py": {"torch"},
    "kernels": {"ray", "torch.distributed"},
}
EVERYWHERE_BANNED = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen"}
ENVIRONMENT = {"os.environ", "os.getenv", "os.environb"}
READS_THE_ENVIRONMENT = "workers/config.py"

MODULES = sorted(path.relative_to(ROOT) for name in OURS for path in (ROOT / name).rglob("*.py"))


def tree_of(module):
    return ast.parse((ROOT / module).read_text())


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name, roots):
    return any(name == root or name.startswith(root + ".") for root in roots)


def rules(table, module):
    return table.get(module.parts[0], set()) | table.get(str(module), set())


def refused_imports(module, tree):
    allowed, banned = rules(MAY_IMPORT, module), rules(MUST_NOT_IMPORT, module)
    for name in imports_of(tree):
        refused = within(name, OURS) or within(name, banned)
        if within(name, EVERYWHERE_BANNED) or (refused and not within(name, allowed)):
            yield name


def dotted(node):
    """`os.environ` for the expression that says so; empty for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def refused_calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            yield dotted(node.func)


def reads_of_environment(tree):
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted((names | set(imports_of(tree))) & ENVIRONMENT)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module):
    assert list(refused_imports(module, tree_of(module))) == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_nothing_runs_what_it_is_sent(module):
    assert list(refused_calls(tree_of(module))) == []


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_environment_is_read_in_one_file(module):
    if str(module) != READS_THE_ENVIRONMENT:
        assert reads_of_environment(tree_of(module)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("deployments/x.py", "import torch"),
        ("deployments/x.py", "from torch import nn"),
        ("deployments/x.py", "from workers.worker import Worker"),
        ("deployments/x.py", "from workers import worker"),
        ("workers/x.py", "import ray"),
        ("workers/x.py", "from deployments.fleet import Fleet"),
        ("parallel/x.py", "from workers.config import EngineConfig"),
        ("kernels/x.py", "import torch.distributed as dist"),
        ("kernels/x.py", "from parallel.groups import Group"),
        ("workers/protocol.py", "import torch"),
        ("kernels/x.py", "import pickle"),
    ],
)
def test_the_table_catches(module, line):
    assert list(refused_imports(Path(module), ast.parse(line)))


@pytest.mark.parametrize(
    "line", ["eval(x)", "torch.load(p)", "y = [yaml.load(p)]", "os.system('ls')"]
)
def test_calls_that_run_what_they_are_sent_are_seen(line):
    assert list(refused_calls(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["os.environ['A']", "os.getenv('A')", "x = os.environ.get('A')", "from os import getenv"],
)
def test_reads_of_the_environment_are_seen(line):
    assert reads_of_environment(ast.parse(line))
