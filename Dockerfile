# The official image and what requirements-image.txt pins, nothing else: compose.yaml mounts the code, read-only.
ARG AIRFLOW_IMAGE=apache/airflow:3.3.2-python3.12
FROM ${AIRFLOW_IMAGE}
COPY requirements-image.txt /opt/airflow/
# The folder of the batch files, so that a volume mounted there belongs to the user airflow.
RUN uv pip install --no-cache --compile-bytecode --require-hashes -r requirements-image.txt && mkdir data
