"""Which checkpoints the arms need, and what they share: arms are paths through a tree of training segments.

A node is the model after some epoch of training. Arms that agree on everything up to an epoch share the nodes up to
there, so c-sft forks from sft's node at its replay epoch. Segments end at `train.fork_epochs`, at an arm's own replay
epochs and at its last epoch; since continuing is exact, where they end changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.common.config import Config


@dataclass(frozen=True)
class Node:
    """One trained checkpoint.

    name: its folder in the results: the arm's name for an arm's last node, `<arm>-epoch<E>` before.
    arm: the first arm (in the configuration's order) whose path holds it; its settings are the node's.
    epoch: epochs of training done.
    parent: the node it continues, or None for the base model.
    replays: names of the nodes whose replay joined the data, in order; an entry per replay epoch up to here.
    """

    name: str
    arm: str
    epoch: int
    parent: str | None
    replays: tuple[str, ...]


def selection_owner(config: Config, arm: str) -> str:
    """The first arm that selects training data as this one does; its folder holds pairs and discard pool."""

    def key(name: str) -> tuple:
        return config.arms[name].objective, config.arms[name].candidates, config.arm_pairs(name)

    return next(name for name in config.arms if key(name) == key(arm))


def nodes(config: Config) -> dict[str, Node]:
    """Every node of every arm by name, parents before children."""
    by_key: dict[tuple, Node] = {}
    for name, arm in config.arms.items():
        settings = config.arm_train(name)
        setup = (selection_owner(config, name), repr(settings.outcome()))
        cuts = {epoch for epoch in settings.fork_epochs if epoch < arm.epochs}
        parent: Node | None = None
        key: tuple = setup
        for epoch in sorted(cuts | set(arm.replay_epochs) | {arm.epochs}):
            replays = parent.replays if parent else ()
            if parent and parent.epoch in arm.replay_epochs:
                replays = (*replays, parent.name)
            key = (key, epoch, replays)
            last = epoch == arm.epochs
            if key not in by_key or last:
                label = name if last else f"{name}-epoch{epoch}"
                node = Node(label, name, epoch, parent.name if parent else None, replays)
                by_key[(*key, name) if last else key] = node
            parent = by_key[(*key, name) if last else key]
    return {node.name: node for node in by_key.values()}
