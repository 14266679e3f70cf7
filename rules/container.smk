"""Images, made once from hashed locks. The file's name carries the digest, so that a rebuilt image is another file."""


rule container:
    """Build an image, or find it built, and note its digest and file."""
    output:
        LAYOUT.image("{image}"),
    shell:
        "coati-bench container build {wildcards.image:q} --any-package --output {output:q}"
