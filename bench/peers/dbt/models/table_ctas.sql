{{ config(materialized="table", post_hook="alter table {{ this }} add primary key (order_id)") }}
{{ latest_orders() }}
