"""The checkpoints that the arms need and share. Arms are paths through a tree of training segments.

A node is the model after a certain epoch of training. Arms that agree in everything up to an epoch share their nodes up to that
epoch; for example, c-sft forks from sft's node at its replay epoch. Segments end at `train.fork_epochs`, at an arm's own replay
epochs and at its last epoch. A continued training is exact, so the choice of these epochs changes no weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stages.common.config import Config, Pairs


@dataclass(frozen=True)
class Node:
    """One trained checkpoint.

    name: its folder in the results. An arm's last node has the arm's name, and earlier nodes are called `<arm>-epoch<E>`.
    arm: the first arm, in the configuration's order, whose path contains it. The node has that arm's settings.
    epoch: the number of completed training epochs.
    parent: the node that it continues, or None for the base model.
    replays: names of the replays whose data has joined the training data, in order of their epochs.
    """

    name: str
    arm: str
    epoch: int
    parent: str | None
    replays: tuple[str, ...]


@dataclass(frozen=True)
class Replay:
    """Data that joins the training after a node's epoch.

    name: its folder in the results. It is the node's name or, if the model does not replay itself, `<node>-by-<who>`.
    node: the checkpoint after whose epoch the data joins.
    draws, judges: the node that draws the pool and the one that judges it; "base", or None if nothing is drawn.
    before: the arm's earlier replays.
    like: if nothing is drawn, the model's own replay, which says how many rows join; otherwise None.
    """

    name: str
    node: Node
    draws: str | None
    judges: str | None
    before: tuple[str, ...]
    like: str | None


@dataclass(frozen=True)
class Selection:
    """The settings that determine an arm's training data. Arms with equal selections share pairs and discard pool."""

    objective: str
    candidates: int | None
    pairs: Pairs


@dataclass(frozen=True)
class History:
    """Everything on which a node's weights depend. Arms share the nodes at which their histories are equal.

    selection: the arm that owns the selected data. settings: the training settings, as text. segments: for each segment so far,
    its last epoch and the replays whose data it trained on.
    """

    selection: str
    settings: str
    segments: tuple[tuple[int, tuple[str, ...]], ...] = ()


def selection_owner(config: Config, arm: str) -> str:
    """Return the first arm with the same selection of training data. Its folder holds the pairs and the discard pool."""

    def selection(name: str) -> Selection:
        return Selection(config.arms[name].objective, config.arms[name].candidates, config.arm_pairs(name))

    return next(name for name in config.arms if selection(name) == selection(arm))


def reference_epochs(config: Config, arm: str, likelihood: str | None) -> int:
    """Return how many epochs need reference log-probabilities of an arm's pairs.

    It is 1 where the likelihood is exact, and otherwise the epochs of the longest arm with these pairs.
    """
    if likelihood == "exact":
        return 1
    owner = selection_owner(config, arm)
    return max(config.arms[name].epochs for name in config.arms if selection_owner(config, name) == owner)


def nodes(config: Config) -> dict[str, Node]:
    """Return the nodes of all arms by name, parents before children."""
    found: dict[str, Node] = {}
    shared: dict[History, Node] = {}
    for name, arm in config.arms.items():
        settings = config.arm_train(name)
        history = History(selection_owner(config, name), repr(settings.outcome()))
        forks = {epoch for epoch in settings.fork_epochs if epoch < arm.epochs}
        parent: Node | None = None
        for epoch in sorted(forks | set(arm.replay_epochs) | {arm.epochs}):
            replays = parent.replays if parent else ()
            if parent and parent.epoch in arm.replay_epochs:
                replays = (*replays, parent.name if arm.replay_by == "self" else f"{parent.name}-by-{arm.replay_by}")
            history = replace(history, segments=(*history.segments, (epoch, replays)))
            parent_name = parent.name if parent else None
            if epoch == arm.epochs:
                node = Node(name, name, epoch, parent_name, replays)
            else:
                node = shared.setdefault(history, Node(f"{name}-epoch{epoch}", name, epoch, parent_name, replays))
            found[node.name] = parent = node
    return found


def path(tree: dict[str, Node], arm: str) -> list[Node]:
    """Return an arm's nodes in the order of their epochs. The last one is the arm itself. tree: see `nodes`."""
    found: list[Node] = []
    name: str | None = arm
    while name:
        found.insert(0, tree[name])
        name = tree[name].parent
    return found


def replays(config: Config) -> dict[str, Replay]:
    """Return the replays of all arms by name."""
    tree = nodes(config)
    found: dict[str, Replay] = {}
    for name, arm in config.arms.items():
        twin = config.replay_twin(name) if arm.replay_by == "nobody" else None
        for place, replay in enumerate(tree[name].replays):
            node = tree[replay.removesuffix(f"-by-{arm.replay_by}")]
            draws, judges = {
                "self": (node.name, node.name),
                "base": ("base", "base"),
                "drawing": (node.name, "base"),
                "judging": ("base", node.name),
                "nobody": (None, None),
            }[arm.replay_by]
            like = tree[twin].replays[place] if twin else None
            found.setdefault(replay, Replay(replay, node, draws, judges, node.replays, like))
    return found
