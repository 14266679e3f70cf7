"""Images: built once from hashed locks; the file name carries the digest, so that a rebuilt image is another file."""


rule container:
    """Build an image, or find it built, and note its digest and file. Asked for by name: results/containers/cpu.json."""
    output:
        "results/containers/{image}.json",
    wildcard_constraints:
        image="[a-z0-9]+",
    shell:
        "coati-bench container build {wildcards.image:q} --output {output:q}"
