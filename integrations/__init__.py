"""Adapters and backends. Each room wraps one third party and imports it at its top; import them by name only."""
