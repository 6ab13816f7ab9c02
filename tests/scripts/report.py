"""What the check scripts share: run many attempts, two or more at a time, and add up."""
import concurrent.futures
import os
import shlex
import shutil
import subprocess
import sys

HEADER = "transformer.h"
WARNINGS = ("-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wundef -Wcast-align -Werror").split()


class Report:
    def __init__(self, label, jobs=0):
        self.label = label
        self.skipped = 0
        self.attempts = []  # (name, future), in the order they were asked for
        jobs = jobs or int(os.environ.get("JOBS") or len(os.sched_getaffinity(0)))
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def attempt(self, name, function, *args):
        """function(*args) returns "" or says what is wrong."""
        self.attempts.append((name, self.pool.submit(function, *args)))

    def command(self, name, *commands):
        """Each command (a list) must exit 0; the first that does not fails the attempt with its output."""
        self.attempt(name, run_all, *commands)

    def skip(self, name, why):
        self.skipped += 1
        print(f"  skipped {name}: {why}")

    def finish(self):
        failed = 0
        for name, future in self.attempts:
            try:
                text = future.result()
            except Exception as error:  # a broken check is a failed check
                text = f"{type(error).__name__}: {error}"
            failed += bool(text)
            if text:
                print(f"  FAIL {name}\n    " + text.strip().replace("\n", "\n    ")[:6000])
            elif os.environ.get("V"):
                print(f"  ok {name}")
        passed = len(self.attempts) - failed
        print(f"{self.label}: {passed} passed, {failed} failed, {self.skipped} skipped")
        sys.exit(1 if failed or passed + self.skipped == 0 else 0)


def run_all(*commands, cwd=None, env=None, timeout=900):
    for command in commands:
        command = [str(c) for c in command]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, timeout=timeout,
                              env={**os.environ, **env} if env else None, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            output = done.stdout.decode("utf-8", "replace")
            lines = [l for l in output.splitlines() if "error" in l.lower() or "undefined" in l] or output.splitlines()
            return f"exit status {done.returncode}: {shlex.join(command)}\n" + "\n".join(lines[:25])
    return ""


def output_of(*command, **kwargs):
    return subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, **kwargs).stdout.decode("utf-8", "replace")


def available(*compilers):
    return [c for c in compilers if shutil.which(c.split()[0])]


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def without_comments(text):
    """C text with comments and the insides of literals blanked, line numbers kept."""
    out, i, n = [], 0, len(text)
    while i < n:
        two = text[i:i + 2]
        if two == "/*":
            end = text.find("*/", i + 2)
            end = n if end < 0 else end + 2
            out.append("".join("\n" if ch == "\n" else " " for ch in text[i:end]))
            i = end
        elif two == "//":
            end = text.find("\n", i)
            end = n if end < 0 else end
            out.append(" " * (end - i))
            i = end
        elif text[i] in "\"'":
            quote, start = text[i], i
            i += 1
            while i < n and text[i] != quote:
                i += 2 if text[i] == "\\" else 1
            i = min(i + 1, n)
            out.append(quote + " " * max(i - start - 2, 0) + quote)
        else:
            out.append(text[i])
            i += 1
    return "".join(out)


def public_functions(text):
    """Names of the functions that the header declares with TFM_API, with the line of each."""
    import re
    found = {}
    clean = without_comments(text)
    for match in re.finditer(r"\bTFM_API\b([^;{}#]*?)\b(tfm_[a-z0-9]\w*)\s*\(", clean):
        found.setdefault(match.group(2), clean.count("\n", 0, match.start()) + 1)
    return found
