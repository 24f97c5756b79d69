#!/bin/sh
# Makes .venv, if it is not there, and installs the pinned packages of one requirements file in it.
set -eu
start=$(date +%s)
# Neither interpreter nor stamp counts when the making of the environment was interrupted.
if ! .venv/bin/python -c '' 2>/dev/null || [ ! -e .venv/made ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed, and '$PYTHON' is not: make PYTHON=/path/to/python3.12 ..." >&2
        exit 1
    }
    rm -rf .venv
    if command -v uv >/dev/null; then
        uv venv --quiet --no-python-downloads --python "$PYTHON" .venv
    else
        "$PYTHON" -m venv .venv || {
            rm -rf .venv
            echo "'$PYTHON' can't make a virtual environment: apt-get install python3-venv, or install uv" >&2
            exit 1
        }
    fi
fi
touch .venv/made
# uv brings its own list of certificate authorities; behind a company's proxy the system's is the right one.
# (the first name is today's, the second that of older versions)
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    export UV_SYSTEM_CERTS=true UV_NATIVE_TLS=true
fi
if command -v uv >/dev/null; then
    uv=uv
else
    uv=.venv/bin/uv # several times faster than pip with this many packages
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.txt
fi
"$uv" pip install --quiet --python .venv/bin/python --require-hashes -r "$1"
echo "Python packages of $1 installed in .venv ($(($(date +%s) - start)) s)"
