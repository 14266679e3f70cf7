"""Data: fetched or generated, checked, and described by a manifest."""


rule data:
    """Fetch or generate one data set. A file of the user's is read again when it has changed."""
    input:
        lambda wildcards: TARGETS.data_inputs(wildcards.data),
    output:
        LAYOUT.root / "data" / "{data}.json",
    params:
        name=lambda wildcards: TARGETS.data[wildcards.data],
    shell:
        "coati-bench data fetch {params.name:q} --manifest {output:q}"
