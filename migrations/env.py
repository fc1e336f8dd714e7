"""Alembic's entry: gpubroker.prices.store.migrate hands over a connection that holds the lock.

Everything runs in that one transaction, on SQLite too (its DDL is transactional after an explicit BEGIN).
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
