#!/usr/bin/env bash
# Everything a machine with an NVIDIA GPU can show, in slices that resume: call it until it says
# that all is done. README.md beside this file says what is needed. Arguments go to kit.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" benchmarks/gpu/kit.py run "$@"
