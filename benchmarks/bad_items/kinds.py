"""All kinds of cases: importing it fills ``case.KINDS``."""

from bad_items import code, commands, folders, runs, tables, values, videos, weights

__all__ = ["code", "commands", "folders", "runs", "tables", "values", "videos", "weights"]
