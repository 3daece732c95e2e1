"""Plant bugs in the scientific modules, one at a time, and count those that the fast tests find.

    make mutants                                             # every module of mutants.yaml; continues where it stopped
    python benchmarks/mutants.py --modules finetune/loss.py --per-module 40
    python benchmarks/mutants.py --survivors                 # only those that survived, after tests were added

Results are kept in ``results/mutants.json`` after every mutant, so that the work can be done in slices (``--minutes``).
A module or a mutant is measured again once the module has changed. Nothing on disk is changed: the modified module is
compiled in a process of its own, which runs the tests of that module only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import gc
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml
from mutation import mutations
from result_file import words_of

ROOT = Path(__file__).resolve().parents[1]
PLAN = Path(__file__).with_suffix(".yaml")
RESULTS = Path(__file__).parent / "results"
SEED = 0
PER_MODULE = 24
PRELOADED = ("torch", "torch.nn.functional", "numpy", "scipy.ndimage", "nibabel", "zarr", "pytorch_lightning", "peft",
             "monai.transforms", "pydicom", "hypothesis", "omegaconf", "segment_anything", "pytest")  # fmt: skip
"""Libraries that every process of a mutant shares, which are most of a test's start."""
FOUND = ("killed", "timeout")


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Loader of one module from a changed syntax tree."""

    tree = None

    def get_code(self, fullname):
        """Compile the changed tree."""
        return compile(self.tree, self.path, "exec")


class MutantFinder(importlib.abc.MetaPathFinder):
    """Finder that puts a changed module in the place of the one on disk."""

    def __init__(self, name, path, tree):
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname, path=None, target=None):
        """Return the changed module for its name."""
        if fullname != self.name:
            return None
        loader = MutantLoader(fullname, str(self.path))
        loader.tree = self.tree
        return importlib.util.spec_from_file_location(fullname, self.path, loader=loader)


def run_tests(module, tests, tree, *, cpu_seconds=None):
    """Run tests in a process of their own with a changed module; return outcome and CPU seconds."""
    folder = tempfile.mkdtemp(prefix="mutant-")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        os.setsid()
        _child(module, tests, tree, folder, cpu_seconds)
    try:
        status = _wait(child, None if cpu_seconds is None else 8 * cpu_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that a test left behind
        shutil.rmtree(folder, ignore_errors=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout", spent
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
    if code not in (0, 1, 2):  # passed, failed, not imported
        sys.exit(f"pytest did not run for {module} (exit code {code}).")
    return ("killed" if code else "survived"), spent


def _wait(child, limit):
    end = None if limit is None else time.monotonic() + limit
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _child(module, tests, tree, folder, cpu_seconds):
    import pytest

    code = 70
    try:
        if cpu_seconds is not None:
            own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(own + cpu_seconds) + 1, resource.RLIM_INFINITY))
            # A wrong size must not take the memory of the machine.
            resource.setrlimit(resource.RLIMIT_AS, (24 << 30, resource.RLIM_INFINITY))
        if tree is not None:
            name = "samgraft." + module.removesuffix(".py").replace("/", ".")
            sys.meta_path.insert(0, MutantFinder(name, ROOT / module, tree))
        quiet = os.open(os.devnull, os.O_RDWR)
        if tree is not None:
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
        os.chdir(ROOT)
        sys.dont_write_bytecode = False
        arguments = [
            "-x",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "no:unraisableexception",
            "--tb=short",
        ]
        arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins of preloaded libraries
        code = int(pytest.main([*arguments, f"--basetemp={folder}/t", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def digest(path):
    """Return the short hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def identities(source: str) -> Iterator[str]:
    """Yield a name of every mutation that stays while its line stays."""
    seen: Counter[str] = Counter()
    for mutation in mutations(source):
        name = f"{mutation.operator}: {mutation.before} -> {mutation.after} @ {mutation.code}"
        seen[name] += 1
        yield f"{name} #{seen[name]}"


def sample(module: str, number: int) -> list[int]:
    """Return the numbers of the mutations to plant in a module, drawn with a fixed seed."""
    total = sum(1 for _ in mutations((ROOT / module).read_text()))
    # The first of a longer list, so that a larger sample contains a smaller one.
    order = random.Random(f"{SEED} {module}").sample(range(total), total)
    return sorted(order[:number])


def measure_module(module, tests, state, options, *, out_of_time):
    """Plant the sampled mutations of one module and keep each result."""
    source = (ROOT / module).read_text()
    kept = state.setdefault(module, {"source": "", "mutants": {}})
    chosen = set(sample(module, options.per_module))
    keys = list(identities(source))
    known = kept["mutants"] if kept["source"] == digest(ROOT / module) else {}
    done = {key: known[key] for key in keys if key in known}
    todo = {
        number
        for number in chosen
        if keys[number] not in done or (options.survivors and done[keys[number]]["outcome"] == "survived")
    }
    if not todo:
        return
    outcome, base = run_tests(module, tests, None)
    if outcome != "survived":
        print(f"left out: the tests of {module} fail without a mutant.")
        return
    kept |= {"source": digest(ROOT / module), "mutants": done, "possible": len(keys), "tests": tests, "seconds": base}
    for number, mutation in enumerate(mutations(source)):
        if number not in todo or out_of_time():
            continue
        outcome, spent = run_tests(module, tests, mutation.tree, cpu_seconds=3 * base + 10)
        kept["mutants"][keys[number]] = {
            "line": mutation.line,
            "operator": mutation.operator,
            "code": mutation.code,
            "before": mutation.before[:200],
            "after": mutation.after[:200],
            "outcome": outcome,
        }
        write_state(state)
        print(f"{outcome:9} {spent:5.1f} s  {module}:{mutation.line}  {mutation.operator}: {mutation.after[:90]}")
        sys.stdout.flush()


