#!/bin/sh
# The whole package on emulated aarch64: `make test-aarch64-full TESTS="tests/test_golden.py ..."`, hours for all of them.
# Debian's arm64 Python and PyPI's aarch64 torch lie in $ROOT; the core is cross-compiled; every Python, those that tests
# start included, is the wrapper $ROOT/python. No root rights, no binfmt: packages are unpacked, nothing of them runs.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user (`make tools`), apt-get and dpkg-deb, and a host Python 3.11 or later.
#   tests/aarch64/full.sh HOST_PYTHON PYTEST_ARGUMENTS...
set -e
cd "$(dirname "$0")/../.."
HOST=$1
shift
ROOT=$PWD/build/aarch64-full
TORCH=torch==2.9.1 # the last one whose aarch64 wheel on PyPI needs no CUDA packages
mkdir -p "$ROOT"

if [ ! -e "$ROOT/usr/bin/python3.11" ]; then
  # apt with lists, architecture and status of its own: the host's stay as they are
  apt=$ROOT/apt
  mkdir -p "$apt/etc/apt.conf.d" "$apt/state/lists/partial" "$apt/cache/archives/partial"
  : >"$apt/status"
  echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main' \
    >"$apt/etc/sources.list"
  get() {
    apt-get -qq -o Dir::Etc="$apt/etc" -o Dir::Etc::parts="$apt/etc/apt.conf.d" -o Dir::State="$apt/state" \
      -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" -o APT::Architecture=arm64 \
      -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Debug::NoLocking=1 "$@"
  }
  get update
  get install -y --no-install-recommends --download-only python3 libpython3-dev libgomp1 libstdc++6 zlib1g
  for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$ROOT"; done
fi

SITE=$ROOT/usr/local/lib/python3.11/dist-packages
if [ ! -e "$SITE/torch" ]; then
  # pip reads the environment markers of the host, so the dependencies are named here
  "$HOST" -m pip install -q --no-deps --target "$SITE" --only-binary=:all: --python-version 3.11 --implementation cp \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    $TORCH filelock typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec numpy \
    pytest pytest-benchmark py-cpuinfo iniconfig pluggy packaging pygments hypothesis sortedcontainers attrs \
    safetensors pillow tqdm
fi
cat >"$ROOT/python" <<WRAPPER
#!/bin/sh
PYTHONHOME=$ROOT/usr exec qemu-aarch64 -L $ROOT $ROOT/usr/bin/python3.11 "\$@"
WRAPPER
chmod +x "$ROOT/python"
printf 'import sys\nsys.executable = "%s"\n' "$ROOT/python" >"$SITE/sitecustomize.py"

# The package and its tests beside the core of aarch64, apart from the checkout, where the host's own core may lie.
COPY=$ROOT/package
mkdir -p "$COPY"
cp -r conftest.py pyproject.toml README.md CMakeLists.txt csrc tokenflow_ext python benchmarks tests "$COPY/"
rm -f "$COPY"/tokenflow_ext/_C*.so
"$HOST" -c 'import pybind11' 2>/dev/null || "$HOST" -m pip install -q pybind11
cmake -S . -B "$ROOT/core" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_CXX_FLAGS="-idirafter $ROOT/usr/include" \
  -DSKBUILD_PROJECT_VERSION=0.1.0 -DPython_EXECUTABLE="$HOST" -DPython_INCLUDE_DIR="$ROOT/usr/include/python3.11" \
  -Dpybind11_DIR="$("$HOST" -m pybind11 --cmakedir)" -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so
cmake --build "$ROOT/core" --parallel
cp "$ROOT"/core/_C*.so "$COPY/tokenflow_ext/"

cd "$COPY"
exec "$ROOT/python" -m pytest -p no:cacheprovider "$@"
