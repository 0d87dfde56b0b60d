#!/bin/sh
# Loads the one binary of dist/ on several torch versions, tests ops and noise there, and loads on each what the others saved:
#   tools/check_abi.sh python 2.11.0 2.15.0
# Environments are kept in build/abi. ABI_INDEX_OPTIONS is handed to pip, where torch comes from elsewhere than the default index.
set -eu
python=$1
shift
rm -rf build/abi/saved && mkdir -p build/abi/saved
for version in "$@"; do
  venv=build/abi/$version
  test -x "$venv/bin/python" || "$python" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install -q ${ABI_INDEX_OPTIONS:-} "torch==$version" numpy safetensors pytest hypothesis scipy
  "$venv/bin/python" -m pip install -q --no-deps --no-index --force-reinstall --find-links dist genkern
  echo "torch $version:"
  # from a folder apart, so that the installed wheel is tested and not the checkout
  rm -rf build/abi/tests && cp -r tests build/abi/tests
  (cd build/abi && "$version/bin/python" -c "
import torch, genkern
from genkern.core import libraries
print('torch', torch.__version__, 'genkern', genkern.__file__, libraries())
assert libraries()['cpu'][1] is None" && "$version/bin/python" -m pytest -q -c ../../pyproject.toml --rootdir . tests/test_every_op.py \
      tests/test_core.py tests/test_random.py && "$version/bin/python" tests/tools/versions.py saved "$version")
done
for version in "$@"; do (cd build/abi && "$version/bin/python" tests/tools/versions.py saved "$version"); done
