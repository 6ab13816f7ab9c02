#!/usr/bin/env python3
"""Every public function of the header is called by a test."""
import glob
import re
from report import Report, public_functions, read, without_comments, HEADER

report = Report("check-api")
functions = public_functions(read(HEADER))
called = set()
for path in glob.glob("tests/test_*.c"):
    called |= set(re.findall(r"\b(tfm_[a-z0-9]\w*)\s*\(", without_comments(read(path))))
for name, line in functions.items():
    report.attempt(name, lambda n=name, l=line: "" if n in called else f"{HEADER}:{l}: no test calls it")
report.finish()
