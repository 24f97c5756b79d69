"""### Orders: land a batch, publish the latest row of each"""

from batch_dag import Dataset, batch_dag  # the flow, as an Airflow DAG

batch_dag(Dataset("orders", generated=True), __doc__)
