#!/usr/bin/env bash
# Builds or refreshes the Python environment of this checkout, `.venv`, from the locked versions in requirements/.
#
#   bash tools/environment.sh          CPU environment (Python 3.11)
#   bash tools/environment.sh gpu      CUDA environment (Python 3.12); needs no GPU
#   bash tools/environment.sh cpu which   says only which Python it would take, and why
#
# Variables:
#   PYTHON=FOLDER/python3.12   the interpreter, if not the one it would take
#   ME_VENV=FOLDER             another folder than .venv, such as a CUDA environment beside the CPU one
#   MAX_JOBS=4                 processes that compile Transformer Engine's torch extension at a time (about 3 GB each)
#   ME_WITHOUT_TE=1            leave Transformer Engine out: policies then use megatron-core's own layers
#
# Needs a Python interpreter of that version and, once, a package index. Neither root nor an installed pip is required.
# The system's own interpreter is taken where there is one, so that everybody on a distribution has the same; then the
# first on the PATH. An environment of a different interpreter is built anew. A second call finds the stamp of the first
# and returns at once; an interrupted call is simply repeated.
set -euo pipefail

platform=${1:-cpu}
case $platform in
  cpu) python_version=3.11 ;;
  gpu) python_version=3.12 ;;
  *) echo "environment: unknown platform '$platform', choose cpu or gpu" >&2; exit 2 ;;
esac

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$checkout"
lock=requirements/$platform.txt
hosts_locks=(requirements/plugins.txt requirements/openenv.txt)
venv=${ME_VENV:-.venv}
stamp=$venv/.environment_stamp
uv_folder=.uv
# The first release with `pip install --torch-backend` is much older; this is the one the lock was made with.
uv_requirement='uv>=0.8,<1'

say() { echo "environment: $*" >&2; }
fail() { say "$*"; exit 1; }

# What the environment depends on: a change of any of these makes the stamp stale.
wanted_stamp() {
  echo "$platform $checkout ${ME_WITHOUT_TE:-}"
  sha256sum "$lock" "${hosts_locks[@]}" setup.py tools/environment.sh
  identity "$venv/bin/python" || echo "no interpreter"
}

# What an interpreter is: its file, behind links, shims and virtual environments, and its full version.
identity() {
  "$1" -c 'import os, sys; print(os.path.realpath(sys._base_executable), " ".join(sys.version.split()))' 2>/dev/null
}

