"""Curriculum replay: the checkpoint of a replay epoch draws and judges the prompts of the discard pool again.

In controls, the untrained model does one of these or both, in the folder <node>-by-<who>.

pool -> candidates and scores (made by the rules generate and score) -> recovered pairs -> remaining pool
"""


rule replay_pool:
    input:
        prompts=f"{RUN}/prompts/train.parquet",
        discard=pool_before,
    output:
        f"{RUN}/{{node}}/replay/pool.parquet",
    log:
        f"{RUN}/logs/replay/{{node}}.pool.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=code("stages.replay"),
    message:
        "Discard pool at {wildcards.node}"
    shell:
        "python -m stages.replay pool"
        " --prompts {input.prompts:q}"
        " --discard {input.discard:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule replay_pairs:
    input:
        candidates=lambda wildcards: shard_files(wildcards.node, "candidates", "replay"),
        scores=replay_scores,
    output:
        pairs=f"{RUN}/{{node}}/replay/pairs.parquet",
        discard=f"{RUN}/{{node}}/replay/discard.parquet",
    log:
        f"{RUN}/logs/replay/{{node}}.pairs.log",
    wildcard_constraints:
        node=pattern(drawn_replays()),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.pairs"),
        config=CONFIG,
        arm=lambda wildcards: REPLAYS[wildcards.node].node.arm,
        selection=lambda wildcards: selection_settings(REPLAYS[wildcards.node].node.arm),
    message:
        "Recovered prompts at {wildcards.node}"
    shell:
        "python -m stages.pairs"
        " --config {params.config:q}"
        " --arm {params.arm}"
        " --candidates {input.candidates:q}"
        " --scores {input.scores:q}"
        " --out {output.pairs:q}"
        " --discard {output.discard:q}"
        " 2>&1 | logged {log:q}"


rule replay_merge:
    input:
        discard=pool_before,
        recovered=f"{RUN}/{{node}}/replay/pairs.parquet",
        again=f"{RUN}/{{node}}/replay/discard.parquet",
    output:
        f"{RUN}/{{node}}/replay/waiting.parquet",
    log:
        f"{RUN}/logs/replay/{{node}}.merge.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=code("stages.replay"),
    message:
        "Discard pool after {wildcards.node}"
    shell:
        "python -m stages.replay merge"
        " --discard {input.discard:q}"
        " --recovered {input.recovered:q}"
        " --again {input.again:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"
