"""What runs showed, dense beside pruned, as one value that people and machines read.

`thanos_deploy.stages` has it written, and the command line prints parts of it. It measures nothing:
everything is read from the folder of a bundle.

sources   what a bundle's folder has beside its manifest
build     sources -> the report, the value that report.json holds; report.schema.json describes it
words     what the figures mean, in sentences
runs      which benchmark run speaks for a model
pareto    which models another one beats
commands  the command lines that make a bundle again
figures   the report's figures as rows, for whoever prints a table
charts    pictures, as SVG that follows the page's colours
labels    where the names of points go in a picture
page      the report as one HTML file
markdown  the report as Markdown
card      the model card of a bundle
write     all of these as files: in a bundle, or of several bundles
"""
