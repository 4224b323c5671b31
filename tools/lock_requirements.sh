#!/usr/bin/env bash
# Resolves requirements/PLATFORM.in anew and writes the locked versions to requirements/PLATFORM.txt.
#
#   bash tools/lock_requirements.sh cpu|gpu [uv pip compile options, such as --upgrade]
#
# Needs uv: on PATH, or the one tools/environment.sh left in .uv. Versions already locked are kept unless --upgrade or
# --upgrade-package NAME says otherwise. Where the configured indexes have no CPU build of torch, add --torch-backend cpu.
set -euo pipefail
platform=${1:?usage: tools/lock_requirements.sh cpu|gpu [options]}
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
  *) echo "lock_requirements: unknown platform '$platform', choose cpu or gpu" >&2; exit 2 ;;
esac
exec "$uv" pip compile "requirements/$platform.in" --output-file "requirements/$platform.txt" --quiet \
  --index-strategy unsafe-best-match --no-header --no-annotate --no-emit-package megatron-entropic \
  "${options[@]}" "$@"
