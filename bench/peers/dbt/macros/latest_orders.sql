{# The query of sql/transforms/stg.orders_latest.sql; `where` narrows what is read. #}
{% macro latest_orders(where="") %}
select distinct on (order_id)
    order_id,
    customer_name,
    customer_email,
    product,
    quantity,
    unit_price,
    currency,
    status,
    ordered_at,
    updated_at,
    row_id,
    load_id
from {{ source("raw", "orders") }}
{{ where }}
order by order_id asc, updated_at desc, row_id desc
{% endmacro %}

{# All there is on the first run; after it, loads that are newer than the newest in the table. #}
{% macro new_orders() %}
{{ latest_orders("where load_id > (select max(load_id) from " ~ this ~ ")" if is_incremental() else "") }}
{% endmacro %}
