-- The databases airflow and de_dw and the logins that use them, on a server that is ours alone. For psql, as superuser.
-- Safe to run again: it makes what is missing, and sets the passwords that the environment has.
\set ON_ERROR_STOP on
\set QUIET on
\getenv airflow_password AIRFLOW_DB_PASSWORD
\getenv owner_password OWNER_PASSWORD
\getenv pipeline_password PIPELINE_PASSWORD
\getenv reader_password READER_PASSWORD
SET client_min_messages = 'warning';
-- Passwords belong in no log.
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';

SELECT format('CREATE ROLE %I', role_name) AS command
FROM unnest(ARRAY['airflow', 'owner', 'pipeline', 'reader', 'de_dw_pipeline', 'de_dw_reader']) AS role_name
WHERE to_regrole(role_name) IS NULL
\gexec
-- The two roles are made here and not by the first migration: it would take CREATEROLE, which up to PostgreSQL 15 is
-- nearly as much as a superuser.
ALTER ROLE de_dw_pipeline NOLOGIN;
ALTER ROLE de_dw_reader NOLOGIN;
SELECT format('ALTER ROLE %I LOGIN PASSWORD %L', login, password) AS command
FROM (
    VALUES
    ('airflow', :'airflow_password'),
    ('owner', :'owner_password'),
    ('pipeline', :'pipeline_password'),
    ('reader', :'reader_password')
) AS wanted (login, password)
\gexec
GRANT de_dw_pipeline TO owner, pipeline;
GRANT de_dw_reader TO reader;

SELECT format('CREATE DATABASE %I OWNER %I', wanted.name, wanted.login) AS command
FROM (VALUES ('airflow', 'airflow'), ('de_dw', 'owner')) AS wanted (name, login)
LEFT JOIN pg_database AS made ON wanted.name = made.datname
WHERE made.datname IS NULL
\gexec
-- PUBLIC may connect to every database, and make temporary tables there, until told otherwise.
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', datname) AS command
FROM pg_database
\gexec
GRANT CONNECT ON DATABASE de_dw TO de_dw_reader;
-- The loader looks for bad records with the help of temporary tables.
GRANT CONNECT, TEMPORARY ON DATABASE de_dw TO de_dw_pipeline;

-- PUBLIC may also make large objects, which nothing here uses, and so fill the disk.
\connect de_dw
REVOKE EXECUTE ON FUNCTION lo_create(oid), lo_creat(integer), lo_from_bytea(oid, bytea) FROM public;
