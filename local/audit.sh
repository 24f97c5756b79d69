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
# The file with everything in it: its pins are all that is looked at, nothing is installed. A package may have several,
# for different versions of Python, and pip-audit would look at one: so first all first pins, then all second ones, ...
pins=$(mktemp -d)
trap 'rm -rf "$pins"' EXIT
grep -oE '^[A-Za-z0-9._-]+==[^ ;]+' requirements-dev.txt | sort -u |
    awk -F == -v folder="$pins" '{ print > (folder "/" ++seen[$1] ".txt") }'
status=0
for file in "$pins"/*.txt; do
    .venv/bin/pip-audit --progress-spinner off --strict --disable-pip --no-deps -r "$file" \
        --vulnerability-service osv --osv-url "$osv" || status=1
done
exit $status
