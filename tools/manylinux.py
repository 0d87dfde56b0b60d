"""Give wheels the manylinux tag that their libraries' symbol versions allow:  python tools/manylinux.py dist/*.whl

The tag names the oldest glibc on which every versioned symbol exists; libstdc++ counts through the release that came with it.
Built on an old distribution the same sources get an older tag; torch's own wheels start at manylinux_2_28, so lower is no use.
"""

import re
import subprocess
import sys
import tempfile
import zipfile

OLDEST = (2, 28)
GLIBC_OF = {  # newest symbol version of libstdc++ and libgcc that the distributions of a glibc have
    "GLIBCXX": {(3, 4, 25): (2, 28), (3, 4, 28): (2, 31), (3, 4, 29): (2, 34), (3, 4, 30): (2, 35), (3, 4, 33): (2, 39)},
    "CXXABI": {(1, 3, 11): (2, 28), (1, 3, 12): (2, 31), (1, 3, 13): (2, 34), (1, 3, 15): (2, 39)},
    "GCC": {(7, 0, 0): (2, 28), (12, 0, 0): (2, 36), (14, 0, 0): (2, 39)},
}


def glibc_needed(kind, version):
    if kind == "GLIBC":
        return version[:2]
    return next((glibc for newest, glibc in sorted(GLIBC_OF[kind].items()) if version <= newest), (2, 41))


def oldest_glibc(wheel):
    oldest = OLDEST
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        for name in archive.namelist():
            if not name.endswith(".so"):
                continue
            symbols = subprocess.check_output(["nm", "-D", "--undefined-only", archive.extract(name, folder)], text=True)
            for kind, numbers in set(re.findall(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", symbols)):
                needed = glibc_needed(kind, tuple(map(int, numbers.split("."))))
                if needed > OLDEST:
                    print(f"{name}: {kind}_{numbers} needs glibc {'.'.join(map(str, needed))}")
                oldest = max(oldest, needed)
    return oldest


for wheel in sys.argv[1:]:
    glibc = oldest_glibc(wheel)
    machine = re.search(r"-linux_(\w+)\.whl$", wheel).group(1)
    tag = f"manylinux_{glibc[0]}_{glibc[1]}_{machine}"
    subprocess.check_call([sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel])
