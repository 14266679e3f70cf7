"""Cells as files, and blocks: one repetition of a comparison set, in seeded order, on one allocation."""


rule cell:
    """Write a cell. Its text is a parameter, so a changed field runs the block of this cell again and no other."""
    output:
        LAYOUT.cell("{cell}"),
    params:
        text=lambda wildcards: TARGETS.cell_text(wildcards.cell),
    shell:
        "printf '%s\\n' {params.text:q} > {output:q}"


rule block:
    """Run a block. Trials with a valid record of the same fingerprint are not repeated; a failed trial is a record, too."""
    input:
        lambda wildcards: TARGETS.block_inputs(wildcards.block),
    output:
        LAYOUT.block("{block}"),
    resources:
        device=1,
        **TARGETS.block_resources(),
    shell:
        "coati-bench block {output:q}"
