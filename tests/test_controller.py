"""The controller in simulated calls. All random numbers are seeded, so a test always passes or always fails."""

import random

import numpy as np
import pytest

from specdec_triton import Topology
from specdec_triton.tree import RANK_ACCEPTANCE
from specdec_triton.tree_choice import controller as module
from specdec_triton.tree_choice.controller import AdaptiveTree
from specdec_triton.tree_choice.costs import CPU_PRIOR, Costs, OnlineCosts
from specdec_triton.tree_choice.search import LADDER, expected_tokens, optimal_topology

SHARED = Costs(verify=((1, 1.0), (12, 1.8)))  # costs of a small model on a CPU
GPU = Costs(verify=((1, 1.0), (64, 1.0), (128, 2.0)), draft=((1, 0.05),))
COSTS = {"cpu": CPU_PRIOR, "shared": SHARED, "gpu": GPU}


def acceptance_of(first, ranks, depth=16):
    """The same acceptance at every depth. Each later candidate is accepted half as often as the one before it."""
    others = [(1 - first) * 0.4 * 0.5**rank for rank in range(ranks - 1)] if first else [0.0] * (ranks - 1)
    return np.tile([first, *others], (depth, 1))


def accepted_path(tree, acceptance, chance):
    """Draw the nodes that a target accepts: at each node one child or none."""
    path = [0]
    while True:
        point, below = chance.random(), acceptance[len(path) - 1]
        hit = int(np.searchsorted(np.cumsum(below), point, side="right"))
        children = dict(zip(zip(tree.parents, tree.ranks, strict=True), range(tree.num_nodes), strict=True))
        if hit == len(below) or (path[-1], hit) not in children:
            return path[1:]
        path.append(children[path[-1], hit])


class Call:
    """A simulated call. Records the chosen trees, their true costs and the emitted tokens."""

    def __init__(self, controller, costs, seed=0, lag=0, rows=1, timed=False, has_draft=lambda row: True):
        self.controller, self.costs, self.lag, self.rows, self.timed = controller, costs, lag, rows, timed
        self.chance, self.waiting, self.has_draft = random.Random(seed), [], has_draft

    def run(self, tokens, acceptance):
        """Run rounds until each row has this many tokens. Returns (tokens so far, expected tokens, seconds, nodes) for
        each round."""
        emitted, rounds = 0.0, []
        while emitted < tokens:
            tree = self.controller.choose()
            drafted = [tree.num_nodes > 1 and self.has_draft(row) for row in range(self.rows)]
            paths = [accepted_path(tree, acceptance, self.chance) if has else [] for has in drafted]
            verify = self.costs.verify_seconds(tree.num_nodes)
            seconds = {"verify": verify * (1 + 0.1 * self.chance.random()) * (5 if self.chance.random() < 0.03 else 1)}
            seconds["draft"] = self.costs.draft_seconds(tree.max_depth)
            self.waiting.append((tree, paths, drafted, seconds if self.timed else None))
            while len(self.waiting) > self.lag:
                self.controller.record(*self.waiting.pop(0))
            emitted += 1 + sum(map(len, paths)) / self.rows
            taken = self.costs.round_seconds(tree.num_nodes, tree.max_depth)
            rounds.append((emitted, expected_tokens(tree, acceptance), taken, tree.num_nodes))
        return np.array(rounds)


def controller_of(costs, ranks=6, max_nodes=64, max_depth=10, **options):
    return AdaptiveTree(costs, max_nodes, max_depth, ranks == 1, ranks, RANK_ACCEPTANCE, **options)


