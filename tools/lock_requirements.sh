#!/usr/bin/env bash
# Resolves requirements/PLATFORM.in anew and writes the locked versions to requirements/PLATFORM.txt.
#
#   bash tools/lock_requirements.sh cpu|gpu|plugins|openenv [uv pip compile options, such as --upgrade]
#
# `plugins` are the trainers and environments of requirements/plugins.in, on top of the CPU environment: packages that
# requirements/cpu.txt locks are left out. `openenv` is one more of them, in a folder of its own.
#
# Needs uv: on PATH, or the one tools/environment.sh left in .uv. Versions already locked are kept unless --upgrade or
# --upgrade-package NAME says otherwise; a conflict with one of them is an error that names it. Where the configured indexes have no CPU build of torch, add --torch-backend cpu.
set -euo pipefail
platform=${1:?usage: tools/lock_requirements.sh cpu|gpu|plugins|openenv [options]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=$(command -v uv || echo .uv/bin/uv)
python=$(command -v python3)
settings=$("$python" tools/pip_settings.py)
eval "$settings"
case $platform in
  # torchvision, torchaudio and torchcodec have no matching CPU build everywhere and nothing here uses them.
  cpu) options=(--python-version 3.11 --override requirements/overrides_cpu.txt) ;;
  gpu) options=(--python-version 3.12 --python-platform x86_64-manylinux_2_28) ;;
  # Each with the package that it needs in another version than cpu.txt.
  plugins) options=(--python-version 3.11 --override requirements/overrides_plugins.txt) other=antlr4 ;;
  openenv) options=(--python-version 3.11 --override requirements/overrides_openenv.txt) other=mcp ;;
  *) echo "lock_requirements: unknown platform '$platform', choose cpu, gpu, plugins or openenv" >&2; exit 2 ;;
esac
# The locked versions are handed over as constraints, and not as what uv finds in its output file: for those it looks
# at one of several indexes only, and gives up where that has the version for another Python ("no wheels with a
# matching Python ABI tag", uv 0.13.9).
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
lock=requirements/$platform.txt
cp "$lock" "$scratch/locked.txt" 2>/dev/null || touch "$scratch/locked.txt"
previous=""
for argument in "$@"; do
  case $argument in
    --upgrade | -U) : >"$scratch/locked.txt" ;;
    --upgrade-package=*) sed -i "/^${argument#*=}==/d" "$scratch/locked.txt" ;;
  esac
  case $previous in --upgrade-package | -P) sed -i "/^$argument==/d" "$scratch/locked.txt" ;; esac
  previous=$argument
done
if [ -n "${other:-}" ]; then
  grep -v "^$other" requirements/cpu.txt >"$scratch/cpu.txt"
  cat "$scratch/cpu.txt" >>"$scratch/locked.txt"
fi
"$uv" pip compile "requirements/$platform.in" --output-file "$scratch/new.txt" --quiet \
  --constraints "$scratch/locked.txt" --index-strategy unsafe-best-match --no-header --no-annotate \
  --no-emit-package megatron-entropic "${options[@]}" "$@"
if [ -n "${other:-}" ]; then
  grep -vxFf "$scratch/cpu.txt" "$scratch/new.txt" >"$lock"
else
  mv "$scratch/new.txt" "$lock"
fi
