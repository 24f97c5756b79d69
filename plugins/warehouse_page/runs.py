"""What the page asks Airflow: of which DAG a run is, and whether a user may see records."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from airflow.api_fastapi.app import get_auth_manager
from airflow.api_fastapi.auth.managers.models.base_user import BaseUser
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.models.asset import AssetModel, TaskOutletAssetReference
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
from sqlalchemy import select


@dataclass
class Runs:
    """:param dags: of each run, by its run_id, the DAG.
    :param may_see_records: they stand in the logs of the DAGs that load them, so it takes the right to read those.
    """

    dags: dict[str, str] = field(default_factory=dict)
    may_see_records: bool = False


def look_up(user: BaseUser, assets: Iterable[str], run_ids: Iterable[str | None]) -> Runs:
    """Ask Airflow's own database, and its auth manager. To be called in a thread.

    :param assets: names of tables; the DAGs with a task that updates the asset of this name are those that load it.
    :param run_ids: as the warehouse has them; Airflow may have forgotten some.
    """
    with create_session() as session:
        producers = session.scalars(
            select(TaskOutletAssetReference.dag_id)
            .join(AssetModel, AssetModel.id == TaskOutletAssetReference.asset_id)
            .where(AssetModel.name.in_(list(assets)))
            .distinct()
        ).all()
        found = session.execute(
            select(DagRun.run_id, DagRun.dag_id).where(DagRun.dag_id.in_(producers), DagRun.run_id.in_(list(run_ids)))
        )
        dags = {row.run_id: row.dag_id for row in found}
    manager = get_auth_manager()
    asked: list[str | None] = [*producers] or [None]
    may_see = all(
        manager.is_authorized_dag(
            method="GET",
            access_entity=DagAccessEntity.TASK_LOGS,
            details=DagDetails(id=dag_id, team_name=DagModel.get_team_name(dag_id) if dag_id else None),
            user=user,
        )
        for dag_id in asked
    )
    return Runs(dags, may_see)