def share_of_best(rounds, acceptance, costs, skip=0, max_nodes=64, max_depth=10):
    """Expected tokens per second after the first `skip` tokens, relative to the best fixed tree."""
    best = optimal_topology(acceptance, costs, max_nodes, max_depth)
    wanted = expected_tokens(best, acceptance) / costs.round_seconds(best.num_nodes, best.max_depth)
    _, tokens, seconds, _ = rounds[rounds[:, 0] > skip].T
    return tokens.sum() / seconds.sum() / wanted


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("learned", [False, True])
def test_a_drafter_without_hope_costs_at_most_one_row_in_twenty(tokens, lag, learned):
    controller = controller_of(OnlineCosts() if learned else CPU_PRIOR)
    rounds = Call(controller, CPU_PRIOR, lag=lag, timed=learned).run(tokens, acceptance_of(0, 6))
    assert len(rounds) == tokens
    assert tokens < rounds[:, 3].sum() <= 1.05 * tokens  # it is tried, but not too often
    assert (rounds[-tokens // 4 :, 3] > 1).any()  # until the end


@pytest.mark.parametrize("name", COSTS)
def test_the_loss_with_a_useless_drafter_stays_within_the_allowance(name):
    costs = COSTS[name]
    rounds = Call(controller_of(costs), costs).run(300, acceptance_of(0, 6))
    lost = np.cumsum(rounds[:, 2] - 1)
    assert (lost <= module.ALLOWANCE + module.ALLOWANCE_RATE * rounds[:, 0] + 1e-9).all()
    assert lost[-1] >= 0.5 * module.ALLOWANCE_RATE * 300


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("ranks", [1, 6])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_good_drafter_is_used_nearly_as_well_as_by_the_best_fixed_tree(name, ranks, lag):
    costs, acceptance = COSTS[name], acceptance_of(0.8, ranks)
    calls = [Call(controller_of(costs, ranks), costs, seed, lag).run(200, acceptance) for seed in range(3)]
    shares = [share_of_best(rounds, acceptance, costs, skip=64) for rounds in calls]
    assert np.mean(shares) >= 0.9 and min(shares) >= 0.85


@pytest.mark.parametrize(("first", "others"), [(0.0, 0.0), (0.3, 0.1), (0.5, 0.2)])
def test_a_middling_drafter_costs_little_where_it_does_not_pay(first, others):
    acceptance = np.tile([first, others], (16, 1))
    for seed in range(3):
        rounds = Call(controller_of(CPU_PRIOR, 2), CPU_PRIOR, seed).run(200, acceptance)
        assert share_of_best(rounds, acceptance, CPU_PRIOR) >= 0.94


@pytest.mark.parametrize("name", ["shared", "gpu"])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_drafter_that_turns_bad_and_good_again_is_followed(name, lag):
    costs, good, bad = COSTS[name], acceptance_of(0.8, 1), acceptance_of(0, 1)
    shares = []
    for seed in range(6):
        call = Call(controller_of(costs, 1), costs, seed, lag)
        first, middle, last = call.run(150, good), call.run(600, bad), call.run(150, good)
        assert share_of_best(first, good, costs, skip=64) >= 0.9
        # lost plain rounds: the allowance earned with every token, and 9 rounds until the change is noticed
        assert (middle[:, 2] - 1).sum() <= module.ALLOWANCE_RATE * 600 + 9
        # small trials continue
        assert (middle[-100:, 3] > 1).any() and middle[-100:, 3].max() <= 4
        shares.append(share_of_best(last, good, costs))
        assert shares[-1] >= 0.75 and share_of_best(last, good, costs, skip=80) >= 0.85
    assert np.mean(shares) >= 0.87  # counted from the first good round


@pytest.mark.parametrize("name", ["shared", "gpu"])
@pytest.mark.parametrize("lag", [0, 1])
def test_costs_that_the_prior_had_wrong_are_learned(name, lag):
    truth = COSTS[name]
    acceptance = acceptance_of(0.8, 1)
    for seed in range(3):
        controller = controller_of(OnlineCosts(), 1)
        rounds = Call(controller, truth, seed, lag, timed=True).run(260, acceptance)
        assert share_of_best(rounds, acceptance, truth, skip=100) >= 0.9
        assert (rounds[:3, 3] == 1).all()  # the baseline


def test_rows_of_a_batch_add_up_and_those_without_a_draft_count():
    acceptance = acceptance_of(0.8, 1)
    many, few = controller_of(SHARED, 1), controller_of(SHARED, 1)
    every_row = Call(many, SHARED, rows=8).run(100, acceptance)
    one_row = Call(few, SHARED, rows=8, has_draft=lambda row: row == 0).run(100, acceptance)
    assert share_of_best(every_row, acceptance, SHARED, skip=20) >= 0.95
    # drafts in one row of eight hardly help: 1 + 0.8 / 8 tokens for 1.07 plain rounds
    assert many.summary["speedup"] > 2 and few.summary["speedup"] < 1.2
    assert one_row[-1, 0] / one_row[:, 2].sum() >= 0.95


def test_rounds_without_any_draft_cost_nothing():
    controller = controller_of(CPU_PRIOR)
    for _ in range(40):
        tree = controller.choose()
        assert tree.num_nodes == 2  # a trial still follows
        controller.record(tree, [[]], [False])
    controller.choose()
    controller.record(Topology.chain(0), [], [])  # read one round late, after all rows have finished


def test_trials_double_with_each_success_and_start_again_after_a_failure():
    controller = AdaptiveTree(SHARED, 64, 10, True, 1, start=[0.02], every=100)
    sizes = []
    for success in (True, True, True, False, True, True):
        tree = controller.choose()
        sizes.append(tree.num_nodes)
        controller.record(tree, [list(range(1, tree.num_nodes)) if success else []], [True])
    assert sizes == [2, 4, 8, 11, 2, 4]


def test_depths_keep_their_observations():
    controller = controller_of(SHARED, ranks=2, max_depth=4)
    for _ in range(30):
        controller.record(Topology.chain(2), [[1]], [True])
    seen = controller.summary["acceptance"]
    assert seen[0] > 0.9 and seen[1] < 0.2
    assert seen[3] <= seen[2] <= seen[1]  # never tried: expected to be no better than the depth above
    for _ in range(30):
        controller.record(Topology.chain(2), [[1, 2]], [True])
    before = controller.summary["acceptance"]
    for _ in range(200):
        controller.record(Topology.chain(1), [[1]], [True])
    assert controller.summary["acceptance"][1] == pytest.approx(before[1], abs=0.02)
    # other candidates of a node count if they were tried
    wide = Topology.from_widths([2])
    for _ in range(30):
        controller.record(wide, [[2]], [True])
    assert optimal_topology([[0.1, 0.8]], SHARED, 2, 1).ranks == (0, 1)
    assert controller.summary["acceptance"][0] > 0.95


def test_choices_repeat_and_plans_are_not_made_more_often_than_asked(monkeypatch):
    plans = []

    class Counted(module.Search):
        def __init__(self, *arguments):
            plans.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(module, "Search", Counted)
    calls = [Call(controller_of(GPU, every=7), GPU, seed=5).run(150, acceptance_of(0.6, 6)) for _ in range(2)]
    assert np.array_equal(*calls)
    assert len(plans) <= 2 * (1 + len(calls[0]) // 7)
    assert len({nodes for _, _, _, nodes in calls[0]} - set(LADDER)) == 0


@pytest.mark.parametrize(("max_nodes", "max_depth"), [(1, 5), (8, 0)])
def test_where_no_tree_is_allowed_none_is_chosen(max_nodes, max_depth):
    controller = controller_of(GPU, max_nodes=max_nodes, max_depth=max_depth)
    rounds = Call(controller, GPU).run(20, acceptance_of(0.9, 6))
    assert (rounds[:, 3] == 1).all()
    assert controller.summary["trees"] == [{"nodes": 1, "depth": 0, "rounds": 20}]
    assert controller.summary["speedup"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": 3}, "costs must be Costs or OnlineCosts, got int"),
        ({"max_nodes": 0}, "max_nodes must be a whole number of at least 1, got 0"),
        ({"max_depth": -1}, "max_depth must be a whole number of at least 0, got -1"),
        ({"max_rank": 0}, "max_rank must be a whole number of at least 1, got 0"),
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
        ({"start": [0.8, 0.3]}, r"start must be \[K\] or \[D, K\] probabilities with row sums of at most 1"),
        ({"start": [-0.1]}, "start must be"),
        ({"start": "half"}, "start must be .*, got 'half'"),
    ],
)
def test_bad_controllers_are_refused(changes, message):
    options = {"costs": GPU, "max_nodes": 8, "max_depth": 4, "chain": False, "max_rank": 2, "start": [0.5, 0.1]}
    with pytest.raises(ValueError, match=f"^AdaptiveTree: {message}"):
        AdaptiveTree(**options | changes)


@pytest.mark.parametrize(
    ("round_", "message"),
    [
        ((3, [[]], [True]), "topology must be Topology, got int"),
        ((Topology.chain(5), [[]], [True]), "topology must be at most 4 deep with ranks below 2, got 5 and 0"),
        ((Topology.from_widths([3]), [[]], [True]), "topology must be at most 4 deep with ranks below 2, got 1 and 2"),
        ((Topology.chain(2), [[], []], [True]), "accepted and drafted must have the same length, got 2 and 1"),
        ((Topology.chain(2), [[2]], [True]), r"accepted must be paths from the root of a tree of 3 nodes, got \[2\]"),
        ((Topology.chain(2), [[1, 2, 3]], [True]), "accepted must be paths"),
        ((Topology.from_widths([2]), [[1, 2]], [True]), "accepted must be paths"),
    ],
)
def test_bad_rounds_are_refused(round_, message):
    controller = controller_of(GPU, ranks=2, max_nodes=8, max_depth=4)
    with pytest.raises(ValueError, match=f"^AdaptiveTree.record: {message}"):
        controller.record(*round_)
