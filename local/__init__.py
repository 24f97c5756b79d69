"""The warehouse without Docker: PostgreSQL from a wheel and Airflow on it. `make demo`, `make up`, `make down`."""
