"""Measure the quality cost of every method and pattern on your own texts; see `__main__`.

record     the results as JSON, which a later run continues
rows       one row: prune a model and evaluate the result
table      the results in Markdown, beside published figures
"""
