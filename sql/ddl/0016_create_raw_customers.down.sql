-- raw.customers and its quarantine, unless they have rows: they cannot be made again.
SELECT raw.drop_dataset('customers');