def measure_planted(planted, state, options, *, out_of_time):
    """Plant the bugs that are written down in the plan, each with the tests that must find it."""
    kept = state.setdefault("planted", {})
    for bug in planted:
        before, found = bug["before"], kept.get(bug["name"], {})
        source = (ROOT / bug["module"]).read_text()
        if source.count(before) != 1:
            sys.exit(f"{bug['name']}: {before!r} is {source.count(before)} times in {bug['module']}, expected once.")
        facts = {"module": bug["module"], "source": digest(ROOT / bug["module"]), "after": bug["after"]}
        is_known = all(found.get(key) == value for key, value in facts.items())
        if out_of_time() or (is_known and (found["outcome"] in FOUND or not options.survivors)):
            continue
        tree = ast.parse(source.replace(before, bug["after"]))
        outcome, spent = run_tests(bug["module"], bug["tests"], tree, cpu_seconds=300)
        kept[bug["name"]] = {**facts, "tests": bug["tests"], "outcome": outcome}
        write_state(state)
        print(f"{outcome:9} {spent:5.1f} s  {bug['name']}")
        sys.stdout.flush()


def write_state(state) -> None:
    """Write the results atomically."""
    part = RESULTS / f".mutants-{os.getpid()}.json"
    part.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    part.replace(RESULTS / "mutants.json")


def reason_of(module: str, mutant: dict, equivalent: list[dict]) -> str | None:
    """Return why no test can or should find a mutant, or None."""
    for entry in equivalent:
        is_place = entry["module"] == module and entry["code"] == mutant["code"]
        if is_place and entry.get("after", mutant["after"]) == mutant["after"]:
            return str(entry["reason"])
    return None


def table(state, plan) -> str:
    """Return the Markdown of all results."""
    equivalent = plan.get("equivalent") or []
    rows, survivors, reasons, sums = [], [], [], [0, 0, 0]
    for module in plan["modules"]:
        mutants = state.get(module, {}).get("mutants", {})
        if not mutants:
            continue
        left = [m for m in mutants.values() if m["outcome"] not in FOUND]
        excused = [m for m in left if reason_of(module, m, equivalent)]
        found, counted = len(mutants) - len(left), len(mutants) - len(excused)
        sums = [a + b for a, b in zip(sums, (len(mutants), len(excused), found), strict=True)]
        share = f"{found / counted:.0%}" if counted else "n/a"
        rows.append(
            f"| `{module}` | {state[module]['possible']} | {len(mutants)} | {len(excused)} | {found} | {share} |"
        )
        for mutant in left:
            change = f"`{module}:{mutant['line']}` {mutant['operator']}: `{mutant['before']}` to `{mutant['after']}`"
            why = reason_of(module, mutant, equivalent)
            (survivors if why is None else reasons).append(f"- {change}" + (f": {why}" if why else ""))
    share = sums[2] / max(1, sums[0] - sums[1])
    head = f"Found: **{share:.1%}** of {sums[0] - sums[1]} mutants that change a result ({sums[0]} planted)."
    lines = ["| module | possible | planted | equivalent | found | share |", "|---|---|---|---|---|---|", *rows]
    parts = [head, "\n".join(lines), "## Not found", "\n".join(survivors) or "None."]
    parts += ["## Equivalent or of no consequence", "\n".join(reasons) or "None."]
    planted = state.get("planted", {})
    if planted:
        lines = ["| bug | module | found |", "|---|---|---|"]
        lines += [
            f"| {name} | `{bug['module']}` | {'yes' if bug['outcome'] in FOUND else 'no'} |"
            for name, bug in planted.items()
        ]
        found = sum(bug["outcome"] in FOUND for bug in planted.values())
        parts += ["## Bugs written down by hand", f"Found: {found} of {len(planted)}.", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_result(state, plan, *, per_module) -> Path:
    """Write the result file of today and keep the section of it that people wrote."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = RESULTS / f"mutants-{today}.md"
    text = f"# Planted bugs that the fast tests find, {today}\n\nUp to {per_module} mutants per module, seed {SEED}; "
    text += "each ran only the tests that `benchmarks/mutants.yaml` lists for its module.\n\n"
    path.write_text(text + table(state, plan) + words_of(path))
    return path


def main() -> int:
    """Measure the modules that are left and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="*", help="paths as in mutants.yaml, or planted (default: all)")
    parser.add_argument("--per-module", type=int, default=PER_MODULE)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this time")
    parser.add_argument("--survivors", action="store_true", help="plant surviving mutants again")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    plan = yaml.safe_load(PLAN.read_text())
    file = RESULTS / "mutants.json"
    state = json.loads(file.read_text()) if file.is_file() else {}
    end = time.monotonic() + 60 * options.minutes
    if not options.table:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for name in PRELOADED:
            importlib.import_module(name)
        # Without it, each process would go through all objects of the libraries several times.
        gc.freeze()
        if not options.modules or "planted" in options.modules:
            measure_planted(plan["planted"], state, options, out_of_time=lambda: time.monotonic() > end)
        for module in [m for m in options.modules or plan["modules"] if m != "planted"]:
            if time.monotonic() < end:
                measure_module(
                    module, plan["modules"][module], state, options, out_of_time=lambda: time.monotonic() > end
                )
    write_result(state, plan, per_module=options.per_module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
