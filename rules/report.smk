"""The report: a function of the records."""


rule report:
    """Make the report from the plan and the records that the blocks left."""
    input:
        LAYOUT.plan,
        TARGETS.all_blocks(),
    output:
        report(LAYOUT.report / "report.html", caption="captions/report.rst", category="Comparison"),
    params:
        records=LAYOUT.records,
        folder=LAYOUT.report,
    shell:
        "coati-bench report {params.records:q} --output {params.folder:q}"
