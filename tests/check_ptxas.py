"""Reads the compiler's resource report (-Xptxas=-v) and fails where a kernel spills. Usage: check_ptxas.py LOG"""

import pathlib
import re
import sys

REPORT = re.compile(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def main(path):
    found = REPORT.findall(pathlib.Path(path).read_text())
    spilling = [(name, stores) for name, _, stores, _ in found if int(stores)]
    single = [name for name, _ in spilling if "_kernelId" not in name]  # float64 is for correctness, not speed
    for name, stores in spilling:
        print(f"{stores} bytes spilled: {name}")
    print(f"{len(found) - len(single)} passed, {len(single)} failed")
    return 1 if single or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