# Sets `python` to the interpreter to use and `reason` to why it is this one.
choose_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_wanted_version "$PYTHON" || fail "PYTHON=$PYTHON is not a Python $python_version that starts. Name one that" \
      "is, or unset PYTHON to have one looked for"
    reason="PYTHON names it"
    python=$("$PYTHON" -c 'import sys; print(sys.executable)')
    return
  fi
  for candidate in "/usr/bin/python$python_version" "python$python_version" python3 /usr/bin/python3; do
    is_wanted_version "$candidate" || continue
    case $candidate in
      /*) reason="the system's own" ;;
      *) reason="the first on the PATH; the system has no /usr/bin/python$python_version" ;;
    esac
    python=$("$candidate" -c 'import sys; print(sys.executable)')
    return
  done
  fail "no Python $python_version found. Install it (apt-get install python$python_version where the distribution has" \
    "it; without root: uv python install $python_version, conda or pyenv), or name one that is elsewhere:" \
    "PYTHON=FOLDER/python$python_version bash tools/environment.sh $platform"
}

# A version manager's shim may exist for an interpreter that does not start, hence the question to itself.
is_wanted_version() {
  "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$python_version')" 2>/dev/null
}

# Unpacks one Debian package into $scratch/NAME. Downloading needs no root as long as apt's state lies in a folder of
# ours.
unpack_debian_package() {
  local name=$1 apt=$scratch/apt settings
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
  settings=(-o "Dir::State=$apt" -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache"
    -o Dir::State::status=/var/lib/dpkg/status -o Debug::NoLocking=1 -o APT::Sandbox::User= -qq)
  if [ ! -d "$apt" ]; then
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    # A third-party source that does not answer must not stand in the way of the one that has the package.
    apt-get "${settings[@]}" update >&2 || say "apt-get update reported the errors above; trying the download anyway"
  fi
  (cd "$apt" && apt-get "${settings[@]}" download "$name" >&2) && dpkg-deb -x "$apt/${name}"_*.deb "$scratch/$name"
}

# Prints the path of a uv to use: the user's own, the one a former call fetched, or a new one inside the checkout.
find_uv() {
  local python=$1 wheel
  if command -v uv >/dev/null && uv pip install --help 2>/dev/null | grep -q -- --torch-backend; then
    command -v uv
    return
  fi
  if ! "$uv_folder/bin/uv" --version >/dev/null 2>&1; then
    say "fetching uv"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      # Debian keeps pip, as a wheel that runs from where it lies, in a package of its own.
      say "this Python has no pip; taking Debian's"
      unpack_debian_package python3-pip-whl || fail "neither uv nor pip is here, and apt-get could not download" \
        "python3-pip-whl. Install one of uv, python3-pip or python3-venv and run this again"
      wheel=$(echo "$scratch"/python3-pip-whl/usr/share/python-wheels/pip-*.whl)
      export PYTHONPATH=$wheel
    fi
    # pip warns root about the system's packages; nothing is installed there.
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check \
      --target "$scratch/uv" "$uv_requirement" >&2 || fail "pip could not install '$uv_requirement'; see its message above"
    rm -rf "$uv_folder"
    mv "$scratch/uv" "$uv_folder"
  fi
  echo "$checkout/$uv_folder/bin/uv"
}

# vLLM's CPU kernels are linked against libnuma, which a minimal system lacks. Loading it by its path at interpreter
# start is enough: the dynamic linker then knows the name.
provide_libnuma() {
  local library
  "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null && return
  say "this system has no libnuma; taking Debian's into $venv"
  unpack_debian_package libnuma1 || fail "vLLM needs libnuma.so.1 and apt-get could not download libnuma1." \
    "Have the package libnuma1 (numactl-libs elsewhere) installed and run this again"
  library=$(find "$scratch/libnuma1" -name libnuma.so.1)
  cp -L "$library" "$venv/lib/libnuma.so.1"
  echo 'import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libnuma.so.1")' \
    >"$venv/lib/python$python_version/site-packages/libnuma.pth"
}

# Transformer Engine's Python, its kernels (wheels) and its torch extension (source only, hence compiled here). Whatever
# keeps the extension from being built, the rest of the environment works without it, and half of it must not stay:
# megatron-core cannot be imported beside a Transformer Engine that lacks its extension.
install_transformer_engine() {
  local packages torch log=$checkout/$venv/transformer_engine_build.log reason=""
  mapfile -t packages < <(grep '^transformer-engine' "$lock")
  torch=$(grep '^torch==' "$lock")
  if [ -n "${ME_WITHOUT_TE:-}" ]; then
    reason="ME_WITHOUT_TE is set"
  elif ! command -v "${CXX:-c++}" >/dev/null; then
    reason="its torch extension must be compiled and there is no C++ compiler ('${CXX:-c++}'). Install g++ (apt-get \
install g++) or name one with CXX, and run this again"
  else
    say "compiling Transformer Engine's torch extension with ${MAX_JOBS:=4} processes; log: $log"
    # Without isolation it is compiled with this environment's torch, the one it will run with; isolated it would take
    # the newest. uv may have a build from another torch in its cache, hence the setting: the cache goes by it.
    # NVTE_BUILD_USE_NVIDIA_WHEELS: a toolkit on PATH rarely has NCCL and cuDNN, the wheels do.
    # NVTE_PYTORCH_FORCE_BUILD: do not ask the internet for a build first.
    env PATH="$checkout/$venv/bin:$PATH" MAX_JOBS="$MAX_JOBS" NVTE_FRAMEWORK=pytorch \
      NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
      "$uv" pip install --verbose --compile-bytecode --no-deps --python "$venv" --build-constraints "$lock" \
      --no-build-isolation-package transformer-engine-torch \
      --config-settings-package "transformer-engine-torch:built-for=$torch" "${packages[@]}" >"$log" 2>&1 ||
      reason="compiling its torch extension failed; last lines of $log:
$(grep -E 'error|Error' "$log" | tail -n 5)"
  fi
  [ -n "$reason" ] || return 0
  "$uv" pip uninstall --quiet --python "$venv" "${packages[@]%%==*}" 2>/dev/null || true
  say "WITHOUT Transformer Engine: $reason"
  say "policies will use megatron-core's own layers: no fp8, and slower"
}

# uv reads its own variables only; whoever told pip where packages come from has said it once already.
take_pip_settings() {
  local settings
  settings=$("$1" tools/pip_settings.py)
  eval "$settings"
}

has_chosen_python() {
  [ -x "$venv/bin/python" ] && [ "$(identity "$venv/bin/python")" = "$(identity "$python")" ]
}

# Other trainers and environments, for the tests of megatron_entropic.plugins and environments.adapters: folders that only
# those tests have on their path, before everything else. In the environment itself they would bring a second ANTLR,
# pytest plug-ins, and an mcp that vLLM cannot use.
install_hosts() {
  rm -rf "$venv/hosts" "$venv/hosts_openenv"
  "$uv" pip install --quiet --compile-bytecode --python "$venv" --no-deps --target "$venv/hosts" \
    --requirements requirements/plugins.txt
  "$uv" pip install --quiet --compile-bytecode --python "$venv" --no-deps --target "$venv/hosts_openenv" \
    --requirements requirements/openenv.txt
}

is_ready() {
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ] && has_chosen_python
}

choose_python
say "Python $("$python" -c 'import platform; print(platform.python_version())') at $python ($reason)"
[ "${2:-}" != which ] || exit 0
if is_ready; then
  exit 0
fi
[ -f "$lock" ] || fail "$lock is missing; tools/lock_requirements.sh $platform makes it"

# One builder at a time: a test run and a quickstart may be started together.
if command -v flock >/dev/null; then
  exec 9>.environment_lock
  flock --wait 900 9 || fail "another call has been building the environment for 15 minutes; end it and run this again"
  if is_ready; then
    exit 0
  fi
fi

started=$SECONDS
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
uv=$(find_uv "$python")
take_pip_settings "$python"
# With several indexes uv would stop at the first that knows a name; pip considers all of them.
export UV_INDEX_STRATEGY=unsafe-best-match UV_PYTHON_DOWNLOADS=never
unset VIRTUAL_ENV CONDA_PREFIX

if ! has_chosen_python; then
  [ ! -e "$venv" ] || say "$venv is of another: $(identity "$venv/bin/python" || echo "one that does not start")"
  say "creating $venv with $("$python" --version)"
  "$uv" venv --quiet --clear --python "$python" "$venv"
fi
rm -f "$stamp"

say "installing $(grep -c '==' "$lock") locked packages"
if [ "$platform" = cpu ]; then
  torch=$(grep '^torch==' "$lock")
  if ! "$uv" pip install --quiet --python "$venv" --dry-run --no-deps "$torch" 2>/dev/null; then
    say "the configured indexes have no $torch; taking it from PyTorch's own CPU index"
    "$uv" pip install --quiet --python "$venv" --no-deps --torch-backend cpu "$torch"
  fi
fi
# Transformer Engine comes second: its torch extension is compiled here, with the torch and the headers of the first.
grep -v '^transformer-engine' "$lock" >"$scratch/lock.txt"
# Compiling now, on all cores, keeps the first start of a dozen processes from doing it one import at a time.
"$uv" pip sync --quiet --compile-bytecode --python "$venv" "$scratch/lock.txt" requirements/project.txt
if [ "$platform" = gpu ]; then
  install_transformer_engine
else
  provide_libnuma
  install_hosts
fi
"$venv/bin/python" tools/check_environment.py || fail "$venv is not fit for use, see above"
wanted_stamp >"$stamp"
say "$venv is ready after $((SECONDS - started)) s"
