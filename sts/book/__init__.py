"""Results in, pages out: `Page` is a chapter's page on a run; `figures` are drawn from rows."""

from sts.book import figures
from sts.book.page import Page

__all__ = ["Page", "figures"]
