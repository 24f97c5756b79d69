#!/bin/sh
# Writes .env for compose.yaml: a random value for each secret that it does not have yet, readable by its owner only.
# A new secret also goes into the services that use it, tests/compose and docs/security.md.
set -eu
umask 077
if [ -L .env ]; then
    echo ".env is a symbolic link: write the secrets into the file that it names, or make it a file" >&2
    exit 1
fi
old=.env
[ -e "$old" ] || old=/dev/null
new=.env.$$
trap 'rm -f "$new"' EXIT
trap 'exit 1' HUP INT TERM

random() { # $1 bytes as hexadecimal digits, which need no quoting in a URL, in JSON or in a shell
    head -c "$1" /dev/urandom | od -An -tx1 | tr -d ' \n'
}
secret() { # name, what it is for, value
    grep -q "^$1=." "$old" || printf '# %s\n%s=%s\n' "$2" "$1" "$3"
}

{
    # Without the secrets that are empty, and with an end to the last line.
    sed -e '/^[A-Z_]*\(PASSWORD\|SECRET\|KEY\)=$/d' -e '$a\' "$old"
    secret UI_PASSWORD "the Airflow UI's user admin" "$(random 12)"
    secret READER_PASSWORD "database de_dw, login reader: for analysts" "$(random 16)"
    secret PIPELINE_PASSWORD "database de_dw, login pipeline: for Airflow's tasks" "$(random 16)"
    secret OWNER_PASSWORD "database de_dw, login owner: for migrations only" "$(random 16)"
    secret AIRFLOW_DB_PASSWORD "database airflow, login airflow: Airflow's own data" "$(random 16)"
    secret POSTGRES_PASSWORD "the server's superuser postgres: makes databases and logins" "$(random 16)"
    secret REDIS_PASSWORD "the queue of compose.celery.yaml" "$(random 16)"
    secret FERNET_KEY "encrypts connections and variables that are kept in Airflow's database" \
        "$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')"
    secret JWT_SECRET "signs the tokens of the UI, the API and the tasks" "$(random 32)"
    secret API_SECRET_KEY "signs the sessions of the UI" "$(random 32)"
} >"$new"
chmod 600 "$new"
mv "$new" .env
echo ".env has all secrets. Keep it: without FERNET_KEY and the passwords the volumes' data can't be used."
