"""The pages of a run: gallery, report and review, as static files that open from disk."""
