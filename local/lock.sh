#!/bin/sh
# Compiles the requirements files: pinned, hashed, for Python 3.11 and newer on every platform, packages' names only.
set -eu
compile() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
        --no-emit-index-url --custom-compile-command 'make lock' "$@"
}
compile pyproject.toml -o requirements.txt
compile pyproject.toml --extra local -c requirements.txt -o requirements-local.txt
compile pyproject.toml --extra local --group dev -c requirements-local.txt -o requirements-dev.txt
echo uv | compile - -c requirements-dev.txt -o requirements-uv.txt
