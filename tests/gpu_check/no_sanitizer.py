"""Stands in for compute-sanitizer in the rehearsal: takes its options and runs the command."""

import argparse
import subprocess

parser = argparse.ArgumentParser()
parser.add_argument("--tool", choices=["memcheck", "racecheck"])
parser.add_argument("--error-exitcode", type=int)
parser.add_argument("--print-limit", type=int)
parser.add_argument("command", nargs=argparse.REMAINDER)
given = parser.parse_args()
code = subprocess.run(given.command).returncode
print("========= ERROR SUMMARY: 0 errors" if code == 0 else "========= ERROR: the program failed")
raise SystemExit(code)
