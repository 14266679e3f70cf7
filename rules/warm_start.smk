"""What cells begin from and is made once: tokenizers, and the weights of earlier stages."""


rule warm:
    """Make one warm start. One that failed says so in its file, and what needs it leaves records with that reason."""
    input:
        lambda wildcards: TARGETS.warm_inputs(wildcards.warm),
    output:
        LAYOUT.warm("{warm}") / "done.json",
    resources:
        device=1,
        **TARGETS.warm_resources(),
    shell:
        "coati-bench warm {output:q}"
