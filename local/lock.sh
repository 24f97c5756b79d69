#!/bin/sh
# Compiles the requirements files: pinned, hashed, for Python 3.11 and newer on every platform, packages' names only.
set -eu
compile() {
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
        --no-emit-index-url --custom-compile-command 'make lock' "$@"
}
# The one with everything first, so that a package has the same version in each.
compile pyproject.toml --all-extras --group dev -o requirements-dev.txt
compile pyproject.toml -c requirements-dev.txt -o requirements.txt
compile pyproject.toml --extra local -c requirements-dev.txt -o requirements-local.txt
compile pyproject.toml --extra image -c requirements-dev.txt -o requirements-image.txt
echo uv | compile - -c requirements-dev.txt -o requirements-uv.txt
