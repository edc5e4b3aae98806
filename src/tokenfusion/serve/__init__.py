"""A service and a page: the answers of `predict`, over HTTP."""
