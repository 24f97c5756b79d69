# Everything here works on a fresh clone with Python 3.11 or newer, make and a C locale.

PYTHON ?= python3
ROWS ?= 10000000
# Set on some machines; without .pyc files every Airflow process would compile Airflow again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo run up down test screenshots compose-test lint format bench lock clean .env

help: ## this list
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/local.ok ## from nothing to a warehouse: embedded PostgreSQL, migrations, three Airflow runs, the counts
	@.venv/bin/python -m local demo

run: .venv/local.ok ## one run of a DAG, without the UI: make run DAG=customers CONF='{"rows": 1000}'
	@.venv/bin/python -m local run "$(or $(DAG),orders)" '$(CONF)'

up: .venv/local.ok ## the Airflow UI on the embedded PostgreSQL, until Ctrl-C
	@.venv/bin/python -m local up

down: ## stop what make up or make demo runs elsewhere
	@[ ! -e .venv/local.ok ] || .venv/bin/python -m local down

test: .venv/dev.ok ## all tests, on PostgreSQL 15 if it is installed and on the embedded one
	@# A server that WAREHOUSE_URL names is one for all: there the tests run one after the other.
	@.venv/bin/python -m pytest -n $(if $(WAREHOUSE_URL),0,2)

screenshots: .venv/dev.ok ## the UI's tests, in Chromium, and the pictures of the README from them
	@.venv/bin/python -m pytest tests/ui
	@cd "$(or $(SCREENSHOTS),.run/screenshots)" && cp graph.png warehouse.png warehouse-dark.png "$(CURDIR)/docs/img" && \
	    echo "All pictures: $$PWD; those of the README: docs/img"

compose-test: .venv/dev.ok ## compose.yaml for real: the counts, kills, each line of its security, three workers
	@tests/compose/run.sh

.env: ## the secrets of compose.yaml, random; those that are there are kept
	@local/dotenv.sh

lint: .venv/dev.ok ## ruff, mypy, sqlfluff, squawk, yamllint, and known vulnerabilities
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/sqlfluff lint sql
	@# each migration is a transaction of its own, alembic/env.py sets its lock_timeout, and quantity is an integer
	@.venv/bin/squawk --assume-in-transaction --pg-version 15 \
	    --exclude require-lock-timeout,require-statement-timeout,prefer-robust-stmts,prefer-bigint-over-int \
	    sql/ddl/*.up.sql
	@.venv/bin/yamllint --strict kubernetes $(wildcard compose*.yaml)
	@local/audit.sh

format: .venv/dev.ok ## ruff and sqlfluff, writing
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
	@.venv/bin/sqlfluff fix sql

bench: .venv/local.ok ## the benches of docs/performance.md, then ROWS orders (10 million) through the DAG
	@.venv/bin/python -m bench
	@.venv/bin/python -m bench.dag_at_scale --rows $(ROWS)

lock: .venv/dev.ok ## compile the requirements files anew from pyproject.toml
	@local/lock.sh

clean: down ## remove the environment, the embedded warehouse with its rows, and the batch files
	@rm -rf .venv .run data

.venv/%.ok: requirements-%.txt requirements-uv.txt local/venv.sh
	@PYTHON="$(PYTHON)" local/venv.sh $<
	@touch .venv/local.ok $@
