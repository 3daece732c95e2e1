"""The bugs that ``make mutants`` plants are different from the code, in place, and undone afterwards."""

import ast

import mutants
import pytest
import yaml
from mutants import PLAN, ROOT, reason_of, run_tests, sample, table, write_result
from mutation import mutations

SOURCE = '''"""Module."""
import logging
SIZES: tuple[int, ...] = (3, 4)

def scale(a: int | None, b: float = 2.0) -> float:
    """Return a number."""
    logging.info("a %s", a)
    if a < 0 or not b:
        raise ValueError(f"{a + 1} is bad")
    total = [x for x in (a, b) if x > 1]
    total[0] += 1
    log(a, b, where="here", axis=0)
    return sum(total) / max(a, b)
'''


def changes(source):
    return [(m.operator, m.line, m.before, m.after) for m in mutations(source)]


def test_mutations__each_realistic_change_is_made_once():
    found = changes(SOURCE)
    assert len(set(found)) == len(found)
    assert ("swap elements", 3, "(3, 4)", "(4, 3)") in found
    assert ("other constant", 5, "2.0", "4.0") in found
    assert ("other comparison", 8, "a < 0", "a <= 0") in found
    assert ("other operator", 8, "a < 0 or not b", "a < 0 and (not b)") in found
    assert ("drop condition", 10, "[x for x in (a, b) if x > 1]", "[x for x in (a, b)]") in found
    assert ("delete statement", 11, "total[0] += 1", "pass") in found
    assert ("swap arguments", 13, "max(a, b)", "max(b, a)") in found
    assert ("other function", 13, "sum(total)", "mean(total)") in found
    assert ("other operator", 13, "sum(total) / max(a, b)", "sum(total) * max(a, b)") in found


def test_mutations__messages_types_and_logging_stay():
    lines = {line for _, line, _, _ in changes(SOURCE)}
    assert not lines & {1, 2, 4, 6, 7, 9}
    assert not any(
        "where" not in after for _, line, before, after in changes(SOURCE) if line == 12 and "where" in before
    )


def test_mutations__trees_compile_and_the_module_is_unchanged_afterwards():
    texts = []
    for mutation in mutations(SOURCE):
        compile(mutation.tree, "x", "exec")
        texts.append(ast.unparse(mutation.tree))
    plain = ast.unparse(ast.parse(SOURCE))
    assert plain not in texts
    assert len(set(texts)) == len(texts)
    assert changes(SOURCE) == changes(SOURCE)


def test_sample__larger_sample_contains_the_smaller_one():
    module = "shared/samples/frame.py"
    few, many = sample(module, 5), sample(module, 20)
    assert len(few) == 5
    assert set(few) < set(many)


def test_plan__files_exist_and_planted_bugs_fit_the_code():
    plan = yaml.safe_load(PLAN.read_text())
    for module, tests in plan["modules"].items():
        assert (ROOT / module).is_file(), module
        assert all((ROOT / test).is_file() for test in tests), module
    for bug in plan["planted"]:
        source = (ROOT / bug["module"]).read_text()
        assert source.count(bug["before"]) == 1, bug["name"]
        ast.parse(source.replace(bug["before"], bug["after"]))
        assert all((ROOT / test.partition("::")[0]).is_file() for test in bug["tests"]), bug["name"]
    for entry in plan["equivalent"] or []:
        assert entry["code"] in (ROOT / entry["module"]).read_text(), entry
        assert entry["reason"]


def test_table__survivor_counts_unless_it_has_a_reason():
    mutant = {"line": 3, "operator": "o", "code": "x = 1", "before": "1", "after": "2", "outcome": "survived"}
    state = {"a.py": {"possible": 9, "mutants": {"1": mutant, "2": {**mutant, "outcome": "killed"}}}}
    assert "**50.0%** of 2 mutants" in table(state, {"modules": {"a.py": []}})
    reason = {"module": "a.py", "code": "x = 1", "after": "2", "reason": "never read"}
    text = table(state, {"modules": {"a.py": []}, "equivalent": [reason]})
    assert "**100.0%** of 1 mutants" in text
    assert "`1` to `2`: never read" in text
    assert reason_of("b.py", mutant, [reason]) is None
    assert reason_of("a.py", {**mutant, "after": "3"}, [reason]) is None


def test_write_result__section_of_people_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "RESULTS", tmp_path)
    plan = {"modules": {}}
    path = write_result({}, plan, per_module=3)
    first = path.read_text()
    path.write_text(first.replace("## Not found", "## Old") + "\n## In words\n\nRead by hand.\n")
    again = write_result({}, plan, per_module=3)
    assert again.read_text() == first + "\n## In words\n\nRead by hand.\n"


@pytest.mark.slow
@pytest.mark.parametrize(("after", "outcome"), [("0.5)", "survived"), ("0.4)", "killed")])
def test_run_tests__planted_bug_is_found_in_a_process_of_its_own(after, outcome):
    source = (ROOT / "shared/samples/frame.py").read_text()
    tree = ast.parse(source.replace("height * scale + 0.5)", "height * scale + " + after))
    assert run_tests("shared/samples/frame.py", ["tests/unit/test_frame.py"], tree, cpu_seconds=120)[0] == outcome
