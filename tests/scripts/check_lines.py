#!/usr/bin/env python3
"""Prints how many lines each chapter of the header has, beside its budget. A budget is for the reader: going over it is shown,
and the header as a whole must stay below the sum of all, but for the lists of names, which nobody reads."""
import re
import sys

BUDGET = {1: 500, 2: 800, 3: 400, 4: 3500, 5: 300, 6: 500, 7: 1200, 8: 2500, 9: 1800, 10: 1800, 11: 1500, 12: 1000, 13: 1500, 14: 3000}
FRONT = 2000  # the manual and the public declarations

lines = open(sys.argv[1], encoding="utf-8").read().split("\n")
starts = []  # (line, number, name)
for i in range(1, len(lines)):
    match = re.match(r"^ \*\s+(\d+)  ([A-Z][A-Z ,/-]+)$", lines[i])
    if match and lines[i - 1].startswith("/* ===="):
        starts.append((i - 1, int(match.group(1)), match.group(2).strip()))

listed = [bool(re.match(r"#undef |#define tfm_\w+ TFM__PREFIXED\(", line)) for line in lines]
names = sum(listed)
over = 0
print(f"  {'chapter':34} lines  budget")
print(f"  {'manual and public declarations':34} {starts[0][0] if starts else len(lines):5}  {FRONT:6}")
for index, (line, number, name) in enumerate(starts):
    end = starts[index + 1][0] if index + 1 < len(starts) else len(lines)
    size, budget = end - line - sum(listed[line:end]), BUDGET.get(number, 0)
    over += size > budget
    print(f"  {number:2}  {name:30} {size:5}  {budget:6}{'  over' if size > budget else ''}")
numbers = [n for _, n, _ in starts]
problems = []
if numbers != sorted(set(numbers)) or not numbers:
    problems.append(f"chapters are not in order, or stand twice: {numbers}")
if len(lines) - names > sum(BUDGET.values()) + FRONT:
    problems.append(f"{len(lines) - names} lines, more than the sum of all budgets")
for problem in problems:
    print("  FAIL " + problem)
print(f"  {'lists of names':34} {names:5}")
print(f"  {len(lines)} lines in all, {over} chapters over budget")
print(f"check-lines: {int(not problems)} passed, {len(problems)} failed, 0 skipped")
sys.exit(1 if problems else 0)
