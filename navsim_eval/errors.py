"""Errors meant for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: wrong path, key, file or field.

    The message is one line that names what was wrong, where, and the remedy. The tools print it without a
    traceback and exit with status 2.
    """


class DataError(UserError):
    """A file of the data set is missing, truncated or malformed. A long run skips the sample and counts it."""

    def __init__(self, path: object, problem: str, *, field: str | None = None, remedy: str | None = None):
        self.path, self.problem, self.field, self.remedy = str(path), problem, field, remedy
        where = f"{path} [{field}]" if field else f"{path}"
        super().__init__(f"{where}: {problem}" + (f" — {remedy}" if remedy else ""))
