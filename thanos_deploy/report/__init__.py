"""Reports that compare pruned models with the dense model, for people and for programs.

`thanos_deploy.stages` calls this package to write reports, and the command line prints parts of
them. It measures nothing: it reads everything from the folder of a bundle.

model     the dataclasses of report.json, which report.schema.json describes
sources   the records in a bundle's folder, beside the manifest
build     makes the report from the sources
words     sentences that explain the figures
runs      chooses the benchmark run whose figures are quoted for a model
pareto    finds the models that other models dominate
commands  the command lines that make a bundle again
figures   the figures of a report as table rows
charts    charts as inline SVG in the colours of the page
labels    places the names of points in a chart
page      the report as one HTML file
markdown  the report as Markdown
escape    escapes text from outside for Markdown
card      the model card of a bundle
write     writes all of these files, for one bundle or for several
"""
