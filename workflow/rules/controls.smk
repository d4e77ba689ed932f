"""Controls: the training data of arms that differ from another arm only in who has judged.

A matched control has the prompts and the numbers of rows of the selection that the model's judge made. In a control of replay
in which nothing is drawn, as many further rows join as the model's own replay has recovered.
"""


rule matched_pairs:
    input:
        like=lambda wildcards: f"{selection_folder(settings.counterpart(wildcards.arm))}/pairs.parquet",
        prompts=f"{RUN}/prompts/train.parquet",
        candidates=shard_files("base", "candidates", "train"),
        scores=shard_files("base", "scores", "train"),
        verdicts=lambda wildcards: oracle_verdicts(wildcards.arm),
    output:
        f"{RUN}/{{arm}}/pairs.parquet",
    log:
        f"{RUN}/logs/pairs/{{arm}}.log",
    wildcard_constraints:
        arm=pattern(MATCHED),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.controls"),
        config=CONFIG,
        selection=lambda wildcards: selection_settings(wildcards.arm, "stages.controls"),
    message:
        "Pairs of a matched control: {wildcards.arm}"
    shell:
        "python -m stages.controls match"
        " --config {params.config:q}"
        " --arm {wildcards.arm}"
        " --like {input.like:q}"
        " --prompts {input.prompts:q}"
        " --candidates {input.candidates:q}"
        " --scores {input.scores:q}"
        " --verdicts {input.verdicts:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule more_pairs:
    input:
        selected=selected_before,
        recovered=lambda wildcards: f"{RUN}/{REPLAYS[wildcards.node].like}/replay/pairs.parquet",
        candidates=shard_files("base", "candidates", "train"),
        scores=shard_files("base", "scores", "train"),
        verdicts=lambda wildcards: oracle_verdicts(REPLAYS[wildcards.node].node.arm),
    output:
        f"{RUN}/{{node}}/replay/pairs.parquet",
    log:
        f"{RUN}/logs/replay/{{node}}.pairs.log",
    wildcard_constraints:
        node=pattern(replay.name for replay in REPLAYS.values() if not replay.draws),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.controls"),
        config=CONFIG,
        arm=lambda wildcards: REPLAYS[wildcards.node].node.arm,
        selection=lambda wildcards: selection_settings(REPLAYS[wildcards.node].node.arm, "stages.controls"),
    message:
        "Further rows instead of a replay: {wildcards.node}"
    shell:
        "python -m stages.controls more"
        " --config {params.config:q}"
        " --arm {params.arm}"
        " --selected {input.selected:q}"
        " --recovered {input.recovered:q}"
        " --candidates {input.candidates:q}"
        " --scores {input.scores:q}"
        " --verdicts {input.verdicts:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"
