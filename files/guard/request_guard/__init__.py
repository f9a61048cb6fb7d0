"""The request guard: refuses requests that the engine must not see, and passes the others on byte for byte.

vLLM loads it with ``--middleware request_guard.engine.RequestGuard``.  docs/request-guard.md says what it is for.
"""
