"""What every way to prune costs in quality, on texts of your own; see `__main__`.

record     the results as JSON, which a later run goes on with
rows       one way: prune, and examine the result
table      the results in Markdown, beside published figures
"""
