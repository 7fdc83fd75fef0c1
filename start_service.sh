#!/usr/bin/env bash
# Runs the service; first sets it up when that has not been done or the requirements have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh --current || ./setup.sh
exec .venv/bin/python server.py "$@"
