"""One suite, from its plan to its report. Decides when and where; what and how is Python, and they meet in files.

`coati-bench run SUITE` drives it. By hand, from the project's folder:
    coati-bench plan config/quickstart.yaml --write
    snakemake --profile profiles/local --config suite=results/quickstart
"""

import pathlib

import bench.launch.targets

TARGETS = bench.launch.targets.Targets(pathlib.Path(config["suite"]))
LAYOUT = TARGETS.layout


wildcard_constraints:
    **TARGETS.patterns(),


include: "rules/container.smk"
include: "rules/data.smk"
include: "rules/warm_start.smk"
include: "rules/block.smk"
include: "rules/report.smk"


localrules:
    all,
    cell,
    container,
    data,
    report,


rule all:
    """The report of the whole suite, and every block: one that is missing is run even where a report exists."""
    default_target: True
    input:
        LAYOUT.report / "report.html",
        TARGETS.all_blocks(),
