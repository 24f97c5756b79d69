"""The Warehouse page: app.py answers requests, warehouse.py asks the database, words.py writes figures for people,
documents.py shows docs/*.md. HTML is in templates/, made on the server; static/ has one CSS file and one script.
"""
