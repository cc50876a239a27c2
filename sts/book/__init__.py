"""Results in, pages out: `open_page` opens a chapter's run; `figures` are drawn from rows."""

from sts.book import figures
from sts.book.page import Page, open_page

__all__ = ["Page", "figures", "open_page"]
