"""Audits of finished runs: see ``run.audit_run``."""
