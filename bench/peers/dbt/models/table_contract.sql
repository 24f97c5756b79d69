{{ config(materialized="table") }}
{{ latest_orders() }}
