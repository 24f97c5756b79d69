#!/bin/sh
# Fails if a locked package has a known vulnerability; says so if the database of them (OSV) is not reached.
# PyPI's own, pip-audit's default, would be silent there: an index that lacks it answers "no such package".
set -eu
osv=${OSV_URL:-https://api.osv.dev/v1/query}
if ! .venv/bin/python - "$osv" <<'PROBE'
import json, sys, urllib.request
try:
    request = urllib.request.Request(sys.argv[1], json.dumps({"package": {"name": "pip", "ecosystem": "PyPI"}}).encode())
    json.load(urllib.request.urlopen(request, timeout=10))
except (OSError, ValueError) as error:
    sys.exit(f"audit of the requirements skipped: {sys.argv[1]} is not reached: {error}")
PROBE
then
    exit 0
fi
# The file with everything in it. Its pins and hashes are all that is looked at: nothing is installed.
exec .venv/bin/pip-audit --progress-spinner off --strict --disable-pip --require-hashes -r requirements-dev.txt \
    --vulnerability-service osv --osv-url "$osv"
