{{ config(
    materialized="incremental",
    incremental_strategy="merge",
    unique_key="order_id",
    indexes=[{"columns": ["load_id"]}],
    post_hook="{% if not is_incremental() %}alter table {{ this }} add primary key (order_id){% endif %}",
) }}
{{ new_orders() }}
