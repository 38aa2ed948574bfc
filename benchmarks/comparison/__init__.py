"""Compare dense and pruned models in common runtimes, at equal bits; see `__main__`.

models     the models: dense, pruned, quantised
subjects   a model as the files that one runtime reads
measure    perplexity of these files, and times in turns
record     the results as JSON
front      which models are the fastest or smallest for their perplexity, and sentences about it
table      the results in Markdown
"""
