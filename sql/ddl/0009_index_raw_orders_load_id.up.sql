-- raw.orders: an index that finds the rows of a load without reading the others.

-- A load's rows lie together, so the least and the greatest load_id of each 128 pages are enough: 1 to 2% of a COPY,
-- where a B-tree takes 25%. docs/performance.md has the figures.
-- Made in the migration's transaction: loads wait until the table was read once.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_load_id_brin ON raw.orders USING brin (load_id);
