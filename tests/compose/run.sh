#!/bin/sh
# make compose-test: an engine, the images, the tests; as `run.sh images` the images only, which are kept. Whoever has no engine, and can start none, is told so.
# Without a registry, and without Docker: STANDINS names a folder with scripts that start an engine and build images of
# the official ones' names from Debian's and Python's packages.
set -eu
standins=$(cd "${STANDINS:-../shared/standins}" 2>/dev/null && pwd) || standins=
log=${TMPDIR:-/tmp}/compose-test-images.$$.log
started=

stop() {
    [ -z "$started" ] || kill "$(cat "${WORK:-/var/tmp/standins}/dockerd.pid")" || true
    rm -f "$log"
}
trap stop EXIT
skip() {
    echo "skipped: $1"
    exit 0
}
quietly() {
    "$@" >"$log" 2>&1 || { tail -n 30 "$log" >&2; return 1; }
}
begun=$(date +%s)
lap() {
    echo "$1: $(($(date +%s) - begun)) s"
    begun=$(date +%s)
}

if ! docker info >/dev/null 2>&1; then
    [ -n "$standins" ] && [ "$(id -u)" = 0 ] || skip "no Docker engine"
    quietly bash "$standins/00-engine.sh" || skip "no Docker engine"
    started=yes
fi
if ! docker compose version >/dev/null 2>&1; then
    [ -n "$standins" ] || skip "no Docker Compose"
    quietly bash "$standins/10-compose.sh" || skip "no Docker Compose"
fi
lap "engine $(docker version --format '{{.Server.Version}}'), Compose $(docker compose version --short)"

airflow=$(sed -n 's/^ARG AIRFLOW_IMAGE=//p' Dockerfile)
official=yes
for image in postgres:15 postgres:18 redis:7.2 "$airflow"; do
    standin=$(docker image inspect -f '{{index .Config.Labels "standin.of"}}' "$image" 2>/dev/null) && [ -z "$standin" ] ||
        docker pull --quiet "$image" >"$log" 2>&1 || { official= && break; }
done
if [ "$official" ]; then
    lap "the official images"
elif [ -n "$standins" ]; then
    version=${airflow#*:} python=${airflow##*-python}
    PG_MAJOR=15 quietly bash "$standins/30-postgres.sh"
    PG_MAJOR=18 quietly bash "$standins/30-postgres.sh"
    quietly bash "$standins/35-redis.sh"
    AIRFLOW_VERSION=${version%-python*} AIRFLOW_PYTHON=$python AIRFLOW_CONSTRAINTS=$PWD/requirements-image.txt \
        quietly bash "$standins/40-airflow.sh"
    lap "no registry: local stand-ins of the official images"
else
    tail -n 3 "$log" >&2
    skip "the images can't be pulled, and there are no stand-ins for them"
fi

[ "${1:-}" != images ] || exit 0
.venv/bin/python -m pytest -m compose tests/compose -vv --durations=0 --durations-min=0.5
